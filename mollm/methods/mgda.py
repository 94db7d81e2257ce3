"""MGDA on the three losses: the shortest vector in the convex hull of their gradients.

    d = Σ w_k g_k,   w = argmin |Σ_k w_k g_k|²   over w ≥ 0, Σ_k w_k = 1

Source: Désidéri, Multiple-gradient descent algorithm, 2012.
"""

from __future__ import annotations

from mollm.methods.method import Method, unlearning_cross_entropy

MGDA = Method("mgda", unlearning_cross_entropy, "mgda")
