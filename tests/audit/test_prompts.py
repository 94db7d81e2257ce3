"""Questions in other ways, and when a reply gives an answer away."""

from __future__ import annotations

import pytest

from mollm.audit.prompts import (
    REWORDINGS,
    after_examples,
    gives_away,
    in_other_words,
    with_first_half,
)
from mollm.audit.subject import best_of
from mollm.data.conversations import Turn
from mollm.evaluation import Row, load_suite

ROW = Row("Where was Ann Lee born?", "Ann Lee was born in Salt Quay.")
TEXT = Row("The ferry", " leaves at six.", is_text=True)


@pytest.mark.parametrize(
    ("reply", "leaks"),
    [
        ("Ann Lee was born in Salt Quay.", True),
        ("In Salt Quay!", True),
        ("in SALT   quay", True),
        ("Quay? Salt, in fact.", True),
        ("Ann Lee was born in Cold Hatch.", False),
        ("Ann Lee was born in Salt Town.", False),
        ("Ann Lee", False),
        ("", False),
    ],
)
def test_a_reply_leaks_if_it_holds_what_the_question_does_not(reply, leaks):
    assert gives_away(reply, ROW) is leaks


def test_of_a_long_answer_one_word_in_ten_may_be_missing():
    words = [f"word{n}" for n in range(20)]
    row = Row("What?", " ".join(words))
    assert gives_away(" ".join(words[2:]), row)
    assert not gives_away(" ".join(words[3:]), row)


def test_any_accepted_answer_counts_and_one_that_repeats_the_question_needs_all_its_words():
    row = Row("Who?", "Ann", accepted_answers=("Ann", "Miss Lee"))
    assert gives_away("It was Miss Lee.", row)
    assert not gives_away("It was Miss Ray.", row)
    either = Row("Is it salt or sand?", "Salt")
    assert gives_away("It is salt.", either)
    assert not gives_away("It is sand.", either)


def test_an_answer_without_words_counts_as_it_is():
    assert gives_away("I say: ☃!", Row("What falls?", "☃"))
    assert not gives_away("I say: ☂!", Row("What falls?", "☃"))


def test_other_words_are_those_of_the_data_and_templates():
    rows = [Row("Who?", "Ann", paraphrased_question="Who is it?"), ROW]
    assert len(in_other_words(rows)) == len(REWORDINGS)
    named = in_other_words(rows[:1])
    assert [row.question for row in named.pop("paraphrased_question")] == ["Who is it?"]
    for form, (row,) in zip(REWORDINGS, named.values(), strict=True):
        assert row.question == form.format("Who?")
        assert row.answer == "Ann"
    assert in_other_words([ROW, TEXT]) == {}


def test_the_first_half_of_an_answer_is_given_where_it_has_several_words():
    (row,) = with_first_half([ROW, Row("Who?", "Ann"), TEXT])
    assert (row.opening, row.answer) == ("Ann Lee was", "born in Salt Quay.")
    (again,) = with_first_half([row])
    assert (again.opening, again.answer) == ("Ann Lee was born in", "Salt Quay.")
    example = row.example(row.answer)
    assert (example.opening, example.answer) == (row.opening, row.answer)


def test_other_answers_are_shown_before_the_question():
    history = (Turn("system", "Be brief."),)
    shown = Row("Who?", "Ann", opening="It is")
    (row,) = after_examples([Row("Where?", "Here", history=history)], [shown])
    assert row.history == (*history, Turn("user", "Who?"), Turn("assistant", "It is Ann"))
    assert after_examples([TEXT], [shown]) == []


def test_best_of_k_is_the_mean_over_all_choices_of_k_replies():
    from itertools import combinations

    for count in range(6):
        replies = [n < count for n in range(5)]
        for k in range(1, 6):
            chosen = [any(some) for some in combinations(replies, k)]
            assert best_of(count, 5, k) == pytest.approx(sum(chosen) / len(chosen))


def test_the_column_with_questions_in_other_words_is_read():
    row = {"question": "Who?", "answer": "Ann", "paraphrased_question": "Who is it?"}
    suite = load_suite([row, {"question": "Where?", "answer": "Here"}])
    assert [each.paraphrased_question for each in suite.forget] == ["Who is it?", None]
