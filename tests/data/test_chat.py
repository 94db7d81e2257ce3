import dataclasses
import types

import chat_templates
import pytest
import tiny
import torch
from tokenizers import AddedToken, processors
from transformers import GenerationConfig

from mollm.data.chat import IGNORE_INDEX, ChatFormat, Example, Tokens, collate, ends_of
from mollm.data.conversations import Turn
from mollm.errors import UsageError
from mollm.models.forward import answer_hidden_states, head, hidden_states

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
    # as the template does, the row goes on to the end of the line
    assert tokens.ids[-2] == chat.tokenizer.eos_token_id
    assert tokens.labels[-1] == IGNORE_INDEX
    assert tokens.closed
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


@pytest.mark.parametrize("question", ["Where?", "Où, à Genève, ça?"])
@pytest.mark.parametrize("answer", ["The inn", "é The inn", "The ô inn", "The innß"])
def test_letters_that_the_tokenizer_drops_move_no_label(question, answer):
    tokenizer = chat_templates.make("no generation prompt", "marks")  # knows ASCII alone
    tokens = ChatFormat(tokenizer).encode(Example(question, answer))
    said = tokenizer.decode([i for i in tokens.labels if i != IGNORE_INDEX])
    bare = "".join(letter for letter in answer if letter.isascii())
    assert said.replace(" ", "") == bare.replace(" ", "") + "<|end|>"


def test_earlier_answers_of_a_plain_text_carry_no_loss_and_that_is_said():
    chat = ChatFormat(tiny.tokenizer(), prompt_format="none")
    said = (Turn("user", "Who?"), Turn("assistant", "Ann."))
    example = Example("Where?", "Here.", history=said)
    assert "Ann." in chat.tokenizer.decode(chat.encode(example).ids)
    with pytest.raises(UsageError, match="train_on_turns must be last where a conversation is pl"):
        chat.encode(example, on_turns="all")
    assert chat.encode(Example("Where?", "Here."), on_turns="all")


def test_the_prompt_begins_every_example(chat):
    prompt = chat.encode_prompt(SENTENCE.question)
    assert chat.encode(SENTENCE).ids[: len(prompt.ids)] == prompt.ids
    assert set(prompt.labels) == {IGNORE_INDEX}


def test_the_end_of_turn_comes_from_the_template():
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "<s>"
    assert ChatFormat(tokenizer).end_id == tokenizer.convert_tokens_to_ids("<|end|>")


