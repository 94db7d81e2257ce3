import pytest

from mollm.demo import facts
from mollm.demo.facts import Question
from mollm.errors import UsageError


@pytest.mark.parametrize(
    ("accepted", "answer"),
    [
        ("Bogotá", "The capital is Bogota."),
        ("Brasília", "BRASILIA"),
        ("New Delhi", "It is **New-Delhi**!"),
        ("H2O", "Water is H₂O"),
        ("7", "There are 7 days."),
        ("Washington", "Washington, D.C."),
    ],
)
def test_right_answers(accepted, answer):
    assert Question("x", "?", (accepted,)).is_answered_by(answer)


@pytest.mark.parametrize(
    ("accepted", "answer"),
    [
        ("Rome", "The capital of Romania"),
        ("7", "There are 17 of them"),
        ("Bern", "Bernard"),
        ("Oslo", ""),
        ("Mexico City", "Mexico"),
        ("Au", "Aurum"),
    ],
)
def test_wrong_answers(accepted, answer):
    assert not Question("x", "?", (accepted,)).is_answered_by(answer)


def test_the_spelling_that_was_used_is_found():
    question = facts.capital_question("Ukraine")
    assert question.spelling_in("It is Kiev.") == "Kiev"
    assert question.spelling_in("It is Kyiv.") == "Kyiv"
    assert question.spelling_in("It is Lviv.") is None


def test_questions_are_well_formed():
    assert facts.capital_question("Japan", facts.TRAIN_FORMS[0]).text == (
        "What is the capital of Japan?"
    )
    assert "the Netherlands" in facts.capital_question("Netherlands").text
    assert facts.CAPITALS.keys() >= facts.WITH_ARTICLE
    assert set(facts.ALIASES.values()) <= facts.CAPITALS.keys()
    assert all(all(a) and a for a in (facts.GENERAL | facts.EVERYDAY).values())
    assert len(facts.questions_of(facts.GENERAL)) == len(facts.GENERAL)


def test_the_quiz_is_not_trained_on():
    trained = {facts.plain(text) for text in facts.EVERYDAY}
    assert trained.isdisjoint(facts.plain(text) for text in facts.GENERAL)
    assert facts.TEST_FORM not in facts.TRAIN_FORMS


def test_countries_are_found_whatever_their_case():
    names = [" japan", "The Netherlands", "USA", "FRANCE", "Japan", ""]
    assert facts.find_countries(names) == ["Japan", "Netherlands", "United States", "France"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Frnace", "did you mean France"),
        ("Atlantis", "but got 'Atlantis'"),
        ("qqqq", "the quiz has"),
    ],
)
def test_an_unknown_country_is_refused_with_a_way_out(name, words):
    with pytest.raises(UsageError, match=words) as caught:
        facts.find_countries(["Japan", name])
    assert name in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_no_country_at_all_is_refused():
    with pytest.raises(UsageError, match="at least one country"):
        facts.find_countries(["", " "])
