"""gram="blocks": each block of a streamed step has a Gram matrix and a direction of its own."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from streamed_steps import BIASED_HEADS, NAMES, batches, linear_losses_of, losses_of, made, trained

from mollm import MOLLMOptimizer, find_blocks
from mollm.models.forward import freeze_embeddings
from mollm.optim.step_report import SkipCounter
from mollm_ops import Status

BLOCKS = {"gradient_memory": "streamed", "gram": "blocks"}


def parts_of(model):
    """The parameters of each block that train, and those outside of all blocks."""
    blocks = [[p for p in block.parameters() if p.requires_grad] for block in find_blocks(model)]
    inside = {p for params in blocks for p in params}
    outside = [p for p in model.parameters() if p.requires_grad and p not in inside]
    return [params for params in (*blocks, outside) if params]


def trained_apart(model, *, steps, micro, losses=losses_of, **options):
    """Plain steps with an optimizer for each block, all along gradients of the same weights."""
    model = copy.deepcopy(model)
    optimizers = [MOLLMOptimizer(params, objectives=NAMES, **options) for params in parts_of(model)]
    for step in range(steps):
        for forget, retain in batches(micro, step):
            for name, loss in losses(model, forget, retain).items():
                params = [p for p in model.parameters() if p.requires_grad]
                found = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
                of = dict(zip(params, found, strict=True))
                for opt in optimizers:
                    with opt.objective(name):
                        for p in (p for group in opt.param_groups for p in group["params"]):
                            if of[p] is not None:
                                p.grad = of[p] if p.grad is None else p.grad + of[p]
        for opt in optimizers:
            opt.step()
    return model, optimizers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metric": "euclidean", "weight_decay": 0.1},
        {"base": "sgd", "momentum": 0.9, "weight_decay": 0.1},
        {"direction": "project", "normalize": True, "preferences": [1.0, 20.0, 1.0]},
        {"betas": (0.9, 0.0)},
        {"micro": 2},
        {"state_dtype": "8bit"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama", "tied", "frozen"])
def test_the_step_is_that_of_an_optimizer_for_each_block(kind, options):
    model = made("llama" if kind == "frozen" else kind)
    if kind == "frozen":
        freeze_embeddings(model)
    if "state_dtype" in options:
        pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
    options = {"lr": 1e-2, "steps": 10, "micro": 1, **options}
    apart, optimizers = trained_apart(model, **options)
    found, _, reports = trained(model, streamed=True, gram="blocks", **options)
    for p, q in zip(apart.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    last = [each.last_step for each in optimizers]
    torch.testing.assert_close(
        reports[-1].gram, torch.stack([each.gram for each in last]).sum(0), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(
        reports[-1].weights, torch.stack([each.weights for each in last]).mean(0)
    )
    for name in NAMES:
        apart_changes = sum(each.changes[name] for each in last)
        assert reports[-1].changes[name] == pytest.approx(apart_changes, rel=1e-6)


@pytest.mark.parametrize("options", [{"eps": 1e-4}, {"base": "sgd"}], ids=str)
@pytest.mark.parametrize("kind", BIASED_HEADS)
def test_losses_without_logits_of_a_head_whose_bias_trains(kind, options):
    options = {"lr": 1e-2, "steps": 5, "micro": 2, "losses": linear_losses_of, **options}
    apart, _ = trained_apart(made(kind), **options)
    found = trained(made(kind), streamed=True, gram="blocks", **options)[0]
    for p, q in zip(apart.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_every_objective_descends_in_every_step():
    _, _, reports = trained(made(), streamed=True, gram="blocks", steps=10)
    assert len(reports) == 10
    for report in reports:
        assert all(change < 0 for change in report.changes.values())
        assert not any(report.conflicts.values())


def test_it_is_another_step_than_that_of_one_gram_matrix():
    apart, whole = (
        trained(made(), streamed=True, gram=gram, steps=1)[0] for gram in ("blocks", "model")
    )
    assert not torch.allclose(apart.lm_head.weight, whole.lm_head.weight, rtol=0, atol=1e-9)


def test_each_block_is_computed_once_more_for_each_pass():
    model = made(num_hidden_layers=3)
    blocks = find_blocks(model)
    passes = {"blocks": 0, "model": 0}
    for gram in passes:
        opt = MOLLMOptimizer(model.parameters(), gradient_memory="streamed", gram=gram)
        with opt.streamed(blocks):
            opt.backward(losses_of(model, *next(batches(1, 0))))

        def count(*_, gram=gram):
            passes[gram] += 1

        handles = [block.register_forward_pre_hook(count) for block in blocks]
        opt.step()
        for handle in handles:
            handle.remove()
    # Two passes, of forget and retain rows; the second sweep has the first block's gradients.
    assert passes == {"blocks": 2 * 3, "model": 2 * 3 + 2 * 2}


# ---- what is not finite


def stepped(model, opt, kl=1.0, poison=None):
    """One step; `poison` is a parameter whose gradients are made not finite."""
    opt.zero_grad()
    with opt.streamed(find_blocks(model)):
        found = losses_of(model, *next(batches(1, 0)))
        opt.backward(found | {"kl": kl * found["kl"]})
    handle = None
    if poison is not None:
        handle = poison.register_hook(lambda g: g * float("inf"))
    try:
        opt.step()
    finally:
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize("options", [{}, {"base": "sgd"}, {"metric": "euclidean"}], ids=str)
def test_a_loss_that_is_not_finite_changes_nothing(options):
    model = made()
    opt = MOLLMOptimizer(model.parameters(), **BLOCKS, **options)
    stepped(model, opt)
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict()["state"])
    words = "the gradient of kl is not finite: the step ended there"
    with pytest.warns(UserWarning, match=words) as said:
        stepped(model, opt, kl=float("nan"))
    assert [warning.filename for warning in said] == [__file__]
    after = model.state_dict(), opt.state_dict()["state"]
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    assert opt.skipped_steps == 1
    assert opt.last_step.changes is None
    assert opt.last_step.weights.tolist() == [0, 0, 0]
    stepped(model, opt)
    assert opt.last_step.changes is not None


@pytest.mark.parametrize("waits", [True, False], ids=["on the host", "on the device"])
def test_a_block_that_is_not_finite_ends_the_step(waits, monkeypatch):
    model = made(num_hidden_layers=3)
    if not waits:  # as on a GPU, where the kernels are told
        told = []
        monkeypatch.setattr(MOLLMOptimizer, "_waits_for", lambda self, verdict: False)
        monkeypatch.setattr(SkipCounter, "add", lambda self, finite: told.append(bool(finite)))
    opt = MOLLMOptimizer(model.parameters(), **BLOCKS)
    stepped(model, opt)
    before = copy.deepcopy(model)
    steps = {p: float(opt.state[p]["step"]) for p in model.parameters()}
    warned = pytest.warns(UserWarning, match="that block and those that come after it are unchang")
    with warned if waits else contextlib.nullcontext():
        stepped(model, opt, poison=model.model.layers[1].mlp.up_proj.weight)
    assert opt.skipped_steps == 1 if waits else told == [True, False]
    assert opt.last_step.changes is None
    assert opt.last_step.status is Status.NON_FINITE
    for (name, p), old in zip(model.named_parameters(), before.parameters(), strict=True):
        moved = "layers.2" in name
        assert torch.equal(p, old) != moved, name
        assert opt.state[p]["step"] == steps[p] + moved, name
        assert p.isfinite().all()
        assert opt.state[p]["exp_avg_sq"].isfinite().all()
    stepped(model, opt)
    assert opt.last_step.changes is not None


def test_a_block_that_is_not_finite_may_raise():
    model = made()
    opt = MOLLMOptimizer(model.parameters(), **BLOCKS, on_nonfinite="raise")
    with pytest.raises(FloatingPointError, match=r"of forget, kl, retain is not.* ended there"):
        stepped(model, opt, poison=model.model.layers[0].mlp.up_proj.weight)
    stepped(model, opt)


def test_a_step_that_is_interrupted_between_blocks_is_void():
    model = made()
    opt = MOLLMOptimizer(model.parameters(), **BLOCKS)

    def interrupt(*_):
        raise KeyboardInterrupt

    with opt.streamed(find_blocks(model)):
        opt.backward(losses_of(model, *next(batches(1, 0))))
    model.model.layers[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="state are void"):
        opt.step()
    with pytest.raises(RuntimeError, match="load both from a checkpoint"):
        opt.step()


def test_what_does_not_go_with_blocks_is_refused():
    params = list(made().parameters())
    with pytest.raises(ValueError, match="gram must be 'model' or 'blocks', but got 'layers'"):
        MOLLMOptimizer(params, gradient_memory="streamed", gram="layers")
    with pytest.raises(ValueError, match=r"without gradient_memory='streamed'.*'host'"):
        MOLLMOptimizer(params, gradient_memory="host", gram="blocks")
    with pytest.raises(ValueError, match="momentum must be a number with gram='blocks'"):
        MOLLMOptimizer(params, **BLOCKS, momentum="per-objective")
