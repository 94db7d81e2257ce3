"""What tests/distributed/test_sharding.py runs in two and in four processes, and once more in one.

Every case is a function of a `Layout` that returns what the test compares; `run` starts the
processes once and collects all of them.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import traceback
import warnings
from dataclasses import dataclass

import launch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mollm import MOLLMOptimizer
from mollm.distributed.sharding import answer_tokens, expect_backward

NAMES = ("forget", "kl", "retain")
ROWS = 16

OPTIONS = {
    "adamw": {"lr": 0.01, "metric": "euclidean"},
    "sgd": {"base": "sgd", "lr": 0.05, "momentum": 0.9},
    "torch": {"base": torch.optim.AdamW, "lr": 0.01, "foreach": False},
    "metric": {"lr": 0.01},
    "means": {"lr": 0.01, "momentum": "per-objective"},
    "torch means": {
        "base": torch.optim.SGD,
        "lr": 0.05,
        "momentum": "per-objective",
        "foreach": False,
    },
    "host": {"lr": 0.01, "gradient_memory": "host", "direction": "upgrad"},
}


def make_model(dtype=torch.float64):
    """Three layers; of the last one's three rows, four processes hold one each or none."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5), nn.Linear(5, 3)).to(dtype)


def losses(y):
    return {
        "forget": y[:, 0].exp().mean(),
        "kl": (y[:, 1] - y[:, 0]).square().mean(),
        "retain": (y - 1).square().mean(),
    }


def batch(n, dtype=torch.float64):
    gen = torch.Generator().manual_seed(n)
    return torch.randn(ROWS, 6, generator=gen, dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Layout:
    """How the model lies on the processes; "one" is a process alone."""

    name: str

    @property
    def world(self):
        return 1 if self.name == "one" else dist.get_world_size()

    @property
    def rank(self):
        return 0 if self.name == "one" else dist.get_rank()

    def mine(self, x):
        return x.chunk(self.world)[self.rank]

    def wrap(self, model, **options):
        if self.name == "ddp":
            return DistributedDataParallel(model, **options)
        if self.name == "one":
            return model
        if self.name == "hsdp":
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
        else:
            mesh = init_device_mesh("cpu", (self.world,))
        ordinary = {model[0].weight} if self.name == "mixed" else set()
        for layer in model:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh, ignored_params=ordinary)
        return fully_shard(model, mesh=mesh, ignored_params=ordinary)

    def backward(self, opt, each, model):
        if self.name != "mixed":
            opt.backward(each, model)
            return
        for name, loss in each.items():  # FSDP2 leaves ignored parameters to the user
            with opt.objective(name):
                loss.backward(retain_graph=True)
                for p in model.parameters():
                    if not isinstance(p, DTensor):
                        dist.all_reduce(p.grad)
                        p.grad /= self.world


def full(t):
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def weights(model):
    return [full(p) for p in model.parameters()]


def step(layout, model, opt, n, dtype=torch.float64):
    opt.zero_grad()
    layout.backward(opt, losses(model(layout.mine(batch(n, dtype)))), model)
    opt.step()


def train(layout, key, steps=4, dtype=torch.float64):
    model = layout.wrap(make_model(dtype))
    opt = MOLLMOptimizer(model.parameters(), **OPTIONS[key])
    opt._store.bucket_bytes = 500
    for n in range(steps):
        step(layout, model, opt, n, dtype)
    last = opt.last_step
    return {"weights": weights(model), "gram": last.gram, "changes": list(last.changes.values())}


def in_single_precision(layout):
    return train(layout, "adamw", dtype=torch.float32)


def clipped(layout):
    """The direction in p.grad, clipped, and then a fused step."""
    model = layout.wrap(make_model())
    opt = MOLLMOptimizer(model.parameters(), lr=0.05, base="sgd")
    for n in range(3):
        layout.backward(opt, losses(model(layout.mine(batch(n)))), model)
        opt.aggregate()
        norm = nn.utils.clip_grad_norm_(list(model.parameters()), 0.1, foreach=False)
        opt.step()
        opt.zero_grad()
    return {"weights": weights(model), "norm": full(norm), "changes": opt.last_step.changes}


