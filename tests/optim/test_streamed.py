"""Gradients that are streamed block by block: the step is the one that holds all of them."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.distributed.fsdp
from streamed_steps import (
    BIASED_HEADS,
    KINDS,
    assert_same,
    batches,
    linear_losses_of,
    losses_of,
    made,
    moved,
    trained,
    watched,
)
from torch import nn
from torch.nn.functional import dropout
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mollm import MOLLMOptimizer, UsageError, find_blocks
from mollm.models import tape as tape_module
from mollm.models.forward import freeze_embeddings
from mollm.optim import streamed as streaming_module
from mollm.optim.directions import DIRECTIONS


def assert_equal_steps(model, limit=1e-12, **options):
    plain = trained(model, streamed=False, **options)
    assert moved(plain[0], model)
    assert_same(plain, trained(model, streamed=True, **options), limit)


@pytest.mark.parametrize("metric", ["base", "euclidean"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_rule_in_both_metrics(direction, metric):
    assert_equal_steps(made(), direction=direction, metric=metric)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metric": "euclidean", "weight_decay": 0.1},
        {"momentum": "per-objective"},
        {"momentum": "per-objective", "metric": "euclidean"},
        {"base": "sgd", "momentum": 0.9, "weight_decay": 0.1},
        {"normalize": True, "preferences": [1.0, 20.0, 1.0]},
        {"names": ("forget", "retain"), "weight_decay": 0.1},
        {"micro": 3},
        {"micro": 2, "at_once": False},
        {"track_conflicts": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_model(kind, options):
    if kind == "gpt2" and "base" not in options:
        # Its key biases have gradients of rounding alone, which AdamW would make steps of.
        options = options | {"eps": 1e-4}
    assert_equal_steps(made(kind).train(kind != "llama"), **options)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_frozen_embeddings(kind):
    model = made(kind)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.requires_grad_(False)
    assert_equal_steps(model, micro=2, eps=1e-4)


def test_frozen_blocks():
    """The lowest ones, one in between, and a block of which one matrix trains."""
    model = made()
    model.get_input_embeddings().requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    assert_equal_steps(model)
    model = made()
    model.model.layers[1].requires_grad_(False)
    assert_equal_steps(model)
    model.model.layers[1].mlp.up_proj.requires_grad_(True)
    assert_equal_steps(model)


@pytest.mark.parametrize("kind", ["llama", "tied"])
@pytest.mark.parametrize("frozen", ["embeddings", "head", "block", "part of a block"])
def test_frozen_parameters_given_to_the_optimizer(kind, frozen):
    model = made(kind)
    if frozen == "embeddings":
        freeze_embeddings(model)
    else:
        {
            "head": model.lm_head,
            "block": model.model.layers[1],
            "part of a block": model.model.layers[0].mlp,
        }[frozen].requires_grad_(False)
    assert_equal_steps(model, everything=True, micro=2)


def test_groups_of_their_own():
    def groups(params):
        return [
            {"params": params[::3], "lr": 1e-2, "weight_decay": 0.1},
            {"params": params[1::3], "lr": 3e-3, "betas": (0.8, 0.9)},
            {"params": params[2::3], "eps": 1e-6},
        ]

    assert_equal_steps(made(), groups=groups)
    assert_equal_steps(made("tied"), groups=groups, metric="euclidean", base="adamw")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["tied", "gpt2"])
def test_narrow_dtypes_differ_by_no_more_than_rounding(kind, dtype):
    """From the plain step in float64 both are as far away."""
    model = made(kind)
    exact = trained(model, streamed=False, steps=3)[0]
    model = model.to(dtype)
    ways = [trained(model, streamed=streamed, steps=3)[0] for streamed in (False, True)]
    off = [
        max((p - q.double()).abs().max() for p, q in zip(*pair, strict=True))
        for pair in ((exact.parameters(), way.parameters()) for way in ways)
    ]
    assert off[1] <= 1.5 * off[0]


def test_state_in_bfloat16_is_the_same():
    options = {"state_dtype": torch.bfloat16, "lr": 1e-3}
    model = made("tied", torch.float32)
    # A sum in another order may round one element of the state the other way.
    assert_equal_steps(model, limit=1e-5, steps=3, **options)


def test_stochastic_rounding_is_unbiased_noise():
    model = made("tied", torch.bfloat16)
    found, _, reports = trained(model, streamed=True, stochastic_rounding=True, steps=2)
    assert all(report.conflicts is not None for report in reports)
    assert moved(found, model)


def test_no_more_than_one_block_of_gradients_is_alive():
    model = made(num_hidden_layers=6)
    seen = []

    opt = watched(seen)(model.parameters(), gradient_memory="streamed")
    with opt.streamed(find_blocks(model)):
        opt.backward(losses_of(model, *next(batches(1, 0))))
    opt.step()
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    norm = model.model.norm.weight.numel()
    slices = [256] * (2 * model.lm_head.weight.numel() // 256)  # no more than a fourth of a block
    assert seen == 2 * [*[block] * 6, norm, *slices]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metric": "euclidean", "weight_decay": 0.1},
        {"momentum": "per-objective"},
        {"base": "sgd", "momentum": 0.9},
        {"micro": 3},
        {"micro": 2, "at_once": False},
        {"betas": (0.9, 0.0), "direction": "dual"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", *BIASED_HEADS])
def test_losses_that_make_no_logits(kind, options):
    if kind in ("gpt2", *BIASED_HEADS) and "base" not in options:
        options = options | {"eps": 1e-4}
    assert_equal_steps(made(kind), losses=linear_losses_of, **options)


@pytest.mark.parametrize("losses", [losses_of, linear_losses_of])
def test_a_head_that_trains_has_no_whole_gradient(losses, monkeypatch):
    """Neither with its logits nor without: nothing as large is made in a step."""
    model = made("tied", vocab_size=2048)
    shape, whole = model.lm_head.weight.shape, []

    def watch(g):
        whole.append(g.shape)

    model.lm_head.weight.register_hook(watch)
    opt = MOLLMOptimizer(model.parameters(), gradient_memory="streamed")
    rows = next(batches(1, 0))
    monkeypatch.setattr("streamed_steps.VOCAB", 2048)
    with opt.streamed(find_blocks(model)):
        opt.backward(losses(model, rows[0][:, :4], rows[1][:2, :4]))
    before = model.lm_head.weight.detach().clone()
    with Largest() as largest:
        opt.step()
    assert whole == []
    assert largest.elements < shape.numel()
    assert not torch.equal(before, model.lm_head.weight)


class Largest(TorchDispatchMode):
    """Notes how large tensors are that are made in a block, apart from the optimizer's state."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        new = isinstance(made, torch.Tensor) and not func.is_view
        if new and func is not torch.ops.aten.zeros_like.default:
            self.elements = max(self.elements, made.numel())
        return made


