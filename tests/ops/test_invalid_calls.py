"""Invalid arguments to every function of the extension and every public op: an exception, and no
memory changed. A short round here; long ones, and one under AddressSanitizer, with `make soak`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import mollm_ops
from mollm_ops._extension import DTYPE_CODES, extension
from mollm_ops.operands import AdamMetric, AdamWStep, RowLoss, RunningMeans, Targets
from mollm_ops.rows import kl_rows, log_rows

assert extension is not None, "install with a C++ compiler: `pip install .`"

ROOT = Path(__file__).resolve().parents[2]
COUNTS = [5, 3]
# Torch's own dispatcher asserts that real and fake tensors do not meet.
REFUSED = (ValueError, TypeError, RuntimeError, KeyError, OverflowError, AssertionError)


@dataclass
class Call:
    """A valid call, and everything in memory that it may touch."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    memory: list[torch.Tensor]


def snapshot(tensors):
    return [t.detach().clone() for t in tensors]


def assert_refused(call, arguments):
    before = snapshot(call.memory)
    with pytest.raises(REFUSED) as error:
        call.function(**arguments)
    for t, old in zip(call.memory, before, strict=True):
        assert torch.equal(t, old), f"memory changed before {error.value!r}"
    return str(error.value)


# ---- the extension: addresses, codes and counts


def listed(tensors):
    return [t.data_ptr() for t in tensors], [DTYPE_CODES[t.dtype] for t in tensors]


def memory(t):
    return t.data_ptr(), t.numel()


def some(dtypes, counts=COUNTS):
    return [torch.rand(c).to(d) for d, c in zip(dtypes, counts, strict=True)]


def extension_calls():
    f32, bf16 = torch.float32, torch.bfloat16
    g = some([f32, bf16, f32, f32], COUNTS * 2)
    means, v, x = some([f32] * 4, COUNTS * 2), some([f32, f32]), some([f32, torch.float64])
    params, first, second = (some([f32, bf16]) for _ in range(3))
    steps = [torch.ones(()) for _ in COUNTS]
    w, G, sums = (torch.ones(n, dtype=torch.float64) for n in (2, 4, 2))
    logits, target = torch.rand(3, 7), torch.tensor([0, 6, -1])
    losses, scale, gradient = torch.zeros(3), torch.ones(3), torch.zeros(3, 7)
    data, dtypes = listed(g)
    lists = {"data": data, "dtypes": dtypes, "counts": COUNTS, "threads": 2}
    options = {
        "method": 1, "lr": 0.1, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False,
        "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "rounding_seed": None,
    }  # fmt: skip
    row_loss = (scale.data_ptr(), 1, losses.data_ptr(), gradient.data_ptr(), 7)
    touched = [*g, *means, *v, *x, *params, *first, *second, *steps, w, G, sums]
    touched += [logits, target, losses, scale, gradient]
    square = np.eye(2)
    arguments = {
        "gram_cpu": {
            **lists,
            "means": (listed(means), 0.9),
            "metric": (listed(v), [0.5, 0.5], [0.3, 0.7], 0.9, 1e-8),
            "gram": memory(G),
        },
        "combine_cpu": {**lists, "weights": memory(w), "out": listed(params)},
        "dots_cpu": {**lists, "x": listed(x), "dots": memory(sums)},
        "update_cpu": {
            **lists,
            "weights": [0.5, 2.0],
            "second_weights": [0.5, 0.5],
            "means": (listed(means), 0.9),
            "params": listed(params),
            "first": listed(first),
            "second": listed(second),
            "steps": [t.data_ptr() for t in steps],
            "options": options,
            "changes": memory(sums),
        },
        "rows_cpu": {
            "rows": 3, "vocab": 7, "dtype": 0, "gradient_dtype": 0, "logits": logits.data_ptr(),
            "stride": 7, "reference": logits.data_ptr(), "reference_stride": 7,
            "target": target.data_ptr(), "eps": 0.0, "ce": row_loss, "kl": row_loss,
            "map": (1.0, 0.0), "reference_map": (1.0, 0.0), "threads": 2,
        },
        "dual_space_solution": {"gram": square, "length": 0},
        "min_norm_solution": {"gram": square, "normalize": True, "length": 0},
        "projected_solution": {
            "gram": square, "preferences": [1.0, 2.0], "each_alone": True, "normalize": False,
            "length": 1,
        },
    }  # fmt: skip
    return {n: Call(getattr(extension, n), a, touched) for n, a in arguments.items()}


