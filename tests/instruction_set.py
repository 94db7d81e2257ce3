"""What every kind of kernel of the CPU computes, against plain references in float64.

`python tests/instruction_set.py` prints, as JSON, the instruction set and the largest error of each
kernel relative to what its dtype can hold.
"""

from __future__ import annotations

import json

import torch

from mollm_ops import combine, dots, gram, linear_ce_kl, linear_uce_loss
from mollm_ops._extension import extension
from mollm_ops.gram import gram_moved
from mollm_ops.operands import AdamMetric, AdamWStep, RunningMeans, Targets
from mollm_ops.reference import gram_reference
from mollm_ops.reference.update import update_reference
from mollm_ops.update import update_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (3, 40, 5000)
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def main():
    torch.set_num_threads(1)
    errors = {}
    for dtype in DTYPES:
        for K in (1, 3, 6, 7):
            name = f"{str(dtype).removeprefix('torch.')}, K={K}"
            errors |= {f"{what}, {name}": e for what, e in of_lists(dtype, K).items()}
        errors |= {f"{what}, {dtype}": e for what, e in of_losses(dtype).items()}
        errors |= {f"{what}, {dtype}": e for what, e in of_special_numbers(dtype).items()}
    print(json.dumps({"instruction set": extension.cpu_instruction_set(), "errors": errors}))


def of_lists(dtype, K):
    rng = torch.Generator().manual_seed(K)

    def some(make=torch.randn):
        return [make(n, generator=rng).to(dtype) for n in SIZES]

    gradients = [some() for _ in range(K)]
    means = RunningMeans([some() for _ in range(K)], beta=0.75)
    weights = torch.linspace(0.5, 1.5, K, dtype=torch.float64)
    steps = [torch.tensor(3.0) for _ in SIZES]
    metric = AdamMetric(some(torch.rand), steps, weights.square())
    rows = [[g.double() for g in row] for row in gradients]
    moved = [
        [(0.75 * m.double() + 0.25 * g).to(dtype).double() for g, m in zip(row, mean, strict=True)]
        for row, mean in zip(rows, means.means, strict=True)
    ]
    columns = zip(*rows, strict=True)
    d = [sum(w * g for w, g in zip(weights, column, strict=True)) for column in columns]
    products = torch.stack([sum(g @ x for g, x in zip(row, d, strict=True)) for row in rows])
    told = dots(gradients, [x.float() for x in d])
    sums = zip(combine(gradients, weights), d, strict=True)
    found = {
        "Gram matrix": gram_error(gram(gradients), gram_reference(rows)),
        "in the metric": gram_error(
            gram_moved(gradients, None, metric), gram_reference(scaled(rows, metric))
        ),
        "of means": gram_error(gram_moved(gradients, means, None), gram_reference(moved)),
        "of means in the metric": gram_error(
            gram_moved(gradients, means, metric), gram_reference(scaled(moved, metric))
        ),
        "weighted sum": max(rounding_error(x, e, K + 1) for x, e in sums),
        "products": (told - products).abs().max() / products.abs().max() / 2.0**-18,
        "step": of_a_step(gradients, weights, metric, dtype),
    }
    return {what: float(error) for what, error in found.items()}


