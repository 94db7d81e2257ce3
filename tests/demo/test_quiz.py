import pytest
import tiny
import torch

from mollm.data.chat import ChatFormat
from mollm.demo import quiz as quiz_module
from mollm.demo.facts import Question
from mollm.demo.quiz import Score, quiz
from mollm.evaluation import generation
from mollm.evaluation.generation import Reply, ask

QUESTIONS = ["Short?", "A much longer question, is it not, with many more words?", "Why? Why?"]


@pytest.fixture
def chat():
    return ChatFormat(tiny.tokenizer())


@pytest.mark.usefixtures("in_float32")
def test_answers_do_not_depend_on_the_batch(chat):
    model = tiny.model()
    alone = ask(model, chat, QUESTIONS, batch_size=1, max_new_tokens=8)
    together = ask(model, chat, QUESTIONS, batch_size=40, max_new_tokens=8)
    assert alone == together
    assert len(together) == len(QUESTIONS)


@pytest.mark.usefixtures("in_float32")
def test_an_answer_is_what_follows_the_prompt(chat):
    model = tiny.model(seed=3)
    prompt = torch.tensor([chat.encode_prompt(QUESTIONS[0]).ids])
    expected = []
    for _ in range(6):
        ids = torch.cat([prompt, torch.tensor([expected], dtype=torch.long)], dim=1)
        expected.append(int(model(input_ids=ids).logits[0, -1].argmax()))
    (reply,) = ask(model, chat, QUESTIONS[:1], max_new_tokens=6)
    wanted = chat.tokenizer.decode(expected, skip_special_tokens=True)
    assert reply.text == " ".join(wanted.split())


def test_a_reply_that_ended_its_turn_is_complete(chat):
    end = chat.end_id
    letters = chat.tokenizer("yes", add_special_tokens=False)["input_ids"]
    stops = frozenset({end})
    for plain in (True, False):
        ended, open_end = ([*letters, end, end, 7], True), (letters, False)
        for ids, complete in (ended, open_end):
            assert generation._read(chat, ids, stops, plain) == Reply("yes", complete=complete)
    assert str(Reply("yes", complete=False)) == "yes …"


def test_scores():
    questions = tuple(Question(s, s, (s,)) for s in ("Oslo", "Lima", "Rome"))
    score = Score(questions, (Reply("oslo", True), Reply("Paris", True), Reply("Rome!", False)))
    assert score.right == (True, False, True)
    assert score.accuracy == pytest.approx(2 / 3)
    assert score.known() == ["Oslo", "Rome"]
    assert score.only(["Rome", "Lima"]).right == (True, False)


def test_the_quiz_asks_every_question_in_order(chat, monkeypatch):
    asked = []

    def parrot(model, chat, texts, **options):
        asked.extend(texts)
        return [Reply(text, True) for text in texts]

    monkeypatch.setattr(quiz_module, "ask", parrot)
    questions = [Question("a", "Oslo?", ("Oslo",)), Question("b", "Lima?", ("Rome",))]
    assert quiz(None, chat, questions).right == (True, False)
    assert asked == ["Oslo?", "Lima?"]
