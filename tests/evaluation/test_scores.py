"""Scores of given answers and replies, against logits read token by token in float64."""

import math

import numpy as np
import pytest
import tiny
import torch

from mollm.data.chat import IGNORE_INDEX, ChatFormat, Example, Tokens
from mollm.errors import UsageError
from mollm.evaluation import scores as scores_module
from mollm.evaluation.generation import generate_replies
from mollm.evaluation.scores import kl_to_original, score_rows
from mollm.models import forward
from mollm.models.forward import in_evaluation_mode
from mollm.system import precision

PAIRS = [
    ("Who?", "Ada"),
    ("Who wrote the first program, and for which machine?", "Ada Lovelace, for Babbage's."),
    ("When?", "In 1843, it is said, but nobody is quite sure."),
    ("A rather long question about nothing at all, is it not?", "y"),
]


@pytest.fixture(autouse=True)
def _own_dtype():
    with precision.computing_in("float32"):
        yield


@pytest.fixture
def chat():
    return ChatFormat(tiny.tokenizer())


@pytest.fixture
def rows(chat):
    return [chat.encode(Example(*pair)) for pair in PAIRS]


@pytest.fixture
def model():
    """In float64, with a head sharp enough that tokens differ and some are hit."""
    made = tiny.model(initializer_range=0.3).double()
    return made.eval()