def accumulated(layout):
    """Two micro-batches; gradients travel with the second one alone."""
    model = layout.wrap(make_model())
    opt = MOLLMOptimizer(model.parameters(), lr=0.01)
    for n in range(2):
        halves = layout.mine(batch(n)).chunk(2)
        for number, half in enumerate(halves):
            silent = layout.name == "ddp" and number == 0
            with model.no_sync() if silent else contextlib.nullcontext():
                each = losses(model(half))
                for name, loss in each.items():
                    with opt.objective(name):
                        ready = expect_backward(model, loss / 2)
                        ready.backward(retain_graph=name != NAMES[-1])
        opt.step()
    return {"weights": weights(model)}


def accumulated_unsharded(layout):
    """FSDP2 keeps whole gradients until the last micro-batch of each objective."""
    model = layout.wrap(make_model())
    opt = MOLLMOptimizer(model.parameters(), lr=0.01)
    for n in range(2):
        halves = layout.mine(batch(n)).chunk(2)
        for name in NAMES:
            with opt.objective(name):
                for number, half in enumerate(halves):
                    if layout.name != "one":
                        model.set_requires_gradient_sync(number == 1)
                    (losses(model(half))[name] / 2).backward()
        opt.step()
    return {"weights": weights(model)}


def not_finite_here(layout):
    """One element of one process's gradient is NaN: nobody makes the step."""
    model = layout.wrap(make_model())
    opt = MOLLMOptimizer(model.parameters(), lr=0.01)
    step(layout, model, opt, 0)
    before = weights(model)
    each = losses(model(layout.mine(batch(1))))
    if layout.rank == layout.world - 1 and layout.name == "ddp":
        each["kl"] = each["kl"] * float("nan")
    for name, loss in each.items():
        with opt.objective(name):
            expect_backward(model, loss).backward(retain_graph=True)
            parts = [p.grad.to_local() for p in model.parameters() if isinstance(p.grad, DTensor)]
            if layout.rank == layout.world - 1 and name == "kl" and parts:
                next(t for t in parts if t.numel()).view(-1)[0] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step()
    skipped = {"before": before, "after": weights(model), "skipped": opt.skipped_steps}
    step(layout, model, opt, 2)
    return {**skipped, "status": opt.last_step.status.name, "weights": weights(model)}


