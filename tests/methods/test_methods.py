"""Every method's loss and options against the formulas of its source, written out in float64."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from mollm.data.chat import ChatFormat, Example, collate
from mollm.methods import METHODS, AnswerTokens, answers_of, find_method, unlearning_cross_entropy
from mollm.methods.method import PREFERENCES

LENGTHS = (3, 1, 4)


def answers(seed):
    """Three answers of 3, 1 and 4 tokens whose rows are not in order."""
    torch.manual_seed(seed)
    sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    hidden = (torch.randn(8, 5, dtype=torch.float64) / 4).requires_grad_()
    weight, bias = torch.randn(11, 5, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    target = torch.arange(8) % 11
    return AnswerTokens(hidden, weight, bias, target, sequence[order], 3)


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


FORMULAS = {"ga": ascent, "graddiff": ascent, "npo": npo, "simnpo": simnpo}


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