def of_special_numbers(dtype):
    """0 where Torch's own rounding and what is not finite come out, else more than 1."""
    sizes = torch.logspace(-9, 6, 4096, dtype=torch.float64)
    wide = torch.randn(4096, generator=torch.Generator().manual_seed(0)).double().mul(sizes).float()
    wide[:5] = torch.tensor([0.0, float("inf"), -float("inf"), float("nan"), 6e-8])
    rounded = [torch.empty_like(wide, dtype=dtype)]
    combine([[wide]], torch.ones(1), out=rounded)
    back = combine([[wide.to(dtype)]], torch.ones(1))
    wrong = {
        "rounding": not torch.equal(rounded[0].nan_to_num(7), wide.to(dtype).nan_to_num(7)),
        "reading": not torch.equal(back[0].nan_to_num(7), wide.to(dtype).nan_to_num(7)),
    }
    for K in (6, 7):
        for place in (0, 71):  # in a whole vector, and in the last, partial one
            rows = [[torch.ones(72, dtype=dtype)] for _ in range(K)]
            rows[K - 1][0][place] = float("inf")
            G = gram(rows)
            seen = not G[K - 1].isfinite().any() and (G[: K - 1, : K - 1] == 72).all()
            wrong[f"infinity at {place} of {K}"] = not seen
    small, large = torch.full((72,), 2.0**-130), torch.full((72,), 2.0**60)
    rows = [[small.to(dtype)], *[[large.to(dtype)] for _ in range(5)]]
    exact = gram_reference([[g.double() for g in row] for row in rows])
    if dtype != torch.float16:  # which has neither number
        wrong["numbers below the smallest normal float"] = gram_error(gram(rows), exact) > 1
    return {what: 2.0 * bool(is_wrong) for what, is_wrong in wrong.items()}


def gram_error(G, exact):
    lengths = exact.diagonal().sqrt()
    return ((G - exact) / (lengths[:, None] * lengths)).abs().max() / 2.0**-20


def rounding_error(x, exact, roundings):
    return ((x.double() - exact).abs() / (roundings * ROUNDING[x.dtype] * (1 + exact.abs()))).max()


def scaled(rows, metric):
    """√P g of rows in float64."""
    found = [[] for _ in rows]
    for n, (second, step) in enumerate(zip(metric.exp_avg_sqs, metric.steps, strict=True)):
        square = sum(w * row[n].square() for w, row in zip(metric.weights, rows, strict=True))
        v = metric.beta2 * second.double() + (1 - metric.beta2) * square
        correction = 1 - metric.beta2 ** (float(step) + 1)
        root = ((v / correction).sqrt() + metric.eps).sqrt()
        for mine, row in zip(found, rows, strict=True):
            mine.append(row[n] / root)
    return found


def of_a_step(gradients, weights, metric, dtype):
    def targets(of):
        rng = torch.Generator().manual_seed(7)
        params, first = (
            [torch.randn(n, generator=rng).to(dtype).to(of) for n in SIZES] for _ in "ab"
        )
        second = [v.clone().to(of) for v in metric.exp_avg_sqs]
        return Targets(params, first, second, [torch.tensor(4.0) for _ in SIZES])

    method = AdamWStep(lr=0.1, second_weights=metric.weights)
    ours, exact = targets(dtype), targets(torch.float64)
    update_(gradients, weights, ours, method)
    update_reference([[g.double() for g in row] for row in gradients], weights, exact, method)
    pairs = zip(ours.params, exact.params, strict=True)
    return max(rounding_error(p, e, 4) for p, e in pairs)


def of_losses(dtype):
    rng = torch.Generator().manual_seed(1)
    hidden, head, other = (torch.randn(n, 32, generator=rng).to(dtype) / 3 for n in (9, 301, 9))
    target = torch.randint(301, (9,), generator=rng)
    losses = {
        "UCE": lambda h, w, r: linear_uce_loss(h, w, target),
        "CE + KL": lambda h, w, r: sum(linear_ce_kl(h, w, target, r, w)),
        "CE + KL, capped": lambda h, w, r: sum(linear_ce_kl(h, w, target, r, w, softcap=5.0)),
    }
    found = {}
    for what, loss in losses.items():
        gradients = []
        for of in (dtype, torch.float64):
            h = hidden.detach().to(of, copy=True).requires_grad_()
            torch.autograd.backward(loss(h, head.to(of), other.to(of)))
            gradients.append(h.grad.double())
        ours, exact = gradients
        found[what] = float((ours - exact).abs().max() / exact.abs().max() / (16 * ROUNDING[dtype]))
    return found


if __name__ == "__main__":
    main()