def resumed(layout, key):
    """Saved and loaded with torch.distributed.checkpoint in the middle."""
    options = OPTIONS[key]
    model = layout.wrap(make_model())
    opt = MOLLMOptimizer(model.parameters(), **options)
    for n in range(2):
        step(layout, model, opt, n)
    folder = [tempfile.mkdtemp()]
    if layout.world > 1:
        dist.broadcast_object_list(folder)
    state = {"optimizer": get_optimizer_state_dict(model, opt), "mollm": opt.state_dict()["mollm"]}
    dcp.save(state, checkpoint_id=folder[0], no_dist=layout.world == 1)
    other = layout.wrap(copy.deepcopy(make_model()))
    with torch.no_grad():
        for p, q in zip(other.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    again = MOLLMOptimizer(other.parameters(), **options)
    state = {"optimizer": get_optimizer_state_dict(other, again), "mollm": state["mollm"]}
    for row in state["mollm"].get("means", {"held": {}})["held"].values():
        for n, mean in row.items():
            row[n] = torch.zeros_like(mean)
    dcp.load(state, checkpoint_id=folder[0], no_dist=layout.world == 1)
    set_optimizer_state_dict(other, again, state["optimizer"])
    again.load_state_dict({**again.state_dict(), "mollm": state["mollm"]})
    for m, o in ((model, opt), (other, again)):
        for n in range(2, 4):
            step(layout, m, o, n)
    return {"weights": weights(model), "resumed": weights(other)}


def traffic(layout):
    """How many numbers the optimizer sums over the processes in a step."""
    model = layout.wrap(make_model())
    opt = MOLLMOptimizer(model.parameters(), lr=0.01)
    for n in range(2):
        step(layout, model, opt, n)
    layout.backward(opt, losses(model(layout.mine(batch(3)))), model)
    sent, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda t, *a, **k: (sent.append((t.numel(), t.dtype)), all_reduce(t, *a, **k))
    try:
        opt.step()
    finally:
        dist.all_reduce = all_reduce
    return {"sent": sent}


def not_averaged(layout):
    """Several backwards under DDP that was not told of them."""
    model = layout.wrap(make_model())
    opt = MOLLMOptimizer(model.parameters(), lr=0.01)
    opt.backward(losses(model(layout.mine(batch(0)))))
    try:
        opt.step()
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": None}


def views_of_buckets(layout):
    model = layout.wrap(make_model(), gradient_as_bucket_view=True)
    opt = MOLLMOptimizer(model.parameters(), lr=0.01)
    try:
        for n in range(2):
            step(layout, model, opt, n)
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": None}


def unused_parameters(layout):
    """DDP looks for parameters without a gradient; one objective leaves the last layer alone."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = make_model()

        def forward(self, x):
            inner = self.layers[:-1](x)
            return inner, self.layers[-1](inner)

    model = Two()
    if layout.name == "ddp":
        model = layout.wrap(model, find_unused_parameters=True)
    opt = MOLLMOptimizer(model.parameters(), lr=0.01)
    for n in range(3):
        inner, y = model(layout.mine(batch(n)))
        each = losses(y)
        opt.backward({**each, "forget": inner.square().mean()}, model)
        opt.step()
    return {"weights": weights(model)}


def rounded_at_random(layout):
    """bfloat16 copies stay alike, though every process has a seed of its own."""
    model = layout.wrap(make_model(torch.bfloat16))
    torch.manual_seed(layout.rank)
    opt = MOLLMOptimizer(model.parameters(), lr=1e-3, stochastic_rounding=True)
    for n in range(3):
        step(layout, model, opt, n, torch.bfloat16)
    return {"weights": weights(model)}


def tokens(layout):
    """The mean over answer tokens that lie unevenly on the processes."""
    target = torch.full((ROWS,), -100)
    target[[0, 1, 2, 3, 5, 15]] = 1
    model = layout.wrap(make_model())
    y, mine = model(layout.mine(batch(0))), layout.mine(target)
    normalizer = answer_tokens(mine)
    (y[mine != -100].square().sum() / normalizer).backward()
    return {"normalizer": normalizer, "weights": [full(p.grad) for p in model.parameters()]}


SHARDED = ("fsdp", "hsdp", "mixed")
CASES = {
    **{key: (lambda layout, key=key: train(layout, key), ("ddp", *SHARDED)) for key in OPTIONS},
    "in_single_precision": (in_single_precision, ("ddp", *SHARDED)),
    "clipped": (clipped, ("ddp", "fsdp", "hsdp")),
    "accumulated": (accumulated, ("ddp", "fsdp")),
    "accumulated_unsharded": (accumulated_unsharded, ("fsdp",)),
    "not_finite_here": (not_finite_here, ("ddp", "fsdp", "hsdp")),
    "resumed": (lambda layout: resumed(layout, "torch"), ("ddp", "fsdp")),
    "resumed_means": (lambda layout: resumed(layout, "means"), ("ddp", "fsdp", "hsdp")),
    "traffic": (traffic, ("ddp", "fsdp", "hsdp")),
    "not_averaged": (not_averaged, ("ddp",)),
    "views_of_buckets": (views_of_buckets, ("ddp",)),
    "unused_parameters": (unused_parameters, ("ddp",)),
    "rounded_at_random": (rounded_at_random, ("ddp",)),
    "tokens": (tokens, ("ddp", "fsdp")),
}


def cases_for(world):
    """(case, layout): everything in two processes; in four, HSDP and what else needs them."""
    every = [(case, name) for case, (_, names) in CASES.items() for name in names]
    if world == 2:
        return [(case, name) for case, name in every if name != "hsdp"]
    return [
        (case, name)
        for case, name in every
        if name in ("ddp", "hsdp") or case in ("adamw", "not_finite_here", "tokens")
    ]


def result(case, name):
    try:
        return CASES[case][0](Layout(name))
    except Exception:
        return {"failed": traceback.format_exc()}


def _work():
    found = {}
    for case in cases_for(dist.get_world_size()):
        found[case] = result(*case)
        if "failed" in found[case]:
            break  # the other processes may be waiting in another place
    return found


def run(world, folder):
    """What every process found, by (case, layout)."""
    return launch.in_processes(_work, world, folder)
