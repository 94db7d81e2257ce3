"""Optimizer state in 8 bits."""

from __future__ import annotations

import copy

import pytest
import torch
from streamed_steps import NAMES, assert_same, batches, hold, losses_of, made, trained, watched
from torch import nn

from mollm import MOLLMOptimizer, UsageError
from mollm.optim import gradients
from mollm.optim.constants import ELEMENTS_PER_SCALE
from mollm.optim.eight_bits import narrowed, scales_name, widened

pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
EIGHT = {"state_dtype": "8bit"}
WAYS = [
    {},
    {"metric": "euclidean"},
    {"momentum": "per-objective"},
    {"base": "sgd", "momentum": 0.9},
]


def generator():
    return torch.Generator().manual_seed(0)


# ---- the numbers


@pytest.mark.parametrize("signed", [False, True])
def test_an_element_is_off_by_little_of_itself_and_of_the_largest(signed):
    x = torch.randn(40, 100, generator=generator())
    x = x if signed else x.square()
    found = widened(*narrowed(x, signed=signed), signed=signed)
    largest = torch.cat(
        [b.abs().max().expand(len(b)) for b in x.flatten().split(ELEMENTS_PER_SCALE)]
    )
    off = (found - x).abs().flatten()
    assert (off <= (0.05 * x.abs().flatten()).maximum(1e-2 * largest)).all()
    assert off.max() > 0


def test_rounding_once_more_changes_nothing():
    x = torch.randn(3000, generator=generator()).square() * 1e-9
    codes, scales = narrowed(x, signed=False)
    assert codes.dtype == torch.uint8
    assert scales.shape == (12,)
    again = narrowed(widened(codes, scales, signed=False), signed=False)
    assert torch.equal(codes, again[0])
    assert torch.equal(scales, again[1])


@pytest.mark.parametrize(
    ("signed", "median", "under", "most"),
    [(False, 0.011, 0.89, 0.32), (True, 0.023, 0.76, 0.42)],
)
def test_codes_lie_as_close_as_it_is_said(signed, median, under, most):
    from bitsandbytes.functional import create_dynamic_map

    codes = create_dynamic_map(signed=signed).double().sort().values
    codes = codes[codes > 0]
    gaps = codes.diff() / 2 / codes[1:]
    assert float(gaps.median()) == pytest.approx(median, abs=5e-4)
    assert float((gaps < 0.05).double().mean()) == pytest.approx(under, abs=5e-3)
    assert float(gaps.max()) == pytest.approx(most, abs=5e-3)


@pytest.mark.parametrize("x", [torch.zeros(300), torch.tensor([]), torch.full((2, 2), 1e30)])
def test_numbers_that_are_alike_are_exact(x):
    assert torch.equal(widened(*narrowed(x, signed=False), signed=False), x)


# ---- the steps


def rounded(opt):
    """Gives every state the value that 8 bits hold."""
    for state in opt.state.values():
        for name in set(state) - {"step"}:
            signed = name != "exp_avg_sq"
            wide = widened(*narrowed(state[name], signed=signed), signed=signed)
            state[name].copy_(wide)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_step_is_that_of_the_state_in_float32_once_it_is_rounded(options):
    model = made("tied", torch.float32)
    other = copy.deepcopy(model)
    mine = MOLLMOptimizer(model.parameters(), lr=1e-2, objectives=NAMES, **options, **EIGHT)
    wide = MOLLMOptimizer(other.parameters(), lr=1e-2, objectives=NAMES, **options)
    for step in range(5):
        (pair,) = batches(1, step)
        for each, opt in ((model, mine), (other, wide)):
            hold(opt, losses_of(each, *pair))
            opt.step()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
        assert mine.last_step.changes == wide.last_step.changes
        rounded(wide)


@pytest.mark.parametrize("options", [*WAYS, {"micro": 2}], ids=str)
def test_streamed_steps_are_the_same(options):
    ways = [trained(made("tied"), streamed=streamed, **options, **EIGHT) for streamed in (0, 1)]
    assert_same(*ways)


@pytest.mark.parametrize("options", [{}, {"betas": (0.9, 0.0)}], ids=str)
def test_state_is_wide_a_few_parameters_at_a_time(monkeypatch, options):
    whole = trained(made(), streamed=False, steps=3, **options, **EIGHT)
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 4 * 800)
    seen = []

    monkeypatch.setattr("streamed_steps.MOLLMOptimizer", watched(seen))
    assert_same(whole, trained(made(), streamed=False, steps=3, **options, **EIGHT))
    assert max(seen) <= 800


def test_a_state_takes_little_more_than_a_byte_an_element():
    x = nn.Parameter(torch.randn(1000, 20))
    opt = MOLLMOptimizer([x], objectives=("a",), **EIGHT)
    opt.backward({"a": x.square().sum()})
    opt.step()
    taken = sum(t.nbytes for name, t in opt.state[x].items() if name != "step")
    assert x.numel() < taken < 1.02 * x.numel()