def longer(x):
    return [*x, x[-1]]


def entry(value):
    """The list with `value` in its last place."""
    return lambda x: [*x[:-1], value]


def part(n, spoil):
    """The tuple with its n-th part spoiled."""
    return lambda x: (*x[:n], spoil(x[n]), *x[n + 1 :])


def of_both(spoils):
    """Of a pair of lists, one of them spoiled in these ways."""
    return [part(n, spoil) for n in range(2) for spoil in spoils]


NAN = float("nan")
SHORT_OR_LONG = [lambda x: x[:-1], longer, lambda x: []]
CODES = [*SHORT_OR_LONG, entry(4), entry(-1), entry(2**40)]
FULL_LIST = [*(part(0, s) for s in (*SHORT_OR_LONG, entry(0))), *(part(1, s) for s in CODES)]
LIST = [*(part(0, s) for s in SHORT_OR_LONG), *(part(1, s) for s in CODES)]
MEMORY = [
    part(0, lambda address: 0),
    part(0, lambda address: address + 1),
    *(part(1, lambda n, by=by: n + by) for by in (-1, 1, 2**40)),
]
MAP = [
    *(part(0, lambda s, x=x: x) for x in (0.0, -1.0, NAN, float("inf"))),
    *(part(1, lambda c, x=x: x) for x in (-1.0, NAN, float("inf"))),
]
NULL_OR_FAR = [lambda x: 0, lambda x: -1]
SPOILS = {
    "data": SHORT_OR_LONG,
    "dtypes": CODES,
    "counts": [*SHORT_OR_LONG, entry(-1), entry(2**41), entry(2**62)],
    "threads": [lambda x: 0, lambda x: -5],
    "means": [part(0, spoil) for spoil in FULL_LIST],
    "metric": [
        *(part(0, spoil) for spoil in LIST),
        *(part(n, spoil) for n in (1, 2) for spoil in SHORT_OR_LONG),
    ],
    "gram": MEMORY,
    "dots": MEMORY,
    "changes": MEMORY,
    "out": FULL_LIST,
    "x": FULL_LIST,
    "params": [*FULL_LIST, lambda x: None],
    "first": FULL_LIST,
    "second": [*FULL_LIST, lambda x: None],
    "steps": [*SHORT_OR_LONG, entry(0)],
    "second_weights": SHORT_OR_LONG,
    "options": [
        lambda o: {**o, "method": 2},
        lambda o: {**o, "method": -1},
        lambda o: {**o, "rounding_seed": -1},
        lambda o: {k: x for k, x in o.items() if k != "beta2"},
    ],
    "length": [lambda x: 3, lambda x: -1],
    "preferences": [*SHORT_OR_LONG, entry(-1.0), entry(float("nan"))],
    "rows": [lambda x: -1, lambda x: 2**62],
    "vocab": [lambda x: -1, lambda x: 2**62],
    "dtype": [lambda x: 4, lambda x: -1],
    "gradient_dtype": [lambda x: 4, lambda x: -1, lambda x: 1],
    "logits": NULL_OR_FAR,
    "target": NULL_OR_FAR,
    "reference": NULL_OR_FAR,
    "stride": [lambda x: -1],
    "reference_stride": [lambda x: -1],
    "ce": [part(0, lambda a: 0), part(1, lambda s: -1), part(2, lambda a: 0), part(4, lambda s: 3)],
    "map": MAP,
    "reference_map": MAP,
    "kl": [part(0, lambda a: 0), part(2, lambda a: 0), part(4, lambda s: -7)],
}
SQUARE = [lambda G: G[:1], lambda G: np.eye(9), lambda G: np.zeros((0, 0)), lambda G: G[0]]
OPTIONAL = ("means", "metric", "second_weights", "first", "changes", "ce", "kl")
NO_ARGUMENT = [lambda x: "text", lambda x: object(), lambda x: 1j]


def spoils_of(name, argument):
    spoils = [*SPOILS.get(argument, ()), *NO_ARGUMENT]
    if argument == "gram" and name.endswith("solution"):
        spoils = [*SQUARE, *NO_ARGUMENT[:2]]
    if argument == "weights":
        spoils += MEMORY if name == "combine_cpu" else SHORT_OR_LONG
    if argument in ("each_alone", "normalize"):
        return []  # anything has a truth value
    return spoils if argument in OPTIONAL else [*spoils, lambda x: None]