# ---- a step that must not be


@pytest.mark.parametrize("options", [{}, {"base": "sgd"}, {"momentum": "per-objective"}], ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing(options):
    model = made()
    opt = MOLLMOptimizer(model.parameters(), gradient_memory="streamed", **options)
    blocks = find_blocks(model)

    def step(factor):
        with opt.streamed(blocks):
            found = losses_of(model, *next(batches(1, 0)))
            opt.backward(found | {"kl": factor * found["kl"]})
        opt.step()

    step(1.0)
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict()["state"])
    with pytest.warns(UserWarning, match="the gradient of kl is not finite: the step was skipped"):
        step(float("nan"))
    assert opt.skipped_steps == 1
    assert opt.last_step.changes is None
    after = model.state_dict(), opt.state_dict()["state"]
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    step(1.0)
    assert opt.last_step.changes is not None


def test_a_step_may_raise_instead():
    model = made()
    opt = MOLLMOptimizer(model.parameters(), gradient_memory="streamed", on_nonfinite="raise")
    with opt.streamed(find_blocks(model)):
        found = losses_of(model, *next(batches(1, 0)))
        opt.backward(found | {"kl": float("inf") * found["kl"]})
    with pytest.raises(FloatingPointError, match="gradient of kl is not finite"):
        opt.step()


@pytest.mark.parametrize("scale", [1e18, 1e25])
def test_a_gradient_too_large_for_the_state_is_judged_as_ever(scale):
    def run(memory):
        model = made("tied", torch.float32)
        opt = MOLLMOptimizer(
            model.parameters(), gradient_memory=memory, metric="euclidean", direction="sum"
        )
        around = opt.streamed(find_blocks(model)) if opt.streams else contextlib.nullcontext()
        with around:
            found = losses_of(model, *next(batches(1, 0)))
            found = {name: scale * loss for name, loss in found.items()}
            opt.backward(found)
        opt.step()
        return opt.skipped_steps

    for memory in ("as-produced", "streamed"):
        skipped = pytest.warns(UserWarning, match="gradients this large is not finite")
        with skipped if scale > 1e20 else contextlib.nullcontext():
            assert run(memory) == (scale > 1e20)