def test_a_step_that_is_skipped_leaves_the_bytes(recwarn):
    model = made("tied", torch.float32)
    opt = MOLLMOptimizer(model.parameters(), objectives=NAMES, **EIGHT)
    for factor in (1.0, float("nan")):
        before = copy.deepcopy(opt.state_dict()["state"])
        found = losses_of(model, *next(batches(1, 0)))
        hold(opt, found | {"kl": factor * found["kl"]})
        opt.step()
    assert opt.skipped_steps == 1
    after = opt.state_dict()["state"]
    for n, entry in before.items():
        assert all(torch.equal(value, after[n][name]) for name, value in entry.items())


# ---- saved and loaded


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_saved_state_resumes_bit_for_bit(options, tmp_path):
    model, opt, _ = trained(
        made("tied", torch.float32), streamed=False, steps=3, **options, **EIGHT
    )
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(model)
    resumed = MOLLMOptimizer(other.parameters(), lr=1.0, objectives=NAMES, **options, **EIGHT)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert opt.state[p].keys() == resumed.state[q].keys()
        assert all(torch.equal(opt.state[p][name], resumed.state[q][name]) for name in opt.state[p])
    for each, optimizer in ((model, opt), (other, resumed)):
        hold(optimizer, losses_of(each, *next(batches(1, 9))))
        optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_state_of_torchs_own_is_rounded():
    x = nn.Parameter(torch.randn(300, generator=generator()))
    torchs = torch.optim.AdamW([x])
    x.grad = torch.randn(300, generator=generator())
    torchs.step()
    opt = MOLLMOptimizer([x], objectives=("a",), metric="euclidean", **EIGHT)
    opt.load_state_dict(torchs.state_dict())
    for name, value in torchs.state[x].items():
        if name == "step":
            continue
        codes, scales = narrowed(value, signed=name == "exp_avg")
        assert torch.equal(opt.state[x][name], codes)
        assert torch.equal(opt.state[x][scales_name(name)], scales)


DTYPES = ["8bit", torch.bfloat16, torch.float32, None]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("loads", DTYPES, ids=str)
@pytest.mark.parametrize("saved", DTYPES, ids=str)
def test_a_loaded_state_has_the_dtype_of_the_optimizer_that_loads_it(saved, loads, options):
    model = made("tied", torch.float32)
    kept = {**options, "state_dtype": saved}
    model, opt, _ = trained(model, streamed=False, steps=2, **kept)
    other = copy.deepcopy(model)
    kept["state_dtype"] = loads
    loading = MOLLMOptimizer(other.parameters(), objectives=NAMES, **kept)
    loading.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert {group["state_dtype"] for group in loading.param_groups} == {loads}
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        mine, theirs = loading.state[q], opt.state[p]
        for name in set(theirs) & {"exp_avg", "exp_avg_sq", "momentum_buffer"}:
            signed, scales = name != "exp_avg_sq", scales_name(name)
            wide = theirs[name]
            if saved == "8bit":
                wide = widened(wide, theirs[scales], signed=signed)
            if loads == "8bit":
                kept_codes = theirs[name], theirs.get(scales)
                expected = kept_codes if saved == "8bit" else narrowed(wide, signed=signed)
                assert torch.equal(mine[name], expected[0])
                assert torch.equal(mine[scales], expected[1])
            else:
                assert mine[name].dtype == (loads or torch.float32)
                assert torch.equal(mine[name], wide.to(loads or torch.float32))
                assert scales not in mine
    hold(loading, losses_of(other, *next(batches(1, 9))))
    loading.step()


@pytest.mark.parametrize("dtype", ["8bit", None])
@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.pop("exp_avg_sq_scales"),
        lambda entry: entry["exp_avg_sq_scales"].fill_(float("nan")),
        lambda entry: entry["exp_avg_sq_scales"].neg_(),
        lambda entry: entry.update(exp_avg_sq=entry["exp_avg_sq"][:5]),
    ],
    ids=["no scales", "nan", "negative", "shape"],
)
def test_a_damaged_state_is_refused(change, dtype):
    x = nn.Parameter(torch.ones(300))
    opt = MOLLMOptimizer([x], objectives=("a",), **EIGHT)
    opt.backward({"a": x.sum()})
    opt.step()
    state = copy.deepcopy(opt.state_dict())
    change(state["state"][0])
    opt = MOLLMOptimizer([x], objectives=("a",), state_dtype=dtype)
    with pytest.raises(UsageError, match=r"exp_avg_sq of parameter 0 must be \(300,\) codes and 2"):
        opt.load_state_dict(state)


def test_a_model_in_parts_is_refused(monkeypatch):
    monkeypatch.setattr("mollm.optim.bases.is_sharded", lambda p: True)
    with pytest.raises(UsageError, match="state_dtype must not be '8bit' for a model in parts"):
        MOLLMOptimizer([nn.Parameter(torch.ones(3))], **EIGHT)