EXTENSION_CASES = [
    (name, argument, spoil)
    for name, call in extension_calls().items()
    for argument in call.arguments
    for spoil in spoils_of(name, argument)
]


def call_extension(name, spoils):
    call = extension_calls()[name]
    arguments = dict(call.arguments)
    for argument, spoil in spoils:
        arguments[argument] = spoil(arguments[argument])
    return assert_refused(call, arguments)


def test_every_function_of_the_extension_is_tried():
    functions = {n for n in dir(extension) if callable(getattr(extension, n))}
    on_cuda = {n for n in functions if "cuda" in n}  # their memory is on a device
    assert functions - on_cuda - {"cpu_instruction_set"} == set(extension_calls())


def test_the_calls_are_valid_before_they_are_spoiled():
    for call in extension_calls().values():
        call.function(**call.arguments)


def test_the_extension_refuses_each_invalid_argument():
    for name, argument, spoil in EXTENSION_CASES:
        call_extension(name, [(argument, spoil)])


@st.composite
def spoiled_extension_calls(draw):
    """One function with one to three of its arguments invalid."""
    name, argument, spoil = draw(st.sampled_from(EXTENSION_CASES))
    others = [c for c in EXTENSION_CASES if c[0] == name and c[1] != argument]
    more = draw(st.lists(st.sampled_from(others), max_size=2, unique_by=lambda c: c[1]))
    return name, [(argument, spoil), *((a, s) for _, a, s in more)]


# ---- the public ops: tensors


def real_ops():
    """Valid arguments of every op of mollm_ops that takes lists of tensors or a Gram matrix."""
    shapes, K = [(4, 3), (5,)], 2
    g = [[torch.rand(s) for s in shapes] for _ in range(K)]
    means = [[torch.rand(s) for s in shapes] for _ in range(K)]
    params, first, second, out = ([torch.rand(s) for s in shapes] for _ in range(4))
    steps = [torch.ones(()) for _ in shapes]
    w = torch.tensor([0.5, 2.0], dtype=torch.float64)
    c = torch.tensor([0.25, 0.5], dtype=torch.float64)
    method = AdamWStep(0.1, second_weights=c)
    update = {
        "gradients": g, "weights": w, "targets": Targets(params, first, second, steps),
        "method": method, "moving": RunningMeans(means, 0.9), "rounding_seed": 3,
        "proceed": torch.tensor(True), "track": True,
    }  # fmt: skip
    gram = torch.eye(2, dtype=torch.float64)
    solver = {"gram": gram, "preferences": [1.0, 2.0], "normalize": True, "length": "mean"}
    memory = [t for row in (*g, *means, params, first, second, out, steps) for t in row]
    flat, rows = [t for row in g for t in row], [g[0][0].flatten(), g[1][0].flatten()]
    arguments = {
        mollm_ops.gram: {"gradients": g},
        mollm_ops.gram_direction: {"gradients": g, "length": "mean", "out": out},
        mollm_ops.gram_moved: {
            "gradients": g,
            "moving": RunningMeans(means, 0.9),
            "metric": AdamMetric(second, steps, c),
        },
        mollm_ops.combine: {"gradients": g, "weights": w, "out": out},
        mollm_ops.dots: {"gradients": g, "x": params},
        mollm_ops.update_: update,
        mollm_ops.dual_space_weights: {"gram": gram, "length": "mean"},
        mollm_ops.min_norm_weights: {"gram": gram, "normalize": True, "length": "first"},
        mollm_ops.project_weights: solver,
        mollm_ops.upgrad_weights: solver,
        torch.ops.mollm.gram: {"flat": flat, "lists": 2},
        torch.ops.mollm.combine_: {"flat": rows, "weights": w, "out": [torch.rand(12)]},
        torch.ops.mollm.dots: {"flat": flat, "lists": 2, "x": params},
        torch.ops.mollm.solve: {
            "gram": gram, "rule": "upgrad", "preferences": [1.0, 2.0], "normalize": False,
            "length": "mean",
        },
    }  # fmt: skip
    return [Call(f, a, [*memory, w, c, gram, *rows]) for f, a in arguments.items()]


