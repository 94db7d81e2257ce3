"""update_: against its plain-Torch definition, Torch's own optimizers and float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from mollm_ops.gram import gram_moved
from mollm_ops.operands import AdamWStep, RunningMeans, SgdStep, Targets
from mollm_ops.reference.update import overflows, update_reference
from mollm_ops.update import update_

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(3,), (17, 5), (0,), (70, 33), (70001,)]
METHODS = {
    "adamw": AdamWStep(1e-2, weight_decay=0.1),
    "adamw without first moment": AdamWStep(
        1e-2, second_weights=torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    ),
    "sgd": SgdStep(0.1, weight_decay=0.1),
    "sgd with momentum": SgdStep(0.1, momentum=0.9),
    "sgd nesterov": SgdStep(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def make_targets(method, param_dtype, state_dtype, device="cpu", shapes=SHAPES):
    gen = torch.Generator().manual_seed(1)

    def some(dtype, scale):
        tensors = [torch.rand(s, generator=gen, dtype=torch.float64) for s in shapes]
        return [(scale * t).to(device=device, dtype=dtype) for t in tensors]

    adam = isinstance(method, AdamWStep)
    has_first = method.second_weights is None if adam else method.momentum > 0
    return Targets(
        some(param_dtype, 1.0),
        some(state_dtype, 0.1) if has_first else None,
        some(state_dtype, 1.0) if adam else None,
        [torch.tensor(3.0, device=device) for _ in shapes],
    )


def make_gradients(dtype, device="cpu", K=3, shapes=SHAPES):
    gen = torch.Generator().manual_seed(2)
    g = [
        [torch.randn(s, generator=gen, dtype=torch.float64).to(device, dtype) for s in shapes]
        for _ in range(K)
    ]
    g[1][0] = None
    return g


def in_double(targets):
    def wide(tensors):
        return None if tensors is None else [t.to(torch.float64, copy=True) for t in tensors]

    return Targets(
        wide(targets.params), wide(targets.first), wide(targets.second), list(targets.steps)
    )


def tensors_of(targets):
    return [*targets.params, *(targets.first or ()), *(targets.second or ())]


def weights_on(device):
    return torch.tensor([0.3, -0.7, 2.0], dtype=torch.float64, device=device)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(
    ("gradient", "param", "state"), list(itertools.product(DTYPES, repeat=3)), ids=str
)
def test_matches_float64_to_one_rounding(method, gradient, param, state, device):
    g, w = make_gradients(gradient, device), weights_on(device)
    targets = make_targets(method, param, state, device)
    exact = in_double(targets)
    wide = [[None if t is None else t.double() for t in ts] for ts in g]
    expected = update_reference(wide, w, exact, method)
    changes = update_(g, w, targets, method, track=True)
    dtypes = {gradient, *(t.dtype for t in tensors_of(targets))}
    single = 1e-14 if torch.float64 in dtypes else 1e-6
    for ours, true in zip(tensors_of(targets), tensors_of(exact), strict=True):
        eps = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours.double(), true, rtol=eps, atol=eps * 1e-2 + single)
    if param in (torch.float32, torch.float64):
        torch.testing.assert_close(changes, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_changes_are_of_the_parameters_as_stored(method, device):
    g, w = make_gradients(torch.bfloat16, device), weights_on(device)
    targets = make_targets(method, torch.bfloat16, torch.float32, device)
    before = [p.to(torch.float64, copy=True) for p in targets.params]
    changes = update_(g, w, targets, method, track=True)
    for k in range(3):
        dot = sum(
            (u.double() * (p.double() - b)).sum()
            for u, p, b in zip(g[k], targets.params, before, strict=True)
            if u is not None
        )
        torch.testing.assert_close(changes[k], dot, rtol=1e-4, atol=1e-4)


def test_adamw_is_torchs(device):
    p = torch.randn(999, device=device)
    theirs = torch.nn.Parameter(p.clone())
    opt = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    targets = Targets(
        [p], [torch.zeros_like(p)], [torch.zeros_like(p)], [torch.zeros((), device=device)]
    )
    for _ in range(5):
        g = torch.randn(999, device=device)
        theirs.grad = 0.25 * g
        opt.step()
        targets.steps[0].add_(1)
        w = torch.tensor([0.25], dtype=torch.float64, device=device)
        update_([[g]], w, targets, AdamWStep(1e-2, weight_decay=0.1))
    torch.testing.assert_close(p, theirs.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("on_host", [True, False])
def test_the_learning_rate_may_be_a_tensor(on_host, device):
    g, w = make_gradients(torch.float32, device), weights_on(device)
    ours, plain = (
        make_targets(AdamWStep(1e-2), torch.float32, torch.float32, device) for _ in "ab"
    )
    update_(g, w, ours, AdamWStep(torch.tensor(0.5, device="cpu" if on_host else device)))
    update_(g, w, plain, AdamWStep(0.5))
    for a, b in zip(tensors_of(ours), tensors_of(plain), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_same_bits_for_any_number_of_threads(method):
    def run(threads):
        shapes = [(700_001,), (3, 7)]
        g = make_gradients(torch.bfloat16, shapes=shapes)
        targets = make_targets(method, torch.bfloat16, torch.float32, shapes=shapes)
        torch.set_num_threads(threads)
        changes = update_(g, weights_on("cpu"), targets, method, rounding_seed=3, track=True)
        return [*tensors_of(targets), changes]

    threads = torch.get_num_threads()
    try:
        results = [run(n) for n in (1, 2, 5)]
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_running_means_move_and_take_the_gradients_place(device):
    method, w = AdamWStep(1e-2), weights_on(device)
    g = make_gradients(torch.float32, device)
    means = [[None if t is None else torch.full_like(t, 0.5) for t in ts] for ts in g]
    expected = [[None if t is None else 0.45 + 0.1 * t for t in ts] for ts in g]
    ours, plain = (make_targets(method, torch.float32, torch.float32, device) for _ in range(2))
    update_(g, w, ours, method, moving=RunningMeans(means, 0.9))
    update_(expected, w, plain, method)
    for row, true in zip(means, expected, strict=True):
        for mean, t in zip(row, true, strict=True):
            assert (mean is None) == (t is None)
            if t is not None:
                torch.testing.assert_close(mean, t)
    for a, b in zip(tensors_of(ours), tensors_of(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_slow_mean_takes_its_small_share_to_the_last_digit(device):
    g, mean = torch.ones(99, device=device), torch.zeros(99, device=device)
    w, moving = torch.ones(1, dtype=torch.float64, device=device), RunningMeans([[mean]], 0.9999)
    G = gram_moved([[g]], moving)
    torch.testing.assert_close(float(G), 99e-8, rtol=1e-6, atol=0)
    targets = Targets([g.clone()], None, None, [torch.ones((), device=device)])
    update_([[g]], w, targets, SgdStep(0.1), moving=moving)
    torch.testing.assert_close(mean, torch.full_like(mean, 1e-4), rtol=1e-6, atol=0)


def test_stochastic_rounding_has_the_exact_mean_where_nearest_loses_the_step(device):
    count, steps = 20_000, 40
    p = torch.ones(count, dtype=torch.bfloat16, device=device)
    g = torch.ones(count, device=device)
    w = torch.ones(1, dtype=torch.float64, device=device)
    still = p.clone()
    for t in range(1, steps + 1):
        step = [torch.tensor(float(t), device=device)]
        update_([[g]], w, Targets([p], None, None, step), SgdStep(1e-4), rounding_seed=7)
        update_([[g]], w, Targets([still], None, None, step), SgdStep(1e-4))
    assert torch.equal(still, torch.ones_like(still))
    # Rounding 1 − n·1e-4 to multiples of 2^-8 has a standard deviation of at most 2^-9 per step.
    error = abs(float(p.double().mean()) - (1 - steps * 1e-4))
    assert error < 5 * 2**-9 * (steps / count) ** 0.5


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_stochastic_rounding_has_the_same_bits_as_its_definition(method, device):
    g, w = make_gradients(torch.float64, device), weights_on(device)
    ours, true = (make_targets(method, torch.bfloat16, torch.bfloat16, device) for _ in range(2))
    update_(g, w, ours, method, rounding_seed=2**40 + 5)
    update_reference(g, w, true, method, rounding_seed=2**40 + 5)
    for a, b in zip(tensors_of(ours), tensors_of(true), strict=True):
        # A float64 result next to a boundary may round to either float first.
        assert (a == b).double().mean() > 0.999 if a.numel() > 1000 else torch.equal(a, b)


def test_special_values_survive_stochastic_rounding(device):
    p = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0] * 3, device=device)
    p = p.bfloat16()
    before = p.clone()
    targets = Targets([p], None, None, [torch.tensor(1.0, device=device)])
    w = torch.zeros(1, dtype=torch.float64, device=device)
    update_([[torch.ones(15, device=device)]], w, targets, SgdStep(0.1), rounding_seed=1)
    assert torch.equal(p.nan_to_num(7.0), before.nan_to_num(7.0))


def test_where_it_must_not_proceed_nothing_is_written(device):
    method, w = AdamWStep(1e-2), weights_on(device)
    targets = make_targets(method, torch.float32, torch.float32, device)
    before = [t.clone() for t in tensors_of(targets)]
    no = torch.tensor(False, device=device)
    g = make_gradients(torch.float32, device)
    means = [[None if t is None else torch.zeros_like(t) for t in ts] for ts in g]
    changes = update_(
        g, w, targets, method, moving=RunningMeans(means, 0.9), proceed=no, track=True
    )
    assert torch.equal(changes, torch.zeros_like(changes))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(targets), before, strict=True))
    assert not any(t.any() for row in means for t in row if t is not None)


@pytest.mark.parametrize("K", [9, 12])
def test_more_than_eight_lists(K, device):
    g = [[torch.full((5,), float(k), device=device)] for k in range(K)]
    p = torch.zeros(5, device=device)
    w = torch.ones(K, dtype=torch.float64, device=device)
    targets = Targets([p], None, None, [torch.ones((), device=device)])
    changes = update_(g, w, targets, SgdStep(1.0), track=True)
    down = K * (K - 1) / 2
    assert torch.equal(p, torch.full_like(p, -down))
    torch.testing.assert_close(
        changes, -5 * down * torch.arange(K, dtype=torch.float64, device=device)
    )


def test_strided_gradients_parameters_and_misaligned_views(device):
    base = torch.randn(40, 30, device=device)
    for p in (base.clone().t(), base.clone()[:, 1:], base.clone().reshape(-1)[1:]):
        g = torch.randn(p.shape[::-1], device=device)
        g = g.permute(*reversed(range(g.ndim)))
        expected = p - 0.5 * g
        w = torch.ones(1, dtype=torch.float64, device=device)
        update_([[g]], w, Targets([p], None, None, [torch.ones((), device=device)]), SgdStep(0.5))
        torch.testing.assert_close(p, expected)


@pytest.mark.parametrize("step", [update_, update_reference])
def test_a_gradient_of_weight_zero_may_be_infinite(step):
    p, g = torch.zeros(20), torch.full((20,), float("inf"))
    w = torch.tensor([1.0, 0.0], dtype=torch.float64)
    step([[torch.ones(20)], [g]], w, Targets([p], None, None, [torch.ones(())]), SgdStep(1.0))
    assert torch.equal(p, -torch.ones(20))


def test_a_square_that_float32_cannot_hold_overflows_though_the_moment_would_not():
    p = torch.zeros(3)
    targets = Targets([p], None, [torch.zeros(3, dtype=torch.float32)], [torch.ones(())])
    one = torch.ones(1, dtype=torch.float64)
    for g, over in ((1.8446e19, False), (1.844674e19, True)):
        found = overflows([[torch.full((3,), g)]], one, targets, AdamWStep(1e-3, beta2=0.99))
        assert bool(found) is over


def test_autograd_notices_that_a_saved_tensor_has_changed():
    p = torch.randn(4, requires_grad=True)
    loss = (p * p).sum()
    w = torch.ones(1, dtype=torch.float64)
    update_([[torch.ones(4)]], w, Targets([p], None, None, [torch.ones(())]), SgdStep(1.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_mismatches_are_named():
    p, g, one = torch.zeros(3), torch.zeros(3), [torch.ones(())]
    w = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="weights must have one entry per list"):
        update_([[g], [g]], w, Targets([p], None, None, one), SgdStep(1.0))
    with pytest.raises(ValueError, match="second must hold AdamW's second moments"):
        update_([[g]], w, Targets([p], None, None, one), AdamWStep(1.0))
    with pytest.raises(ValueError, match=r"targets.first\[0\] must have shape \(3,\)"):
        update_([[g]], w, Targets([p], [torch.zeros(2)], None, one), SgdStep(1.0, 0.9))
    with pytest.raises(TypeError, match=r"targets.steps\[0\] must be float32"):
        update_([[g]], w, Targets([p], None, None, [torch.ones((), dtype=torch.int64)]), SgdStep(1))
    with pytest.raises(ValueError, match=r"means\[0\]\[0\] must be a contiguous tensor"):
        update_(
            [[g]],
            w,
            Targets([p], None, None, one),
            SgdStep(1.0),
            moving=RunningMeans([[None]], 0.9),
        )


def test_plain_torch_steps_in_slices(monkeypatch):
    """The same numbers, noise included, and no copies of a whole parameter."""
    method = AdamWStep(1e-2, second_weights=torch.full((3,), 1 / 3, dtype=torch.float64))
    ends = []
    for chunk in (1 << 22, 1000):
        monkeypatch.setattr("mollm_ops.reference.gram._CHUNK", chunk)
        g, targets = make_gradients(torch.bfloat16), make_targets(method, *[torch.bfloat16] * 2)
        means = [[torch.ones(s, dtype=torch.bfloat16) for s in SHAPES] for _ in g]
        moving = RunningMeans(means, 0.9)
        changes = update_reference(
            g, weights_on("cpu"), targets, method, moving=moving, rounding_seed=7
        )
        ends.append([*tensors_of(targets), *(t for row in means for t in row)])
        ends.append([changes])
    assert all(map(torch.equal, ends[0], ends[2]))
    torch.testing.assert_close(ends[1], ends[3])


def test_parameter_and_states_draw_noise_of_their_own():
    """Not that of a neighbouring element, as keys that differ in one bit would."""
    n, step = 4096, SgdStep(0.0, momentum=0.5)
    value = torch.full((n,), 1 + 2.0**-8)  # half-way between two bfloat16
    x, b = torch.ones(n, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.bfloat16)
    targets = Targets([x], [b], None, [torch.ones(())])
    update_([[value]], torch.ones(1), targets, step, rounding_seed=5)
    first = b != 1
    x.zero_()
    update_([[-value]], torch.ones(1), Targets([x], None, None, targets.steps), SgdStep(1.0),
            rounding_seed=5)  # fmt: skip
    param = x != 1
    at = torch.arange(n)
    for other in range(4):
        assert 0.4 < float((first == param[at ^ other]).float().mean()) < 0.6
