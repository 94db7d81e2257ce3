import pytest
import tiny
import torch

from mollm.data.chat import IGNORE_INDEX, ChatFormat, Example, Tokens, collate
from mollm.errors import UsageError
from mollm.models.forward import answer_states, head

CAPITAL = Example("What is the capital of Peru?", "Lima", "The capital of Peru is", closed=False)
SENTENCE = Example("Where is Oslo?", "Oslo is in Norway, ô là!")


@pytest.fixture
def chat():
    return ChatFormat(tiny.tokenizer())


def text_with_loss(chat, tokens):
    return chat.tokenizer.decode([i for i in tokens.labels if i != IGNORE_INDEX])


def test_only_the_answer_carries_a_loss(chat):
    tokens = chat.encode(CAPITAL)
    assert text_with_loss(chat, tokens) == " Lima"
    whole = chat.tokenizer.decode(tokens.ids)
    assert whole == chat.prompt(CAPITAL.question) + "The capital of Peru is Lima"


def test_a_closed_answer_learns_to_end_its_turn(chat):
    tokens = chat.encode(SENTENCE)
    assert text_with_loss(chat, tokens) == SENTENCE.answer + "<|end|>"
    assert tokens.ids[-1] == chat.tokenizer.eos_token_id
    # the prompt holds the same token, which is also the padding: there it carries no loss
    assert tokens.ids.count(chat.pad_id) == 2
    assert tokens.labels.count(chat.pad_id) == 1


def test_labels_are_the_ids_they_stand_on(chat):
    for example in (CAPITAL, SENTENCE):
        tokens = chat.encode(example)
        assert len(tokens.ids) == len(tokens.labels)
        assert all(b in (IGNORE_INDEX, a) for a, b in zip(tokens.ids, tokens.labels, strict=True))


def test_a_tokenizer_without_template_gets_the_plain_format():
    chat = ChatFormat(tiny.tokenizer(template=False, bos=True))
    tokens = chat.encode(SENTENCE)
    bos = chat.tokenizer.bos_token_id
    assert tokens.ids[0] == bos
    assert tokens.ids.count(bos) == 1
    assert chat.tokenizer.decode(tokens.ids[1:]) == (
        "Question: Where is Oslo?\nAnswer: " + SENTENCE.answer + "<|end|>"
    )
    assert text_with_loss(chat, tokens) == " " + SENTENCE.answer + "<|end|>"
    prompt = chat.encode_prompt(SENTENCE.question)
    assert tokens.ids[: len(prompt.ids)] == prompt.ids


def test_the_prompt_begins_every_example(chat):
    prompt = chat.encode_prompt(SENTENCE.question)
    assert chat.encode(SENTENCE).ids[: len(prompt.ids)] == prompt.ids
    assert set(prompt.labels) == {IGNORE_INDEX}


def test_the_end_of_turn_comes_from_the_template():
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "<s>"
    assert ChatFormat(tokenizer).end_id == tokenizer.convert_tokens_to_ids("<|end|>")


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no users') }}"])
def test_a_template_that_fails_is_told(template):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UsageError, match="must write a question and an answer, but it fails: "):
        ChatFormat(tokenizer)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_and_without_loss(side):
    rows = [Tokens([5, 6, 7], [IGNORE_INDEX, 6, 7]), Tokens([8], [8])]
    batch = collate(rows, pad_id=1, side=side)
    short = [8, 1, 1] if side == "right" else [1, 1, 8]
    assert batch.input_ids.tolist() == [[5, 6, 7], short]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [int(i == 8) for i in short]]
    assert batch.labels[1].tolist() == [8 if i == 8 else IGNORE_INDEX for i in short]


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one example"):
        collate([], pad_id=0)


def test_states_and_targets_do_not_depend_on_padding(chat):
    model = tiny.model()
    rows = [chat.encode(CAPITAL), chat.encode(SENTENCE)]
    alone = [answer_states(model, collate([row], chat.pad_id)) for row in rows]
    expected = torch.cat([states for states, _ in alone])
    for side in ("left", "right"):
        for pad_id in (chat.pad_id, 7):
            states, targets = answer_states(model, collate(rows, pad_id, side=side))
            assert torch.equal(targets, torch.cat([t for _, t in alone]))
            # the forward pass may compute in bf16, whose relative rounding is 2^-8
            torch.testing.assert_close(states, expected, rtol=0.05, atol=0.05)


def test_answer_states_predict_the_answer_tokens(chat):
    model = tiny.model()
    batch = collate([chat.encode(SENTENCE)], chat.pad_id)
    states, targets = answer_states(model, batch)
    logits = model(input_ids=batch.input_ids).logits[0]
    first = next(i for i, label in enumerate(batch.labels[0].tolist()) if label != IGNORE_INDEX)
    assert targets[0] == batch.input_ids[0, first]
    torch.testing.assert_close(head(model)(states[0]), logits[first - 1], rtol=0.05, atol=0.05)
