import copy

import pytest
import tiny
import torch

from mollm.data.chat import ChatFormat, Example, collate
from mollm.demo import facts
from mollm.demo.short_audit import audit_shortly
from mollm.methods import answers_of
from mollm.training.relearning import relearn

COUNTRIES = ("Japan", "Peru", "Norway", "Egypt", "Italy", "Chile")
SPELLING = {country: facts.CAPITALS[country][0] for country in COUNTRIES}


def taught(model, countries):
    """The model after it learnt capitals by heart."""
    chat = ChatFormat(tiny.tokenizer())
    rows = [
        chat.encode(
            Example(
                facts.capital_question(country).text,
                SPELLING[country],
                f"The capital of {country} is",
                closed=False,
            )
        )
        for country in countries
    ]
    batch = collate(rows, chat.pad_id)
    trained = [p for p in model.parameters() if p.requires_grad]
    relearn(
        trained,
        lambda: torch.autograd.backward(answers_of(model, batch).cross_entropy()),
        steps=60,
        lr=1e-2,
    )
    return model.eval()


@pytest.fixture(scope="module")
def original():
    return taught(tiny.model(), COUNTRIES)


def audited(model, original, countries=COUNTRIES):
    said = []
    found = audit_shortly(
        model, original, tiny.tokenizer(), countries, SPELLING, seed=0, say=said.append
    )
    assert len(said) == 1
    return found


def test_a_model_that_forgot_nothing_fails(original):
    before = copy.deepcopy(original.state_dict())
    found, _ = audited(original, original)
    values = {finding.name: finding.value for finding in found.findings}
    assert values["asked as in the forget set"] == 1
    assert values["taught 3 examples again"] > 0.9
    assert found.verdict == "FAIL"
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())


def test_a_model_that_never_learnt_the_capitals_gives_less_away(original):
    found, _ = audited(tiny.model().eval(), original)
    plain, *_ = found.findings
    assert plain.name == "asked as in the forget set"
    assert plain.value < 0.3


def test_too_few_facts_are_a_reason(original):
    found, reason = audited(original, original, COUNTRIES[:2])
    assert found is None
    assert "at least 4 forget rows" in reason


def test_a_ruined_model_is_a_reason(original):
    ruined = copy.deepcopy(original)
    with torch.no_grad():
        ruined.model.norm.weight.fill_(float("nan"))
    found, reason = audited(ruined, original)
    assert found is None
    assert reason