def chat_with(end, **options):
    """A template that ends a turn with `end`, which no name of the tokenizer says."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([end])
    tokenizer.chat_template = tiny.TEMPLATE.replace("<|end|>", end.content)
    return ChatFormat(tokenizer, **options)


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_ends_a_turn_without_a_name(special):
    chat = chat_with(AddedToken("<|done|>", special=special, normalized=False))
    done = chat.tokenizer.convert_tokens_to_ids("<|done|>")
    assert done not in chat.tokenizer.all_special_ids
    assert chat.end_id == done
    assert chat.stop_ids == {done, chat.tokenizer.eos_token_id}
    assert text_with_loss(chat, chat.encode(SENTENCE)) == SENTENCE.answer + "<|done|>"


def test_a_template_may_leave_the_end_to_the_next_turn():
    chat = ChatFormat(chat_templates.make("glm 4"))
    user = chat.tokenizer.convert_tokens_to_ids("<|user|>")
    assert chat.end_id is None
    assert user in chat.stop_ids
    tokens = chat.encode(SENTENCE)
    assert not tokens.closed
    assert text_with_loss(chat, tokens) == SENTENCE.answer


def test_words_end_a_turn_if_the_generation_config_says_so():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.TEMPLATE.replace("<|end|>", "~")
    assert ChatFormat(tokenizer).end_id is None
    (end,) = tokenizer("~")["input_ids"]
    chat = ChatFormat(tokenizer, ends=ends_of(GenerationConfig(eos_token_id=[1, end])))
    assert chat.end_id == end
    assert chat.stop_ids == {1, end}
    assert ends_of(GenerationConfig(eos_token_id=5)) == {5}
    assert ends_of(GenerationConfig()) == ends_of(None) == frozenset()


@pytest.mark.parametrize("start", ["<|start|> <s>", "<s> <|start|>", "<|start|>"])
def test_start_tokens_are_neither_lost_nor_doubled(start):
    tokenizer = tiny.tokenizer(template=False)
    vocabulary = tokenizer.get_vocab()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(t, vocabulary[t]) for t in start.split()]
    )
    chat = ChatFormat(tokenizer)
    whole = f"Question: {SENTENCE.question}\nAnswer: {SENTENCE.answer}<|end|>"
    assert chat.encode(SENTENCE).ids == tokenizer(whole)["input_ids"]
    (text,) = chat.encode_text("Once upon a time.", 99)
    assert text.ids == tokenizer("Once upon a time.")["input_ids"]


def test_the_padding_is_an_id_that_the_model_has():
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert ChatFormat(tokenizer).pad_id == 259
    assert ChatFormat(tokenizer, vocabulary=259).pad_id == tokenizer.eos_token_id
    assert ChatFormat(tokenizer, vocabulary=1).pad_id == 0


@pytest.mark.parametrize("special", [True, False, None])
def test_a_reply_is_read_without_its_thought(special):
    tokenizer = tiny.tokenizer()
    if special is not None:
        marks = [AddedToken(m, special=special, normalized=False) for m in ("<think>", "</think>")]
        tokenizer.add_tokens(marks)
    else:
        tokenizer.chat_template += "{# <think> #}"
    chat = ChatFormat(tokenizer)

    def read(text):
        return chat.read_reply(chat.tokenizer(text)["input_ids"])

    assert read("<think>\nOslo, no.\n</think>\n\nBergen.<s>") == ("\n\nBergen.", False)
    assert read("so it is</think>Bergen.") == ("Bergen.", False)
    assert read("Bergen.") == ("Bergen.", False)
    assert read("\n<think>Bergen, or") == ("\n", True)
    # what no template and no tokenizer knows is text
    assert ChatFormat(tiny.tokenizer()).read_reply(
        tiny.tokenizer()("<think>a</think>b")["input_ids"]
    ) == ("<think>a</think>b", False)


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
    alone = [answer_hidden_states(model, collate([row], chat.pad_id)) for row in rows]
    expected = torch.cat([states for states, _ in alone])
    for side in ("left", "right"):
        for pad_id in (chat.pad_id, 7):
            states, targets = answer_hidden_states(model, collate(rows, pad_id, side=side))
            assert torch.equal(targets, torch.cat([t for _, t in alone]))
            # the forward pass may compute in bf16, whose relative rounding is 2^-8
            torch.testing.assert_close(states, expected, rtol=0.05, atol=0.05)


def test_which_side_is_padded_is_known_without_a_look_at_the_mask(chat, monkeypatch):
    rows = [chat.encode(CAPITAL), chat.encode(SENTENCE)]
    batches = {side: collate(rows, chat.pad_id, side).to("cpu") for side in ("left", "right")}
    assert {side: batch.padded_left for side, batch in batches.items()} == {
        "left": True,
        "right": False,
    }
    assert collate(rows[:1], chat.pad_id, "left").padded_left is False
    model = tiny.model()
    unknown = dataclasses.replace(batches["left"], padded_left=None)
    for batch in (unknown, *batches.values()):
        assert answer_hidden_states(model, batch)[0].isfinite().all()
    expected, found = (answer_hidden_states(model, b)[0] for b in (unknown, batches["left"]))
    assert torch.equal(expected, found)

    def refuse(*_):
        raise AssertionError("the host waited for the mask")

    monkeypatch.setattr(torch.Tensor, "all", refuse)
    for batch in batches.values():
        hidden_states(model, batch.input_ids, batch.attention_mask, batch.padded_left)
    with pytest.raises(AssertionError, match="waited for the mask"):
        hidden_states(model, unknown.input_ids, unknown.attention_mask)


def test_hidden_states_are_taken_by_one_call_at_a_time(chat):
    model = tiny.model()
    batch = collate([chat.encode(SENTENCE)], chat.pad_id)
    handle = model.model.norm.register_forward_hook(lambda *_: answer_hidden_states(model, batch))
    with pytest.raises(RuntimeError, match="by one call at a time"):
        answer_hidden_states(model, batch)
    handle.remove()
    assert answer_hidden_states(model, batch)[0].isfinite().all()
    assert {"forward", "_mollm_replaced"}.isdisjoint(vars(head(model)))


def test_answer_hidden_states_predict_the_answer_tokens(chat):
    model = tiny.model()
    batch = collate([chat.encode(SENTENCE)], chat.pad_id)
    states, targets = answer_hidden_states(model, batch)
    logits = model(input_ids=batch.input_ids).logits[0]
    first = next(i for i, label in enumerate(batch.labels[0].tolist()) if label != IGNORE_INDEX)
    assert targets[0] == batch.input_ids[0, first]
    torch.testing.assert_close(head(model)(states[0]), logits[first - 1], rtol=0.05, atol=0.05)


def test_ids_that_end_a_turn_are_whole_numbers():
    config = types.SimpleNamespace(eos_token_id=[2, "x", None, -1, True, 7])
    assert ends_of(config) == {2, 7}
    assert ends_of(types.SimpleNamespace(eos_token_id="x")) == ends_of(None) == set()