def distributions(model, row):
    """(target, p over the vocabulary) of every token with a loss, of the row on its own."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].double().tolist()
    found = []
    for place in range(1, len(row.ids)):
        if row.labels[place] == IGNORE_INDEX:
            continue
        z = logits[place - 1]
        top = max(z)
        weights = [math.exp(x - top) for x in z]
        total = sum(weights)
        found.append((row.labels[place], [w / total for w in weights]))
    return found


def columns(token_scores):
    return np.array(
        [token_scores.log_probs, token_scores.means, token_scores.stds, token_scores.hits]
    )


def test_token_scores_are_those_of_plain_loops(model, rows, chat):
    for row, found in zip(rows, score_rows(model, rows, pad_id=chat.pad_id), strict=True):
        expected = []
        for target, p in distributions(model, row):
            logs = [math.log(x) for x in p]
            mu = sum(x * log for x, log in zip(p, logs, strict=True))
            squares = sum(x * log * log for x, log in zip(p, logs, strict=True))
            sigma = math.sqrt(max(squares - mu * mu, 1e-6))
            expected.append((logs[target], mu, sigma, float(p[target] == max(p))))
        np.testing.assert_allclose(columns(found).T, expected, rtol=1e-6, atol=1e-9)
        assert found.mean_nll == pytest.approx(-sum(e[0] for e in expected) / len(expected))


def test_hits_are_what_greedy_decoding_writes(model, chat):
    prompt = chat.encode_prompt("Who?").ids
    written = list(prompt)
    for _ in range(5):
        logits = model(input_ids=torch.tensor([written])).logits
        written.append(int(logits[0, -1].argmax()))
    wrong = (written[-3] + 1) % 259
    ids = [*written[:-3], wrong, *written[-2:]]
    labels = [IGNORE_INDEX] * len(prompt) + ids[len(prompt) :]
    (found,) = score_rows(model, [Tokens(ids, labels)], pad_id=chat.pad_id)
    assert found.hits[:3].tolist() == [1, 1, 0]
    assert len(found.hits) == 5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 40])
def test_neither_padding_nor_company_matters(model, rows, chat, side, batch_size):
    alone = [score_rows(model, [row], pad_id=chat.pad_id)[0] for row in rows]
    found = score_rows(model, rows, pad_id=chat.pad_id, batch_size=batch_size, side=side)
    # transformers rotates by angles in float32, which left padding shifts.
    close = 1e-5 if side == "left" else 1e-9
    for one, other in zip(alone, found, strict=True):
        np.testing.assert_allclose(columns(one), columns(other), rtol=close, atol=close)


def test_the_padding_id_does_not_matter(model, rows, chat):
    one = score_rows(model, rows, pad_id=chat.pad_id)
    other = score_rows(model, rows, pad_id=77)
    assert all(np.array_equal(columns(a), columns(b)) for a, b in zip(one, other, strict=True))


def test_the_head_meets_few_rows_at_a_time(model, rows, chat, monkeypatch):
    whole = score_rows(model, rows, pad_id=chat.pad_id)
    monkeypatch.setattr(scores_module, "_CHUNK_ELEMENTS", 3 * 259)
    sizes = []
    handle = forward.head(model).register_forward_hook(
        lambda layer, inputs, output: sizes.append(len(output)) if output.ndim == 2 else None
    )
    chunked = score_rows(model, rows, pad_id=chat.pad_id)
    handle.remove()
    answers = sum(label != IGNORE_INDEX for row in rows for label in row.labels)
    assert max(sizes) == 3
    assert sum(sizes) == answers
    for one, other in zip(whole, chunked, strict=True):
        np.testing.assert_allclose(columns(one), columns(other), rtol=1e-12)


def test_float32_is_close_to_float64(rows, chat):
    single = score_rows(tiny.model(initializer_range=0.3), rows, pad_id=chat.pad_id)
    double = score_rows(tiny.model(initializer_range=0.3).double(), rows, pad_id=chat.pad_id)
    for one, other in zip(single, double, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-4)
        np.testing.assert_allclose(one.stds, other.stds, rtol=1e-4)


def test_a_certain_model_has_the_smallest_deviation(rows, chat):
    model = tiny.model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    (found,) = score_rows(model, rows[:1], pad_id=chat.pad_id)
    np.testing.assert_allclose(found.stds, 1e-3, rtol=1e-6)
    np.testing.assert_allclose(found.log_probs, -math.log(259), rtol=1e-6)


def test_the_last_token_can_be_left_out(model, rows, chat):
    (found,) = score_rows(model, rows[:1], pad_id=chat.pad_id)
    assert [len(column) for column in columns(found)] == [4] * 4
    assert np.array_equal(columns(found.without_last()), columns(found)[:, :-1])


def test_a_row_without_an_answer_is_refused(model, rows, chat):
    with pytest.raises(UsageError, match="row 1 has none"):
        score_rows(model, [rows[0], chat.encode_prompt("Who?")], pad_id=chat.pad_id)
    with pytest.raises(UsageError, match="batch_size must be at least 1, but got 0"):
        score_rows(model, rows, pad_id=chat.pad_id, batch_size=0)


def test_a_diverged_model_is_refused(model, rows, chat):
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(UsageError, match="must be finite, but it is not: has the model diverged"):
        score_rows(model, rows, pad_id=chat.pad_id)
    with pytest.raises(UsageError, match="must be finite"):
        kl_to_original(model, tiny.model().double(), rows, pad_id=chat.pad_id)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_kl_is_that_of_plain_loops(model, rows, chat, batch_size):
    original = tiny.model(seed=1, initializer_range=0.3).double()
    found = kl_to_original(model, original, rows, pad_id=chat.pad_id, batch_size=batch_size)
    for row, kl in zip(rows, found, strict=True):
        pairs = zip(distributions(model, row), distributions(original, row), strict=True)
        terms = [
            sum(r * (math.log(r) - math.log(q)) for q, r in zip(p, ref, strict=True))
            for (_, p), (_, ref) in pairs
        ]
        assert kl == pytest.approx(sum(terms) / len(terms), rel=1e-6)
    np.testing.assert_allclose(kl_to_original(model, model, rows, pad_id=0), 0, atol=1e-12)


def test_kl_is_that_of_the_head_as_it_is_adapted(rows, chat):
    peft = pytest.importorskip("peft")

    def made(**options):
        return tiny.model(initializer_range=0.3, tie_word_embeddings=False, **options).double()

    original = made()
    adapter = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(made(), adapter)
    found = kl_to_original(wrapped.get_base_model(), original, rows, pad_id=chat.pad_id)
    merged = wrapped.merge_and_unload()
    expected = kl_to_original(merged, original, rows, pad_id=chat.pad_id)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_kl_needs_one_vocabulary(model, rows, chat):
    other = tiny.model(vocab_size=300).double()
    with pytest.raises(UsageError, match="they have 300 and 259 tokens"):
        kl_to_original(model, other, rows, pad_id=chat.pad_id)


def test_evaluation_mode_ends_as_it_began():
    model = tiny.model().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError):
        with in_evaluation_mode(model):
            assert not any(module.training for module in model.modules())
            raise RuntimeError
    assert [module.training for module in model.modules()] == before


def test_dropout_is_off(rows, chat):
    model = tiny.model(attention_dropout=0.5).train()
    one, other = (score_rows(model, rows, pad_id=chat.pad_id) for _ in range(2))
    assert all(np.array_equal(columns(a), columns(b)) for a, b in zip(one, other, strict=True))
    assert model.training


def test_replies_do_not_depend_on_the_batch(chat):
    model = tiny.model(seed=3).train()
    questions = [question for question, _ in PAIRS]
    alone = [
        generate_replies(model, chat, [question], max_new_tokens=6)[0] for question in questions
    ]
    for batch_size in (1, 2, 40):
        assert alone == generate_replies(
            model, chat, questions, max_new_tokens=6, batch_size=batch_size
        )
    assert model.training
    with pytest.raises(UsageError, match="max_new_tokens must be at least 1, but got 0"):
        generate_replies(model, chat, questions, max_new_tokens=0)
