"""gram, combine, dots and gram_direction against float64, and on every awkward input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mollm_ops import Status, _extension, combine, dots, gram, gram_direction
from mollm_ops._extension import extension
from mollm_ops.gram import gram_moved
from mollm_ops.operands import AdamMetric, RunningMeans
from mollm_ops.reference.gram import (
    combine_reference,
    gram_reference,
    moved_means_reference,
    scaled_by_metric_reference,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(3,), (17, 5), (1,), (0,), (64, 33), (2, 3, 4), (70001,)]


def gradients(K, dtype=torch.float32, shapes=SHAPES, device="cpu"):
    return [[torch.randn(s, device=device).to(dtype) for s in shapes] for _ in range(K)]


def relative_error(G, exact):
    norms = exact.diagonal().sqrt()
    return float(((G - exact) / (norms[:, None] * norms)).abs().max())


def devices():
    return ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=devices())
def device(request):
    return request.param


def test_the_extension_is_built():
    assert extension is not None, "install with a C++ compiler: `pip install .`"
    assert extension.cpu_instruction_set() in ("avx512bf16", "avx512", "avx2", "baseline")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [1, 2, 3, 4, 5, 7, 8, 10, 12])
def test_gram_matches_float64(K, dtype, device):
    g = gradients(K, dtype, device=device)
    exact = gram_reference(g)
    limit = 1e-13 if dtype == torch.float64 else 2e-7
    assert relative_error(gram(g), exact) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_is_rounded_once(dtype, device):
    g = gradients(3, dtype, device=device)
    w = torch.tensor([0.3, -1.7, 12.0], device=device)
    exact = combine_reference([[t.double() for t in ts] for ts in g], w.double())
    for out, d in zip(combine(g, w), exact, strict=True):
        assert out.dtype == dtype
        torch.testing.assert_close(
            out.double(), d, rtol=torch.finfo(dtype).eps, atol=4e-6 * (dtype != torch.float64)
        )


def test_mixed_dtypes_and_missing_tensors(device):
    g = [
        [torch.randn(50, 7).bfloat16(), None, torch.randn(3).half(), None],
        [torch.randn(50, 7), torch.randn(4).double(), None, None],
        [torch.randn(50, 7).half(), torch.randn(4), torch.randn(3), None],
    ]
    g = [[None if t is None else t.to(device) for t in ts] for ts in g]
    G = gram(g)
    torch.testing.assert_close(G, gram_reference(g), rtol=1e-6, atol=1e-5)
    w = torch.tensor([1.0, 2.0, -3.0], device=device)
    out, exact = combine(g, w), combine_reference(g, w)
    assert [None if t is None else t.dtype for t in out] == [
        torch.bfloat16,
        torch.float64,
        torch.float16,
        None,
    ]
    for a, b in zip(out[:3], exact[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:mollm_ops was installed without")
@pytest.mark.parametrize("K", [3, 9])
def test_a_parameter_without_any_gradient_in_plain_torch(K, device, monkeypatch):
    monkeypatch.setattr(_extension, "extension", None)
    g = [[None, *row] for row in gradients(K, shapes=[(5,), (7, 3)], device=device)]
    torch.testing.assert_close(gram(g), gram_reference(g), rtol=1e-6, atol=1e-5)


def test_non_contiguous_and_misaligned_tensors(device):
    base = torch.randn(101, 67, device=device)
    wide = torch.randn(101 * 67 + 1, device=device)
    g = [[base], [torch.randn(67, 101, device=device).T], [wide[1:].view(101, 67)]]
    torch.testing.assert_close(gram(g), gram_reference(g), rtol=1e-6, atol=1e-4)
    out = [torch.empty(67, 101, device=device).T]
    w = torch.tensor([1.0, -2.0, 0.5], device=device)
    combine(g, w, out=out)
    torch.testing.assert_close(out[0], combine_reference(g, w)[0], rtol=1e-5, atol=1e-5)


def test_combine_in_place_of_a_list():
    g = gradients(2)
    expected = combine_reference(g, torch.tensor([2.0, 3.0]))
    out = combine(g, torch.tensor([2.0, 3.0]), out=g[0])
    for a, b, own in zip(out, expected, g[0], strict=True):
        assert a is own
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_strided_weights():
    g = gradients(2, shapes=[(5,)])
    strided = torch.tensor([[2.0, 9.0], [3.0, 9.0]], dtype=torch.float64)[:, 0]
    torch.testing.assert_close(combine(g, strided)[0], 2 * g[0][0] + 3 * g[1][0])


def test_weight_zero_keeps_an_infinity_out():
    g = [[torch.tensor([1.0, 2.0])], [torch.tensor([float("inf"), float("nan")])]]
    assert combine(g, torch.tensor([2.0, 0.0]))[0].tolist() == [2.0, 4.0]


def test_half_precision_specials_survive_combine():
    values = torch.tensor([65504.0, 6e-8, -6.1e-5, 0.0, float("inf"), float("nan")] * 4)
    for dtype in (torch.float16, torch.bfloat16):
        x = values.to(dtype)
        got = combine([[x]], torch.ones(1))[0]
        torch.testing.assert_close(got, x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_to_sixteen_bits_equals_torch(dtype):
    wide = torch.randn(4096, dtype=torch.float64).mul(torch.logspace(-9, 6, 4096).double())
    x = wide.float()
    out = [torch.empty_like(x, dtype=dtype)]
    combine([[x]], torch.ones(1), out=out)
    torch.testing.assert_close(out[0], x.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_equal_over_runs_and_threads(dtype):
    g = gradients(3, dtype, shapes=[(300_001,), (77,), (512, 1024)])
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 4, 7) * 4:
            torch.set_num_threads(n)
            results.append(gram(g))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


def test_dots_keep_the_digits_of_a_small_update():
    g = gradients(3)
    x = [torch.randn(s) for s in SHAPES]
    step = [1e-5 * torch.randn(s) for s in SHAPES]
    moved = [a + b for a, b in zip(x, step, strict=True)]
    exact = torch.stack(
        [
            sum(
                (t.double() * (b.double() - a.double())).sum()
                for t, a, b in zip(ts, x, moved, strict=True)
            )
            for ts in g
        ]
    )
    torch.testing.assert_close(dots(g, moved) - dots(g, x), exact, rtol=1e-8, atol=1e-11)


def test_direction_descends_on_every_objective():
    g = gradients(3)
    d, G, solution = gram_direction(g)
    assert solution.status is Status.DUAL
    torch.testing.assert_close(G, gram(g), rtol=0, atol=0)
    assert (dots(g, d) > 0).all()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=6),
    K=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_gram_on_any_list_of_sizes(sizes, K, seed):
    gen = torch.Generator().manual_seed(seed)
    g = [[torch.randn(n, generator=gen) for n in sizes] for _ in range(K)]
    flat = torch.stack([torch.cat(ts).double() for ts in g])
    torch.testing.assert_close(gram(g), flat @ flat.T, rtol=1e-6, atol=1e-5)


def test_a_compiled_graph_has_no_break():
    def f(a, b):
        d, G, solution = gram_direction([[a, b], [b, a]])
        return d[0] + d[1], G, solution.weights

    a, b = torch.randn(8, 8), torch.randn(8, 8)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(a, b), f(a, b), strict=True):
        torch.testing.assert_close(x, y)


def test_opcheck():
    flat = [torch.randn(5), None, torch.randn(5), torch.randn(3)]
    torch.library.opcheck(torch.ops.mollm.gram.default, (flat, 2))
    torch.library.opcheck(
        torch.ops.mollm.combine_.default,
        ([torch.randn(5), torch.randn(5)], torch.ones(2).double(), [torch.empty(5)]),
    )
    torch.library.opcheck(
        torch.ops.mollm.dots.default, ([torch.randn(5), torch.randn(5)], 2, [torch.randn(5)])
    )


ERRORS = [
    ([], "gradients must hold at least one list"),
    ([[None], [None]], "every entry is None"),
    ([[torch.ones(2)], []], r"gradients\[1\] must have as many tensors as gradients\[0\] \(1\)"),
    ([[torch.ones(2)], [torch.ones(3)]], r"gradients\[1\]\[0\] must have the shape"),
    ([[torch.ones(2)], [torch.ones(2, device="meta")]], r"gradients\[1\]\[0\] must be on cpu"),
]


@pytest.mark.parametrize(("g", "message"), ERRORS, ids=[e[1][:30] for e in ERRORS])
def test_bad_lists_name_the_first_offender(g, message):
    with pytest.raises(ValueError, match=message):
        gram(g)


def test_bad_dtypes_layouts_weights_and_out():
    x = [[torch.ones(2)]]
    with pytest.raises(TypeError, match=r"gradients\[0\]\[0\] must be one of .*int64"):
        gram([[torch.ones(2, dtype=torch.int64)]])
    with pytest.raises(TypeError, match="must be dense"):
        gram([[torch.ones(2).to_sparse()]])
    with pytest.raises(
        ValueError, match=r"weights must have one entry per list of gradients \(1\)"
    ):
        combine(x, torch.ones(2))
    with pytest.raises(ValueError, match=r"out\[0\] must have shape \(2,\)"):
        combine(x, torch.ones(1), out=[torch.ones(3)])
    with pytest.raises(ValueError, match="out must have 1 tensors"):
        combine(x, torch.ones(1), out=[])


# ---- running means and Adam's metric


def moved_inputs(K, dtype, device):
    g = gradients(K, dtype, device=device)
    g[0][1] = None
    means = [[None if t is None else torch.randn_like(t) for t in ts] for ts in g]
    second = [torch.rand(s, device=device).to(dtype) for s in SHAPES]
    steps = [torch.tensor(float(n), device=device) for n in range(len(SHAPES))]
    weights = torch.full((K,), 1 / K, dtype=torch.float64, device=device)
    return g, RunningMeans(means, 0.9), AdamMetric(second, steps, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [1, 2, 3, 5, 8, 12])
def test_gram_moved_matches_its_definition(K, dtype, device):
    g, moving, metric = moved_inputs(K, dtype, device)
    held = [[None if t is None else t.clone() for t in ts] for ts in moving.means]
    # A mean that falls between two bfloat16 may be rounded to either: float32 or float64 decides.
    limit = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 3e-3)
    for m, p in ((moving, None), (None, metric), (moving, metric)):
        rows = g if m is None else moved_means_reference(g, m)
        exact = gram_reference(rows if p is None else scaled_by_metric_reference(rows, p))
        assert relative_error(gram_moved(g, m, p), exact) <= limit
    for row, before in zip(moving.means, held, strict=True):
        assert all(a is b or torch.equal(a, b) for a, b in zip(row, before, strict=True))


def test_the_metric_of_one_gradient_is_adams():
    g, v = torch.randn(1000), torch.rand(1000)
    metric = AdamMetric([v], [torch.tensor(4.0)], torch.ones(1, dtype=torch.float64))
    moment = 0.999 * v.double() + 0.001 * g.double() ** 2
    P = 1 / ((moment / (1 - 0.999**5)).sqrt() + 1e-8)
    expected = (P * g.double() ** 2).sum()
    torch.testing.assert_close(gram_moved([[g]], None, metric)[0, 0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("K", [1, 3, 8, 9])
def test_the_metric_says_where_the_second_moment_cannot_be_stored(K, state, device):
    dtype = torch.float32
    g = [[torch.rand(100, device=device)] for _ in range(K)]
    weights = torch.ones(K, dtype=torch.float64, device=device)
    v = torch.rand(100, device=device).to(state)
    metric = AdamMetric([v], [torch.tensor(4.0, device=device)], weights)
    limit = min(torch.finfo(state).max / 1e-3, torch.finfo(dtype).max) ** 0.5
    for factor, fits in ((0.99, True), (1.01, False)):
        g[-1][0][57] = factor * limit
        for computed in (
            gram_moved(g, None, metric),
            gram_reference(scaled_by_metric_reference(g, metric)),
        ):
            assert bool(computed.isfinite().all()) is fits
    held = torch.finfo(state).max
    v[3] = held
    g[-1][0][57] = 1.0
    assert gram_moved(g, None, metric).isfinite().all()  # 0.999 of it is left
    g[-1][0][3] = min(held, 1e37) ** 0.5 * 2
    assert gram_moved(g, None, metric).isfinite().all() == (state != torch.float16)


def test_a_gradient_without_a_mean_is_named():
    with pytest.raises(
        ValueError, match=r"means\[0\]\[0\] must be a contiguous tensor, but got None"
    ):
        gram_moved([[torch.ones(3)]], RunningMeans([[None]], 0.9))