# ---- dropout, checkpoints, autocast


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_what_a_block_checkpoints_inside():
    model = made()
    plain = trained(model, streamed=False, steps=3)
    for layer in model.model.layers:
        layer.mlp = Checkpointed(layer.mlp)
    assert_same(plain, trained(model, streamed=True, steps=3))


class Noisy(nn.Module):
    """Drops out whether it trains or not."""

    def forward(self, x):
        return dropout(x, 0.3, training=True)


def test_a_block_that_draws_numbers_in_evaluation_mode():
    def run(streamed):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), Noisy(), nn.Linear(4, 4)).double().eval()
        memory = "streamed" if streamed else "as-produced"
        opt = MOLLMOptimizer(net.parameters(), objectives=("a", "b"), gradient_memory=memory)
        with opt.streamed(list(net)) if streamed else contextlib.nullcontext():
            y = net(torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4))
            opt.backward({"a": y.square().sum(), "b": (y - 1).square().sum()})
        torch.manual_seed(1)
        opt.step()
        return net, opt, [opt.last_step]

    assert_same(run(False), run(True))


def test_autocast():
    model = made("tied", torch.float32)

    def run(streamed):
        opt = MOLLMOptimizer(
            model_.parameters(), lr=1e-2, gradient_memory="streamed" if streamed else "as-produced"
        )
        around = opt.streamed(find_blocks(model_)) if streamed else contextlib.nullcontext()
        with around:
            with torch.autocast("cpu", torch.bfloat16):
                found = losses_of(model_, *next(batches(1, 0)))
            opt.backward(found)
        with torch.autocast("cpu", torch.bfloat16):
            opt.step()  # no cast of a weight may be left from before
        return opt.last_step

    reports = []
    for streamed in (False, True):
        model_ = copy.deepcopy(model)
        reports.append(run(streamed))
        torch.testing.assert_close(reports[0].gram, reports[-1].gram, rtol=1e-3, atol=1e-6)


def test_a_loss_on_hidden_states_in_between():
    def run(streamed):
        model = made()
        opt = MOLLMOptimizer(
            model.parameters(), lr=1e-2, gradient_memory="streamed" if streamed else "as-produced"
        )
        with opt.streamed(find_blocks(model)) if streamed else contextlib.nullcontext():
            forget, retain = next(batches(1, 0))
            found = losses_of(model, forget, retain)
            found["forget"] = sum(
                h.square().mean()
                for h in model(forget, output_hidden_states=True, use_cache=False).hidden_states
            )
            opt.backward(found)
        opt.step()
        return model, opt, [opt.last_step]

    assert_same(run(False), run(True))


