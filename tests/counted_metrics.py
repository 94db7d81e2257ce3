"""Metrics by counting, slow and plain, to compare with."""

from __future__ import annotations

import math


def exact_ks_p_value(one, two):
    """P(D >= d) over all orderings of both samples, by counting lattice paths."""
    n, m = len(one), len(two)

    def distance(i, j):
        return abs(i * m - j * n)

    merged = sorted([(x, 0) for x in one] + [(x, 1) for x in two])
    at, d = [0, 0], 0
    for _, side in merged:
        at[side] += 1
        d = max(d, distance(*at))
    inside = [[0] * (m + 1) for _ in range(n + 1)]
    for i in range(n + 1):
        for j in range(m + 1):
            if distance(i, j) >= d:
                continue
            before = (inside[i - 1][j] if i else 0) + (inside[i][j - 1] if j else 0)
            inside[i][j] = before if i or j else 1
    return 1 - inside[n][m] / math.comb(n + m, n)


def longest_common(one, two):
    table = [[0] * (len(two) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(two):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
            )
    return table[-1][-1]
