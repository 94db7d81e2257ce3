import threading

import pytest
import tiny
import torch

pytest.importorskip("transformers")

from mollm import UsageError
from mollm.data.chat import ChatFormat, Example
from mollm.data.conversations import Turn
from mollm.evaluation.conversation import ReplyStream, Sampling
from mollm.evaluation.generation import generate_replies


@pytest.fixture
def model():
    """One that says letters: all other bytes have no place in its head."""
    made = tiny.model(tie_word_embeddings=False)
    with torch.no_grad():
        letters = [tiny.tokenizer().convert_tokens_to_ids(c) for c in "abcdefgh"]
        bias = torch.full((259,), -100.0)
        bias[[*letters, 1]] = 0
        made.lm_head.weight.mul_(20)
    made.lm_head.register_forward_hook(lambda module, inputs, output: output + bias)
    return made


@pytest.fixture
def chat():
    return ChatFormat(tiny.tokenizer())


def whole(stream):
    return "".join(stream), stream.reply


def test_pieces_make_the_reply_that_evaluation_gets(model, chat):
    questions = ["Who?", "When was it?", "Where?"]
    at_once = generate_replies(model, chat, questions, max_new_tokens=12)
    assert any(reply.text for reply in at_once)
    for question, reply in zip(questions, at_once, strict=True):
        text, found = whole(ReplyStream(model, chat, question, Sampling(max_new_tokens=12)))
        assert found == reply
        assert text == reply.text


def test_a_token_is_written_when_it_is_asked_for(model, chat):
    written = []
    model.lm_head.register_forward_hook(lambda *_: written.append(1))
    pieces = iter(ReplyStream(model, chat, "Who?", Sampling(max_new_tokens=9)))
    assert not written
    next(pieces)
    assert len(written) <= 2
    before = threading.active_count()
    pieces.close()
    assert threading.active_count() == before - 1


def test_two_replies_are_written_in_turn_as_each_alone(model, chat):
    other = tiny.model(seed=1)
    sampling = Sampling(max_new_tokens=8)
    alone = [whole(ReplyStream(m, chat, "Who?", sampling)) for m in (model, other)]
    streams = [ReplyStream(m, chat, "Who?", sampling) for m in (model, other)]
    pieces = [iter(stream) for stream in streams]
    texts = ["", ""]
    for _ in range(9):
        for i in (0, 1):
            texts[i] += next(pieces[i], "")
    assert [(t, s.reply) for t, s in zip(texts, streams, strict=True)] == alone


def test_a_seed_decides_what_is_drawn(model, chat):
    sampling = Sampling(max_new_tokens=10, temperature=1.5, top_k=50, top_p=0.95)
    torch.manual_seed(3)
    first = whole(ReplyStream(model, chat, "Who?", sampling))
    torch.manual_seed(3)
    assert whole(ReplyStream(model, chat, "Who?", sampling)) == first
    others = {whole(ReplyStream(model, chat, "Who?", sampling))[0] for _ in range(5)}
    assert len(others) > 1


def test_what_was_said_before_counts(model, chat):
    turns = chat.encode(Example("Hi", "abc")).ids
    example = Example("Who?", "", history=(Turn("user", "Hi"), Turn("assistant", "abc")))
    asked = ReplyStream(model, chat, example, Sampling(max_new_tokens=4))
    assert asked._prompt[: len(turns)] == turns


def test_a_question_must_leave_room(model, chat):
    with pytest.raises(UsageError, match="context of 512 tokens, but it takes"):
        ReplyStream(model, chat, "a" * 600, Sampling())
    long = "a" * 470
    used = len(chat.encode_prompt(long).ids)
    _, reply = whole(ReplyStream(model, chat, long, Sampling(max_new_tokens=500)))
    assert len(reply.text) <= 512 - used


def test_an_error_of_the_model_reaches_the_reader(chat):
    model = tiny.model()
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        whole(ReplyStream(model, chat, "Who?", Sampling()))


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"temperature": float("inf")},
        {"temperature": 1e-300},
        {"repetition_penalty": float("inf")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"top_k": 4},
    ],
)
def test_what_cannot_be_sampled_is_refused(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        Sampling(**options)