def real_losses():
    """Valid arguments of every loss, of the ops that they are made of, and of the row kernels."""
    hidden, weight, logits, ref = (torch.rand(s) for s in ((4, 3), (7, 3), (4, 7), (4, 3)))
    bias, target, losses = torch.rand(7), torch.tensor([0, 6, -100, 3]), torch.zeros(4)
    mask, one, up = torch.tensor([True, True, False, True]), torch.ones(()), torch.ones(4)
    head = {"hidden": hidden, "weight": weight, "bias": bias}
    to = {**head, "logit_scale": 1.0, "softcap": None}
    kept = {"ref_hidden": ref, "ref_weight": weight, "ref_bias": None, "ref_logit_scale": 1.0,
            "ref_softcap": None}  # fmt: skip
    public = {"reduction": "mean", "logit_scale": 2.0, "softcap": 5.0}
    chunks = {"normalizer": 3.0, "chunk_rows": 2}
    row = {"logits": logits, "target": target.clamp(min=-1), "eps": 1e-3}
    op = torch.ops.mollm
    flat = {"eps": 1e-3, "ignore_index": -100, "logit_scale": 1.0, "softcap": None}
    wants = {"wants": [True] * 3, "chunk_rows": None}
    linear = {"target": target, "scale": one, "ignore_index": -100, **wants}
    arguments = [
        (mollm_ops.uce_loss, {"logits": logits, "target": target, "eps": 1e-3, **public}),
        (mollm_ops.linear_cross_entropy, {**head, "target": target, **public, **chunks}),
        (mollm_ops.linear_uce_loss, {**head, "target": target, "eps": 1e-3, **public, **chunks}),
        (mollm_ops.linear_kl_div,
         {**head, "ref_hidden": ref, "ref_weight": weight, "mask": mask, **public, **chunks}),
        (mollm_ops.linear_ce_kl,
         {**head, "target": target, "ref_hidden": ref, "ref_weight": weight, **public, **chunks}),
        (op.uce_rows, {"logits": logits, "target": target, **flat}),
        (op.uce_rows_backward, {"logits": logits, "target": target, "upstream": up, **flat}),
        (op.linear_ce, {**to, **linear, "eps": None, "wide_logits": False}),
        (op.linear_kl, {**to, **kept, "target": target.clamp(max=0), "scale": one, **wants}),
        (op.linear_ce_kl, {**to, **kept, **linear}),
        (log_rows, {**row, "ce": RowLoss(losses, up, torch.zeros(4, 7))}),
        (kl_rows, {"logits": logits, "ref_logits": logits.flip(1), "target": row["target"],
                   "kl": RowLoss(losses, up, torch.zeros(4, 7)),
                   "ce": RowLoss(up.clone(), up, None)}),
    ]  # fmt: skip
    touched = [hidden, weight, logits, ref, bias, target, losses, mask, up]
    return [Call(f, a, touched) for f, a in arguments]


PUBLIC_LOSSES = 5
"""How many of them users call; the others take numbers as those have checked them."""


def fake(t):
    with FakeTensorMode() as mode:
        return mode.from_tensor(t)


def freed(t):
    t = torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
    t.untyped_storage().resize_(0)
    return t


BAD_TENSORS = [
    lambda t: t.long(),
    lambda t: t.to(torch.complex64),
    lambda t: t.bool(),
    lambda t: t.to("meta"),
    lambda t: torch.zeros(*t.shape, 2),
    lambda t: torch.zeros(0),
    lambda t: t.to_sparse() if t.ndim else torch.zeros(3),
    lambda t: t.tolist(),
    fake,
    freed,
]


BAD_ROWS = [
    lambda t: t.to(torch.complex64),
    lambda t: t.to("meta") if t.ndim else t.tolist(),
    lambda t: torch.zeros(*t.shape, 2, dtype=t.dtype),
    lambda t: torch.zeros(0, dtype=t.dtype),
    lambda t: t[:-1] if t.ndim else torch.zeros(3),
    lambda t: torch.cat([t, t]) if t.ndim else torch.zeros(5),
    lambda t: t.tolist() if t.ndim else None,
    lambda t: "text",
]
IN_PLACE_OF_A_TENSOR = BAD_ROWS[-2:]
"""What no loss takes in the place of one tensor of several."""


