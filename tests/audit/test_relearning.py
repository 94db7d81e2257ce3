"""Relearning: the step against plain Torch, and weights that come back bit for bit."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F

from mollm.audit.relearning import RATE_FACTOR, STEPS, put_back, taught
from mollm.data.chat import ChatFormat, Example, collate
from mollm.evaluation.scores import score_rows
from mollm.methods import answers_of
from mollm.training.relearning import relearn

CHAT = ChatFormat(tiny.tokenizer())
ROWS = [CHAT.encode(Example("Who?", "a" * n)) for n in (1, 3, 6, 2, 5)]


def score(model, rows=ROWS):
    return [each.mean_nll for each in score_rows(model, rows, pad_id=CHAT.pad_id)]


def test_the_cross_entropy_is_the_mean_over_answer_tokens():
    model = tiny.model().double()
    batch = collate(ROWS, CHAT.pad_id)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    torch.testing.assert_close(answers_of(model, batch).cross_entropy(), plain)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_weights_learn_as_by_ten_steps_of_plain_adamw(batch_size):
    model, plain = tiny.model().double(), tiny.model().double()
    plain.get_input_embeddings().requires_grad_(False)
    trained = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0)
    batch = collate(ROWS, CHAT.pad_id)
    for _ in range(10):
        optimizer.zero_grad()
        logits = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()).backward()
        optimizer.step()
    how = {"pad_id": CHAT.pad_id, "kind": "full", "lr": 1e-3, "batch_size": batch_size}
    with taught(model, ROWS, **how):
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", RATE_FACTOR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_afterwards_the_model_is_as_it_was(kind, dtype):
    model = tiny.model().to(dtype).train()
    model.get_output_embeddings().requires_grad_(False)
    frozen = [p.requires_grad for p in model.parameters()]
    before, modules = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    known, state, ticks = score(model), torch.get_rng_state(), []
    with taught(
        model, ROWS, pad_id=CHAT.pad_id, kind=kind, lr=3e-3, after_step=lambda: ticks.append(1)
    ):
        assert sum(score(model)) < sum(known) - 0.5
    assert len(ticks) == STEPS
    assert torch.get_rng_state().equal(state)
    assert model.training
    assert [type(m) for m in model.modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert all(p.grad is None for p in model.parameters())
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert score(model) == known


def test_an_error_inside_leaves_the_model_as_it_was():
    model = tiny.model()
    before = copy.deepcopy(model.state_dict())
    for kind in RATE_FACTOR:
        with pytest.raises(ZeroDivisionError):
            with taught(model, ROWS, pad_id=CHAT.pad_id, kind=kind, lr=1e-3):
                raise ZeroDivisionError
        assert model.state_dict().keys() == before.keys()
        assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_adapters_of_one_seed_are_the_same():
    model = tiny.model()

    def learn(seed):
        with taught(model, ROWS, pad_id=CHAT.pad_id, kind="LoRA", lr=1e-3, seed=seed):
            return score(model)

    assert learn(0) == learn(0) != learn(1)


def test_losses_of_micro_batches_add_up():
    one, two = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))

    def in_parts():
        for n in (4, 5):
            (n * two.square()).sum().backward()

    relearn([one], lambda: (3 * one).square().sum().backward(), lr=0.1, steps=3)
    relearn([two], in_parts, lr=0.1, steps=3)
    torch.testing.assert_close(one, two)


def test_weights_that_were_changed_are_put_back():
    model = tiny.model()
    before = copy.deepcopy(model.state_dict())
    with put_back(model), torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 2**-20).requires_grad_(False)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", RATE_FACTOR)
def test_a_model_in_bfloat16_learns_as_its_copy_in_float32_does(kind):
    model = tiny.model().to(torch.bfloat16)
    whole = tiny.model()
    with torch.no_grad():
        for p, rounded in zip(whole.parameters(), model.parameters(), strict=True):
            p.copy_(rounded)
    how = {"pad_id": CHAT.pad_id, "kind": kind, "lr": 2e-5}
    with taught(whole, ROWS, **how):
        learnt = score(whole)
    with taught(model, ROWS, **how):
        assert score(model) == pytest.approx(learnt, rel=1e-4)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_buffers_that_were_changed_or_replaced_are_put_back():
    model = torch.nn.BatchNorm1d(2)
    before = copy.deepcopy(model.state_dict())
    with put_back(model, changed=()):
        model(torch.randn(3, 2))
        model.running_var = torch.zeros(2)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
