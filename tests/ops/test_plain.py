"""The walk that takes plain tensors past the dispatcher: it gives what the ops give, or says no."""

from collections.abc import Sequence
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mollm_ops
from mollm_ops import _plain
from mollm_ops.operands import AdamMetric, AdamWStep, RunningMeans, SgdStep, Targets
from mollm_ops.update import update_

SHAPES = [(), (5,), (3, 4), (0,), (70,)]


def lists(count=3, dtype=torch.float32):
    return [[torch.randn(s).to(dtype) for s in SHAPES] for _ in range(count)]


def by_the_ops():
    return mock.patch.object(_plain, "eager", return_value=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_both_ways_give_the_same_bits(dtype):
    rows, weights = lists(dtype=dtype), torch.rand(3)
    rows[1][2] = None
    means = RunningMeans(lists(), 0.9)
    metric = AdamMetric([torch.rand(s) for s in SHAPES], [torch.tensor(3.0)] * 5, weights)

    def results():
        return [
            mollm_ops.gram(rows),
            mollm_ops.gram_moved(rows, means, metric),
            mollm_ops.dots(rows, rows[0]),
            *mollm_ops.combine(rows, weights),
        ]

    walked = results()
    with by_the_ops():
        for a, b in zip(walked, results(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("method", [AdamWStep(1e-2, second_weights=torch.rand(3)), SgdStep(0.1)])
@pytest.mark.parametrize("proceed", [None, torch.tensor(True), torch.tensor(False)])
def test_both_ways_make_the_same_step(method, proceed):
    rows, weights = lists(), torch.rand(3)
    start = [lists(3) for _ in range(2)]
    after = []
    for way in (nullcontext(), by_the_ops()):
        params, first, second = (
            [t.clone().abs() for t in start[0][0]],
            *([t.clone().abs() for t in row] for row in start[0][1:]),
        )
        means = RunningMeans([[t.clone() for t in row] for row in start[1]], 0.5)
        adam = isinstance(method, AdamWStep)
        steps = [torch.tensor(1.0) for _ in SHAPES]
        targets = Targets(params, first, second if adam else None, steps)
        versions = [t._version for t in params]
        with way:
            changes = update_(
                rows, weights, targets, method, moving=means, proceed=proceed, track=True
            )
        if proceed is None or proceed:
            assert all(t._version > v for t, v in zip(params, versions, strict=True))
        after.append([changes, *params, *first, *second, *(t for row in means.means for t in row)])
    for a, b in zip(*after, strict=True):
        assert torch.equal(a, b)


def test_what_is_written_is_known_to_autograd():
    out = [torch.zeros(s) for s in SHAPES]
    versions = [t._version for t in out]
    mollm_ops.combine(lists(), torch.rand(3), out=out)
    assert all(t._version > v for t, v in zip(out, versions, strict=True))


def test_a_sum_may_take_the_place_of_a_list():
    rows, weights = lists(), torch.rand(3)
    expected = mollm_ops.combine(rows, weights)
    got = mollm_ops.combine(rows, weights, out=rows[1])
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


class Lazy(Sequence):
    """Makes a tensor whenever it is asked for one, and keeps none."""

    def __len__(self):
        return 2

    def __getitem__(self, n):
        if n >= 2:
            raise IndexError
        return torch.full((4,), float(n + 1))


def freed(t):
    t.untyped_storage().resize_(4)
    return t


ODD = {
    "a sequence of its own": lambda: [Lazy(), Lazy()],
    "not contiguous": lambda: [[torch.randn(3, 4).T], [torch.randn(4, 3)]],
    "negated": lambda: [[torch._neg_view(torch.randn(3))]],
    "on no device": lambda: [[torch.randn(3, device="meta")]],
    "sparse": lambda: [[torch.randn(3).to_sparse()]],
    "whole numbers": lambda: [[torch.arange(3)]],
    "of other shapes": lambda: [[torch.randn(3)], [torch.randn(1, 3)]],
    "of other lengths": lambda: [[torch.randn(3)], [torch.randn(3)] * 2],
    "freed in part": lambda: [[freed(torch.randn(3))]],
    "numbers": lambda: [[1.0]],
    "nothing": lambda: [[]],
    "a parameter without a gradient": lambda: [[torch.randn(3), None]],
    "a nested tensor": lambda: [[torch.nested.nested_tensor([torch.randn(2)])]],
    "a zero without memory": lambda: [[torch._efficientzerotensor(3)]],
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_not_plainly_in_order_is_left_to_the_op(name):
    assert _plain.gradients_of(ODD[name]()) is None


def test_more_lists_than_the_kernels_take_are_left_to_the_op():
    assert _plain.gradients_of(lists(64)) is not None
    assert _plain.gradients_of(lists(65)) is None


def test_no_call_is_made_past_what_watches_the_ops():
    assert _plain.eager()
    with FakeTensorMode():
        assert not _plain.eager()
    with torch.autograd.forward_ad.dual_level():
        assert not _plain.eager()
    torch.vmap(lambda x: pytest.fail("eager") if _plain.eager() else x)(torch.ones(2))

    seen = []

    def backend(graph, example_inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    rows = lists(2)
    compiled = torch.compile(lambda g: mollm_ops.gram(g) * 2, backend=backend, fullgraph=True)
    assert torch.equal(compiled(rows), mollm_ops.gram(rows) * 2)
    assert any("mollm.gram" in name for name in seen)


@pytest.mark.parametrize("shared", ["params", "first", "second", "gradients", "steps", "weights"])
def test_what_shares_memory_is_refused_before_anything_is_written(shared):
    memory = torch.rand(12)
    given = {
        "params": memory[:4], "first": torch.rand(4), "second": torch.rand(4),
        "gradients": torch.rand(4), "steps": torch.tensor(1.0), "weights": torch.rand(1),
    }  # fmt: skip
    views = {"steps": memory[3], "weights": memory[2:3]}
    memory[3] = 1.0
    given[shared] = memory[1:5] if shared == "params" else views.get(shared, memory[2:6])
    params = [given["params"], memory[:3] if shared == "params" else torch.rand(4)]
    if shared == "params":
        params[1] = memory[:4]
    targets = Targets(
        params, [given["first"], torch.rand(4)], [given["second"], torch.rand(4)],
        [given["steps"], torch.tensor(1.0)],
    )  # fmt: skip
    before = memory.clone()
    with pytest.raises(ValueError, match="must not share memory"):
        update_([[given["gradients"], torch.rand(4)]], given["weights"], targets, AdamWStep(0.1))
    assert torch.equal(memory, before)


def test_a_default_device_is_none_of_its_business():
    rows, params = lists(2), [torch.rand(4)]
    expected = mollm_ops.gram(rows)
    before = params[0].clone()
    with torch.device("meta"):
        assert torch.equal(mollm_ops.gram(rows), expected)
        weights = torch.ones(1, device="cpu")
        grads = [torch.ones(4, device="cpu")]
        changes = update_(
            [grads], weights, Targets(params, None, None, [torch.tensor(0.0, device="cpu")]),
            SgdStep(0.1), track=True,
        )  # fmt: skip
    assert changes.device.type == "cpu"
    torch.testing.assert_close(params[0], before - 0.1)


@pytest.mark.parametrize("count", [0, 2])
def test_proceed_that_is_not_one_number_is_refused(count):
    targets = Targets([torch.rand(4)], None, None, [torch.tensor(0.0)])
    with pytest.raises(ValueError, match="proceed must be one number"):
        update_(
            [[torch.ones(4)]], torch.ones(1), targets, SgdStep(0.1),
            proceed=torch.ones(count, dtype=torch.bool),
        )  # fmt: skip