def loss_spoils(n, name, value):
    """Functions that make an invalid argument of a loss's valid one."""
    by_users, kernels = n < PUBLIC_LOSSES, real_losses()[n].function in (log_rows, kl_rows)
    if isinstance(value, torch.Tensor):
        spoils = [*BAD_ROWS, fake] if value.ndim else BAD_ROWS[-1:]
        if kernels:
            spoils = [spoil for spoil in spoils if spoil not in IN_PLACE_OF_A_TENSOR]
        if value.dtype == torch.int64:
            spoils = [*spoils, lambda t: t.float(), lambda t: t.bool()]
            if by_users:
                spoils.append(lambda t: t + 7)
        elif value.dtype == torch.bool:
            spoils = [*spoils, lambda t: t.float()]
        else:
            spoils = [*spoils, lambda t: t.long(), lambda t: t.bool()]
            if name != "logits":
                spoils.append(lambda t: t.double())
        return spoils
    if isinstance(value, RowLoss):
        fields = {"losses": [lambda t: torch.zeros(8)[::2]], "scale": [],
                  "gradient": [lambda t: torch.zeros(7, 4).T]}  # fmt: skip
        return [
            lambda x, field=field, spoil=spoil: replaced(x, field, spoil(getattr(x, field)))
            for field, more in fields.items()
            if getattr(value, field) is not None
            for spoil in [*more, freed, *BAD_ROWS[:6], lambda t: t.double()]
        ]
    values = OUT_OF_RANGE_OF_LOSSES.get(name, ()) if by_users else ()
    return [lambda x, value=value: value for value in values]


OUT_OF_RANGE_OF_LOSSES = {
    "eps": (0.0, 1.0, -1.0, float("nan"), float("inf"), 1e-40),
    "softcap": (0.0, -1.0, float("nan"), "text"),
    "logit_scale": (0.0, -1.0, float("nan"), float("inf"), 1e-40, "text"),
    "normalizer": (0.0, -1.0, float("nan"), float("inf"), torch.ones(2), "text"),
    "reduction": ("x", "", None),
    "chunk_rows": (0, -1, "text"),
}
"""Of the public losses, and of what they hand on."""


def last_of(spoil):
    """The last tensor of a list, or of a list of lists, spoiled."""

    def spoiled(x):
        if isinstance(x[-1], list):
            return [*x[:-1], spoiled(x[-1])]
        return [*x[:-1], spoil(x[-1])]

    return spoiled


def is_list_of_tensors(x):
    return isinstance(x, list) and (isinstance(x[-1], torch.Tensor) or is_list_of_tensors(x[-1]))


def repeated(t):
    """A tensor whose elements all lie in one place."""
    return torch.rand(()).expand(t.shape)


def of_one_memory(tensors):
    """The tensors, the last one in the memory of the first."""
    return [*tensors[:-1], tensors[0].flatten()[: tensors[-1].numel()].view(tensors[-1].shape)]


WRITTEN = ("out", "params", "first", "second")


def replaced(x, field, value):
    return replace(x, **{field: value})


def fields_of(x):
    return x.__dataclass_fields__ if hasattr(x, "__dataclass_fields__") else ()


OUT_OF_RANGE = {
    "beta": (-0.1, 1.0, float("nan")),
    "beta1": (-0.1, 1.0, float("nan")),
    "beta2": (-0.1, 1.0, float("nan")),
    "eps": (-1.0, float("nan")),
    "lr": (-1.0, float("nan"), torch.ones(2), torch.tensor(-1.0)),
    "weight_decay": (-1.0, float("nan"), float("inf")),
    "rounding_seed": (-1, 2**64),
    "lists": (0, -1, 3, 2**40),
    "length": ("x", ""),
    "rule": ("x", ""),
    "preferences": ([1.0], [1.0, 2.0, 3.0], [1.0, -1.0], [1.0, float("nan")]),
}


def public_spoils(name, value):
    """Functions that make an invalid argument of a valid one."""
    if name == "gradients":
        return [lambda x: [], lambda x: [x[0], x[1][:-1]], *map(last_of, BAD_TENSORS)]
    if is_list_of_tensors(value):
        spoils = [lambda x: x[:-1], longer, lambda x: [], *map(last_of, BAD_TENSORS)]
        if name == "steps":
            spoils += [last_of(lambda t: torch.tensor(-1.0)), last_of(lambda t: t.double())]
        if name in ("exp_avg_sqs", "flat"):
            return spoils  # None is zeros there
        if name in WRITTEN and value[0].numel() >= value[-1].numel() > 1:
            spoils += [last_of(repeated), of_one_memory] if len(value) > 1 else [last_of(repeated)]
        return [*spoils, last_of(lambda t: None)]
    if isinstance(value, torch.Tensor):
        spoils = [lambda t: t.tolist(), lambda t: torch.zeros(3), lambda t: t.to(torch.complex64)]
        return spoils if name == "gram" else [*spoils, lambda t: t.to("meta"), fake]  # traceable
    spoils = [lambda x, value=value: value for value in OUT_OF_RANGE.get(name, ())]
    for field in fields_of(value):
        inner = getattr(value, field)
        spoils += [
            lambda x, field=field, spoil=spoil: replaced(x, field, spoil(getattr(x, field)))
            for spoil in public_spoils(field, inner)
        ]
    return spoils


