"""Every method's loss and options against the formulas of its source, written out in float64."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from answer_cases import answers, per_sequence

from mollm.data.chat import ChatFormat, Example, collate
from mollm.methods import METHODS, answers_of, find_method, unlearning_cross_entropy
from mollm.methods.method import PREFERENCES


def token_log_probs(a):
    """log p of every token, from its own row of logits."""
    logits = a.hidden @ a.weight.T + a.bias
    return torch.stack([z[t] - z.exp().sum().log() for z, t in zip(logits, a.target, strict=True)])


def by_sequence(a):
    logs = token_log_probs(a)
    return [logs[a.sequence == i] for i in range(a.count)]


def ascent(model, reference):
    return sum(token_log_probs(model)) / 8


def npo(model, reference):
    terms = []
    for mine, theirs in zip(by_sequence(model), by_sequence(reference), strict=True):
        ratio = (mine.sum() - theirs.sum().detach()).exp()
        terms.append(2 / 0.1 * (1 + ratio**0.1).log())
    return sum(terms) / 3


def simnpo(model, reference):
    terms = [2 / 4.5 * (4.5 * logs.mean()).exp().log1p() for logs in by_sequence(model)]
    return sum(terms) / 3


def uce(model, reference):
    return sum(-(1 - (1 - 1e-4) * log.exp()).log() for log in token_log_probs(model)) / 8


def dpo(model, reference):
    terms = []
    for i in range(3):
        gains = []
        for mine, theirs in ((model.alternative, reference.alternative), (model, reference)):
            gains.append(by_sequence(mine)[i].sum() - by_sequence(theirs)[i].sum().detach())
        terms.append(2 / 0.1 * (1 + (0.1 * (gains[1] - gains[0])).exp()).log())
    return sum(terms) / 3


def soft_cross_entropy(target, logits):
    return -(target.detach() * (logits - logits.logsumexp(0))).sum()


def logits_of(a):
    return a.hidden @ a.weight.T + a.bias


def undial(model, reference):
    total = 0
    for z, other, t in zip(logits_of(model), logits_of(reference), model.target, strict=True):
        lowered = other.exp() / other.exp().sum()
        lowered = torch.where(torch.arange(11) == t, lowered * math.exp(-10), lowered)
        total += soft_cross_entropy(lowered / lowered.sum(), z)
    return total / 8


def ceu(model, reference):
    total, seen = 0, set()
    for z, t, i in zip(logits_of(model), model.target, model.sequence.tolist(), strict=True):
        if i in seen:
            others = torch.where(torch.arange(11) == t, 0.0, z.exp())
            total += soft_cross_entropy(others / others.sum(), z)
        seen.add(i)
    return total / 5


def wga(model, reference):
    return sum(log.exp().detach() * log for log in token_log_probs(model)) / 8


def satimp(model, reference):
    logs = token_log_probs(model)
    weights = [(p**5 * (1 - p)).detach() for p in (log.exp() for log in logs)]
    return sum(w * log for w, log in zip(weights, logs, strict=True)) / 8


def pdu(model, reference):
    return sum((z.max() - z.sum() / 11) ** 2 for z in logits_of(model)) / 8


def rmu(model, reference):
    drawn = torch.rand(10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = 6.5 * drawn / (drawn**2).sum().sqrt()
    return per_sequence(model, torch.stack([((h - noise) ** 2).mean() for h in model.states]))


FORMULAS = {
    "ga": ascent,
    "graddiff": ascent,
    "npo": npo,
    "simnpo": simnpo,
    "dpo": dpo,
    "idkdpo": dpo,
    "altpo": dpo,
    "undial": undial,
    "ceu": ceu,
    "wga": wga,
    "satimp": satimp,
    "pdu": pdu,
    "rmu": rmu,
    "task-arithmetic": lambda model, reference: -ascent(model, reference),
    "sago": ascent,
    "dualoptim-plus": npo,
}


@pytest.mark.parametrize("name", METHODS)
def test_the_forget_loss_and_its_gradient_are_those_of_the_formula(name):
    model, reference = answers(1), answers(2)
    loss = find_method(name).forget_loss(model, lambda: reference)
    expected = FORMULAS.get(name, uce)(model, reference)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    found, wanted = (torch.autograd.grad(x, model.hidden)[0] for x in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)
    assert reference.hidden.grad is None


def test_npo_starts_as_ascent_on_the_sum_of_the_tokens():
    model = answers(1)
    loss = find_method("npo").forget_loss(model, lambda: model)
    assert loss.item() == pytest.approx(20 * math.log(2))
    (found,) = torch.autograd.grad(loss, model.hidden)
    likelihood = sum(token_log_probs(model)) / 3
    torch.testing.assert_close(found, torch.autograd.grad(likelihood, model.hidden)[0])


def test_preferences_leave_out_what_a_source_leaves_out():
    kept = {name: method.preferences for name, method in METHODS.items()}
    assert kept["ga"] == (1, 0, 0)
    assert kept["graddiff"] == kept["npo"] == (1, 0, 1)
    assert kept["simnpo"] == (0.125, 0, 1)
    assert kept["undial"] == kept["ceu"] == kept["task-arithmetic"] == (1, 0, 0)
    assert kept["satimp"] == (1, 0, 0.1)
    assert kept["pdu"] == (1, 0, 100)
    assert kept["rmu"] == (1, 0, 1200)
    assert {kept[name] for name in ("sum", "pcgrad", "retain-first", "forget-first")} == {
        PREFERENCES
    }


def test_answers_know_their_sequences_whatever_the_padding():
    chat = ChatFormat(tiny.tokenizer())
    rows = [chat.encode(Example(*pair)) for pair in (("Who?", "Ada"), ("And when?", "In 1843."))]
    model = tiny.model().double()
    alone = [answers_of(model, collate([row], chat.pad_id)).log_likelihoods()[0] for row in rows]
    together = answers_of(model, collate(rows, chat.pad_id))
    torch.testing.assert_close(together.log_likelihoods(), torch.stack(alone), rtol=1e-2, atol=0)
    assert together.lengths().tolist() == [4, 9]


def test_eps_is_an_option_of_the_unlearning_cross_entropy():
    model = answers(1)
    with_half = unlearning_cross_entropy(model, lambda: model, eps=0.5)
    expected = sum(-(1 - 0.5 * log.exp()).log() for log in token_log_probs(model)) / 8
    torch.testing.assert_close(with_half, expected)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"method must be one of ga, .*, but got 'best'\."):
        find_method("best")