def test_modules_of_ones_own():
    """What happens between the blocks has gradients too."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Linear(4, 4).double() for _ in range(3))
            self.scale = nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, x):
            x = x * self.scale
            for block in self.blocks:
                x = (block(x) * self.scale).tanh() + x
            return x

    def run(streamed):
        net = Net()
        opt = MOLLMOptimizer(
            net.parameters(),
            lr=1e-2,
            objectives=("a", "b"),
            gradient_memory="streamed" if streamed else "as-produced",
        )
        reports = []
        for _ in range(10):
            opt.zero_grad()
            with opt.streamed(net.blocks) if streamed else contextlib.nullcontext():
                y = net(torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4))
                opt.backward({"a": y.square().sum(), "b": (y - 1).square().sum()})
            opt.step()
            reports.append(opt.last_step)
        return net, opt, reports

    assert_same(run(False), run(True))


class Small(nn.Module):
    """Embeddings, blocks and a head, of which some are compiled."""

    def __init__(self, compiled):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2)
        )
        self.head = nn.Linear(8, 64)
        self.double()
        if compiled == "forward":
            self.forward = torch.compile(self.forward, backend="eager")
        parts = {
            "blocks": self.blocks,
            "inside of blocks": [block[0] for block in self.blocks],
            "ends": [self.embed, self.head],
            "model": [self],
        }
        for part in parts.get(compiled, ()):
            part.compile(backend="eager")

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.mark.parametrize("compiled", ["blocks", "inside of blocks", "ends", "model", "forward"])
def test_what_is_compiled(compiled):
    torch.compiler.reset()

    def run(streamed):
        model = Small(compiled if streamed else "")
        memory = "streamed" if streamed else "as-produced"
        opt = MOLLMOptimizer(
            model.parameters(), lr=1e-2, objectives=("a", "b"), gradient_memory=memory
        )
        reports = []
        for step in range(3):
            opt.zero_grad()
            with opt.streamed(model.blocks) if streamed else contextlib.nullcontext():
                z, y = (model(torch.arange(7 * step, 7 * step + n)) for n in (6, 9))
                opt.backward({"a": z.logsumexp(-1).sum(), "b": y.square().mean()})
            opt.step()
            reports.append(opt.last_step)
        return model, opt, reports

    assert_same(run(False), run(True))


def test_backward_frees_the_graphs_of_losses():
    model = made("tied")
    opt = streaming(model)
    with opt.streamed(find_blocks(model)):
        losses = losses_of(model, *next(batches(1, 0)))
        opt.backward(losses)
    with pytest.raises(RuntimeError, match="a second time"):
        losses["retain"].backward()


# ---- what is refused


def streaming(model, **options):
    return MOLLMOptimizer(model.parameters(), gradient_memory="streamed", **options)


def test_other_ways_in_and_out_are_refused():
    model = made()
    opt = streaming(model)
    with pytest.raises(RuntimeError, match=r"call optimizer\.backward\(losses\) inside"):
        opt.objective("kl").__enter__()
    with pytest.raises(RuntimeError, match=r"aggregate\(\) does not go with"):
        opt.aggregate()
    with pytest.raises(RuntimeError, match="compute the losses inside"):
        opt.backward(losses_of(model, *next(batches(1, 0))))
    with pytest.raises(RuntimeError, match=r"'forget' has no gradient.*streamed\(blocks\)"):
        opt.step()
    with pytest.raises(RuntimeError, match="needs gradient_memory='streamed', but got 'host'"):
        MOLLMOptimizer(model.parameters(), gradient_memory="host").streamed([]).__enter__()
    with pytest.raises(ValueError, match="must be another one than 'streamed' with a base"):
        streaming(model, base=torch.optim.AdamW)
    assert not opt.can_aggregate


def test_losses_that_do_not_suit_are_refused():
    model = made("mixtral", output_router_logits=True).train()
    opt = streaming(model)
    blocks = find_blocks(model)
    forget, retain = next(batches(1, 0))

    def refused(error, match, loss):
        with opt.streamed(blocks), pytest.raises(error, match=match):
            opt.backward(losses_of(model, forget, retain) | {"kl": loss()})
        with pytest.raises(RuntimeError, match="has no gradient"):
            opt.step()  # nothing is left of what was taken before

    refused(
        UsageError,
        "a loss must read what a block returns",
        lambda: model(forget, labels=forget, use_cache=False).loss,
    )
    refused(
        UsageError,
        "parameters of blocks must be read by the blocks alone",
        lambda: model.model.layers[1].input_layernorm.weight.sum(),
    )
    refused(RuntimeError, "'kl' got no gradient", lambda: torch.zeros((), requires_grad=True) * 1)


def test_several_processes_must_say_that_they_add_up(monkeypatch):
    model = made()
    opt = streaming(model)
    monkeypatch.setattr(streaming_module, "world_size", lambda: 2)
    with pytest.raises(UsageError, match=r"add_up must be True .* but got False in 2"):
        opt.streamed(find_blocks(model)).__enter__()


def test_a_model_in_parts_has_a_group_for_each_block_and_frozen_embeddings(monkeypatch):
    model = made()
    opt = streaming(model)
    blocks = find_blocks(model)
    monkeypatch.setattr(tape_module, "is_sharded", lambda p: True)
    with pytest.raises(UsageError, match="every block must be a group of its own"):
        opt.streamed(blocks).__enter__()
    monkeypatch.setattr(torch.distributed.fsdp, "FSDPModule", nn.Module)
    with opt.streamed(blocks), pytest.raises(UsageError, match=r"must be frozen .* in parts, but"):
        opt.backward(losses_of(model, *next(batches(1, 0))))


def test_a_cache_of_keys_is_refused():
    model = made()
    opt = streaming(model)
    with (
        opt.streamed(find_blocks(model)),
        pytest.raises(UsageError, match="must run with use_cache=False"),
    ):
        model(next(batches(1, 0))[0], use_cache=True)
    assert not any(m._forward_hooks for m in model.modules())


def test_checkpointed_blocks_are_refused():
    model = made().train()
    opt = streaming(model)
    model.gradient_checkpointing_enable()
    with pytest.raises(UsageError, match="gradient_checkpointing must be off"):
        opt.streamed(find_blocks(model)).__enter__()


def test_blocks_that_are_none_are_refused():
    model = made()
    opt = streaming(model)
    layers = list(model.model.layers)
    for blocks, got in (
        ([], "none"),
        ([layers[0], layers[0].mlp], "2 that do"),
        ([*layers, layers[0]], "3 that do"),
    ):
        with pytest.raises(UsageError, match=f"share no parameters, but got {got}"):
            opt.streamed(blocks).__enter__()
    with opt.streamed(layers):
        opt.backward(losses_of(model, *next(batches(1, 0))))
    with pytest.raises(ValueError, match="the same throughout a step"):
        opt.streamed(layers[:1]).__enter__()


def test_blocks_out_of_order_are_refused():
    model = made()
    opt = streaming(model)
    with opt.streamed(list(model.model.layers)[::-1]):
        opt.backward(losses_of(model, *next(batches(1, 0))))
    with pytest.raises(UsageError, match="run once each and in their order"):
        opt.step()
    with pytest.raises(RuntimeError, match="an earlier sweep over the blocks was broken off"):
        opt.step()
    opt.zero_grad()
    with opt.streamed(list(model.model.layers)):
        opt.backward(losses_of(model, *next(batches(1, 0))))
    opt.step()


def test_what_changed_since_the_forward_is_refused():
    model = made("dropout").train()
    opt = streaming(model)
    blocks = find_blocks(model)
    with opt.streamed(blocks):
        opt.backward(losses_of(model, *next(batches(1, 0))))
    model.eval()
    with pytest.raises(RuntimeError, match="was switched between train"):
        opt.step()
    opt.zero_grad()
    seen = []
    blocks[1].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    with opt.streamed(blocks):
        opt.backward(losses_of(model, *next(batches(1, 0))))
    with torch.no_grad():
        seen[0].add_(1)
    with pytest.raises(RuntimeError, match="an input of block 1 was changed in place"):
        opt.step()


@pytest.mark.parametrize("losses", [losses_of, linear_losses_of])
def test_ids_may_be_those_of_the_next_batch_by_the_time_of_the_step(losses):
    def run(streamed, reuse):
        model = made("tied")
        memory = "streamed" if streamed else "as-produced"
        opt = MOLLMOptimizer(model.parameters(), lr=1e-2, gradient_memory=memory)
        rows = [ids.clone() for ids in next(batches(1, 0))]
        with opt.streamed(find_blocks(model)) if streamed else contextlib.nullcontext():
            opt.backward(losses(model, *rows))
        for ids in rows if reuse else ():
            ids.zero_()
        opt.step()
        return model, opt, [opt.last_step]

    assert_same(run(False, reuse=False), run(True, reuse=True))


def test_hidden_states_that_changed_before_the_step_are_refused():
    model = made()
    opt, seen = streaming(model), []
    model.lm_head.register_forward_pre_hook(lambda head, args: seen.append(args[0]))
    with opt.streamed(find_blocks(model)):
        opt.backward(losses_of(model, *next(batches(1, 0))))
    with torch.no_grad():
        seen[-2].zero_()  # of the rows to forget
    with pytest.raises(RuntimeError, match=r"head reads was changed.*: change a copy of it"):
        opt.step()


def test_forwards_without_gradients_leave_no_trace():
    model = made()
    opt = streaming(model)
    with opt.streamed(find_blocks(model)):
        with torch.no_grad():
            model(next(batches(1, 0))[0])
        opt.backward(losses_of(model, *next(batches(1, 0))))
        model(next(batches(1, 0))[0], use_cache=False)  # with no loss
    opt.step()
    reference = made()
    plain = MOLLMOptimizer(reference.parameters())
    plain.backward(losses_of(reference, *next(batches(1, 0))))
    plain.step()
    torch.testing.assert_close(plain.last_step.gram, opt.last_step.gram)


def test_an_interrupted_forward_leaves_no_trace():
    model = made()
    opt = streaming(model)

    def stop(module, args):
        raise KeyboardInterrupt

    blocks = find_blocks(model)
    handle = model.model.layers[1].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt), opt.streamed(blocks):
        model(next(batches(1, 0))[0], use_cache=False)
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    losses_of(model, *next(batches(1, 0)))["retain"].backward()  # autograd saves as ever
    opt.zero_grad()
    with opt.streamed(blocks):
        opt.backward(losses_of(model, *next(batches(1, 0))))
    opt.step()
    assert opt.last_step.changes is not None


def test_an_optimizer_with_a_tape_can_be_copied():
    model = made()
    opt = streaming(model)
    with opt.streamed(find_blocks(model)):
        opt.backward(losses_of(model, *next(batches(1, 0))))
    copied = copy.deepcopy(opt)
    with pytest.raises(RuntimeError, match="has no gradient"):
        copied.step()
    opt.step()