PUBLIC_CASES = [
    (n, name, spoil)
    for n, call in enumerate(real_ops())
    for name, value in call.arguments.items()
    for spoil in public_spoils(name, value)
]


def call_public(n, name, spoil):
    call = real_ops()[n]
    arguments = {**call.arguments, name: spoil(call.arguments[name])}
    return assert_refused(call, arguments)


def test_the_ops_work_before_they_are_spoiled():
    for call in real_ops():
        call.function(**call.arguments)


LOSS_CASES = [
    (n, name, spoil)
    for n, call in enumerate(real_losses())
    for name, value in call.arguments.items()
    for spoil in loss_spoils(n, name, value)
]


def call_loss(n, name, spoil):
    call = real_losses()[n]
    arguments = {**call.arguments, name: spoil(call.arguments[name])}
    return assert_refused(call, arguments)


def test_every_registered_op_is_tried():
    tried = {str(call.function) for call in [*real_ops(), *real_losses()]}
    known = torch._C._dispatch_get_all_op_names()
    names = {name.removeprefix("mollm::") for name in known if name.startswith("mollm::")}
    names = {name.partition(".")[0] for name in names}
    joined = {"join_gradients", "join_ce", "join_kl"}  # copies of a loss, which take no pointer
    assert names - joined == {n for n in names if f"mollm.{n}" in tried}


def test_the_losses_work_before_they_are_spoiled():
    for call in real_losses():
        call.function(**call.arguments)


def test_the_losses_refuse_each_invalid_argument():
    for n, name, spoil in LOSS_CASES:
        assert call_loss(n, name, spoil), "an error without a sentence"


def test_the_ops_refuse_each_invalid_argument():
    for n, name, spoil in PUBLIC_CASES:
        message = call_public(n, name, spoil)
        assert message, "an error without a sentence"


public_calls = st.sampled_from(PUBLIC_CASES)
either = st.one_of(
    spoiled_extension_calls().map(lambda c: (call_extension, c)),
    public_calls.map(lambda c: (call_public, c)),
    st.sampled_from(LOSS_CASES).map(lambda c: (call_loss, c)),
)


def refuse(called):
    call, arguments = called
    call(*arguments)


@settings(max_examples=400, derandomize=True, deadline=None, database=None)
@given(either)
def test_a_short_round_of_invalid_calls(called):
    refuse(called)


@pytest.mark.soak
@settings(max_examples=100_000, deadline=None)
@given(either)
def test_a_long_round_of_invalid_calls(called):
    refuse(called)


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake, which is not on PATH")
def test_under_address_sanitizer(tmp_path):
    """Builds csrc/ with AddressSanitizer and UBSan, and runs this file's tests on it."""
    pybind11 = pytest.importorskip("pybind11")
    name = Path(extension.__file__).name
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), "-DMOLLM_SANITIZE=ON",
        "-DMOLLM_CUDA=0", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DMOLLM_OUTPUT_DIR={tmp_path}",
        f"-DMOLLM_OUTPUT_NAME={name}",
    ]  # fmt: skip
    subprocess.run(configure, check=True)
    subprocess.run(["cmake", "--build", str(tmp_path / "build"), "--parallel"], check=True)
    tests = (
        *("ops/test_invalid_calls", "ops/test_plain", "ops/test_gram", "ops/test_update"),
        *("ops/test_rows", "ops/test_edges", "ops/test_dual_space", "ops/test_linear_losses"),
        *("ops/test_uce", "optim/test_saved_state", "optim/test_overflow"),
    )
    for what in (
        [f"tests/{test}.py" for test in tests],
        [str(ROOT / "tests" / "fuzzed_calls.py"), "0", "--calls", "2000"],
    ):
        done = run_sanitized(tmp_path / name, *what)
        assert done.returncode == 0, done.stdout + done.stderr


def run_sanitized(built, *tests):
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={library}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for library in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    env = os.environ | {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # Python never frees all it allocates
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "tests" / "sanitized.py"), str(built), *tests]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
