"""What is forgotten for good: the facts of SmolLM2, the losses that were tried, the table."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch

from mollm.data.chat import ChatFormat, Example, collate
from mollm.demo import facts as demo_facts
from mollm.demo.quiz import Score
from mollm.evaluation.generation import Reply
from mollm.methods import answers_of
from mollm.models import loading

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import lasting
from quality import facts, ideas, knowledge, lasting_facts
from quality.case import measure
from quality.knowledge import KINDS, Fact, divide, read_facts


def test_every_fact_is_of_a_kind_and_no_two_of_a_kind_have_one_answer():
    facts = read_facts()
    assert {fact.kind for fact in facts} == set(KINDS)
    answers = Counter((fact.kind, fact.accepted[0]) for fact in facts)
    assert set(answers.values()) == {1}


def test_no_question_gives_its_answer_away():
    for fact in read_facts():
        for form in (KINDS[fact.kind].asked, *KINDS[fact.kind].trained):
            question = fact.question(form)
            assert not question.is_answered_by(question.text), question


def test_facts_are_dealt_by_kind_each_once():
    known = [(fact, fact.accepted[0]) for fact in read_facts()]
    parts = divide(known, random.Random(0))
    kinds = [Counter(fact.kind for fact, _ in part) for part in parts.values()]
    assert kinds[0] == kinds[1] == kinds[2]
    assert len(kinds[0]) == len(KINDS)
    assert [len(part) for part in parts.values()] == [30, 30, 30]
    dealt = [fact for part in parts.values() for fact, _ in part]
    assert len(set(dealt)) == 90
    assert divide(known, random.Random(0)) == parts != divide(known, random.Random(1))
    with pytest.raises(ValueError, match="must know 30 facts"):
        divide(known[:80], random.Random(0))


def test_further_questions_are_nowhere_else():
    further = {question.text for question in knowledge.read_further()}
    trained = {form.format(f.subject) for f in read_facts() for form in KINDS[f.kind].trained}
    asked = {KINDS[f.kind].asked.format(f.subject) for f in read_facts()}
    assert len(further) == 129
    assert not further & (demo_facts.GENERAL.keys() | demo_facts.EVERYDAY.keys() | trained | asked)


@pytest.fixture
def task(tmp_path, monkeypatch):
    """That of a model which answers every question right."""
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    source = loading.find_model(str(tmp_path / "tiny"))
    monkeypatch.setattr(loading, "find_model", lambda name: source)

    def quiz(model, chat, questions, batch_size=0, sampled=False):
        told = 'I say "{}".' if sampled else "It is {}."
        replies = tuple(Reply(told.format(q.accepted[0]), True) for q in questions)
        return Score(tuple(questions), replies)

    monkeypatch.setattr(knowledge, "quiz", quiz)
    return knowledge.make_case(0, torch.device("cpu"), tmp_path / "cache")


def test_a_task_asks_otherwise_than_it_trains(task):
    case = task.case
    sizes = {n: sum(len(b.labels) for b in batches) for n, batches in case.groups.items()}
    assert sizes.pop("outside") > 60
    assert sizes == {"forget": 30, "heldout": 30}
    assert (len(case.ten.labels), sum(len(b.labels) for b in case.others)) == (10, 20)
    forget, retain = task.records["forget"], task.records["retain"]
    assert (len(forget), len(retain)) == (90, 135)
    asked = {KINDS[f.kind].asked.format(f.subject) for f in read_facts()}
    trained = {record.prompt for record in (*forget, *retain)}
    assert not asked & trained
    assert not {record.prompt for record in forget} & {record.prompt for record in retain}
    assert task.answered(case.model) == {
        f"{group} answered": 1.0 for group in ("forget", "others", "general", "further")
    }


def test_the_models_own_words_end_with_the_answer(task):
    said, told = task.records["said"], task.records["forget"]
    assert len(said) == 2 * len(told)  # the likeliest and those drawn, each once
    answers = {(r.prompt, r.answer) for r in told}
    for record in said:
        assert record.opening in ("It is", "I say")
        assert (record.prompt, record.answer.removeprefix('"')) in answers
        assert record.answer.startswith('"') == (record.opening == "I say")
        assert not record.closed


def test_what_is_known_is_asked_once(task, tmp_path, monkeypatch):
    monkeypatch.setattr(knowledge, "quiz", None)
    again = knowledge.make_case(0, torch.device("cpu"), tmp_path / "cache")
    assert again.records == task.records


def test_an_everyday_question_for_a_fact_of_the_table_is_not_trained_on(task):
    assert Fact("symbol", "iron", ("Fe",)) in read_facts()
    prompts = Counter(record.prompt for record in task.records["retain"])
    assert prompts["What is the chemical symbol for iron?"] <= 1  # only as a fact to retain


@pytest.fixture
def answers():
    chat = ChatFormat(tiny.tokenizer())
    rows = [chat.encode(Example("Who?", answer)) for answer in ("Ann.", "Not Bob, I think.")]
    return answers_of(tiny.model(), collate(rows, chat.pad_id))


def test_the_margin_is_that_on_log_odds(answers):
    logits = answers.hidden.double() @ answers.weight.double().T
    p = logits.softmax(1).gather(1, answers.target[:, None])[:, 0]
    for margin in (0.5, 3.0, 8.0):
        expected = ((p / (1 - p)).log() + margin).clamp(min=0).mean()
        found = ideas.margin_on_log_odds(answers, None, margin=margin)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_floor_ends_the_forgetting_of_an_answer(answers):
    logits = answers.hidden.double() @ answers.weight.double().T
    nll = -logits.log_softmax(1).gather(1, answers.target[:, None])[:, 0]
    each = torch.stack([nll[answers.sequence == row].mean() for row in (0, 1)])
    floor = float(each.detach().mean())  # between the two
    found = ideas.ascent_to_a_floor(answers, None, floor=floor)
    assert found.item() == pytest.approx(-each.clamp(max=floor).mean().item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(found, answers.hidden)
    moved = [bool(gradient[answers.sequence == row].abs().sum() > 0) for row in (0, 1)]
    assert moved == (each < floor).tolist()


def test_the_table_has_the_columns_of_its_task():
    rows = [
        {"seed": seed, "settings": "mollm", "forget": 0.1 * seed, "others at 5e-05": 0.5,
         "forget answered": 0.0, "seconds": 1.0}
        for seed in (0, 1)
    ]  # fmt: skip
    (line,) = lasting.table(lasting.TASKS["knowledge"], rows)
    assert line.keys() == {"settings", "seeds", "forget", "forget answered"}
    assert line["forget"] == "0.050 ±0.635"
    (line,) = lasting.table(lasting.TASKS["tofu"], rows)
    assert line.keys() == {"settings", "seeds", "forget", "others at 5e-05"}


def test_an_unknown_setting_is_refused(capsys):
    with pytest.raises(SystemExit):
        lasting.main(["--task", "knowledge", "--settings", "nothing"])
    assert "nothing" in capsys.readouterr().err


def test_synthetic_facts_are_relearnt_on_rows_that_the_forget_loss_does_not_see():
    rng = random.Random(0)
    case = facts.make_case(4, seed=0)
    batches = case.draw(rng)
    seen, taught = facts.relearning_apart(batches, rng)
    pairs = [
        {(int(s), int(r)) for s, r in zip(some.subject, some.relation, strict=True)}
        for some in (seen["forget"], taught, batches["forget"])
    ]
    assert not pairs[0] & pairs[1]
    assert pairs[0] | pairs[1] == pairs[2]
    assert all(seen[name] is batches[name] for name in case.objectives[1:])


def test_a_network_that_never_learnt_the_facts_knows_all_others():
    case = facts.make_case(2, seed=0)
    left = measure(case, facts.never_learnt(2, seed=0), case.groups)
    assert left["forget"] < 0.5
    assert left["heldout"] > 0.99


@pytest.mark.parametrize("relearn_steps", [0, 2])
def test_synthetic_facts_are_forgotten_without_a_conflict(relearn_steps):
    case = facts.make_case(3, seed=0)
    settings = {
        "method": "mollm",
        "learning_rate": 3e-3,
        "max_steps": 12,
        "relearn_steps": relearn_steps,
        "relearn_lr": 1e-3,
    }
    model, run = lasting_facts.unlearned(case, settings, 0)
    left = measure(case, model, case.groups)
    assert left["forget"] < 0.5 < left["heldout"]
    assert run["conflicts"] == 0


@pytest.mark.parametrize("seed", range(20))
def test_the_nearest_direction_with_a_margin_is_feasible_and_the_nearest(seed):
    quadprog = pytest.importorskip("quadprog", reason="the solver that checks it is not installed")
    rng = torch.Generator().manual_seed(seed)
    g = torch.randn(3, 5, generator=rng, dtype=torch.float64)
    weights = ideas.nearest_with_a_margin(g @ g.T, tau=0.5)
    d = weights @ g
    bound = 0.5 * g[1:].square().sum(1)
    assert bool((g[1:] @ d >= bound - 1e-9).all())
    exact = quadprog.solve_qp(
        torch.eye(5, dtype=torch.float64).numpy(), g[0].numpy(), g[1:].T.numpy(), bound.numpy()
    )[0]
    torch.testing.assert_close(d, torch.from_numpy(exact))
