"""Retain first: forgetting may not harm what is kept.

See `mollm.optim.directions.retain_first_weights`.

Source: after Zhou et al., Geometric-disentanglement unlearning, arXiv 2511.17100.
"""

from __future__ import annotations

from mollm.methods.method import PREFERENCES, Method, unlearning_cross_entropy

RETAIN_FIRST = Method("retain-first", unlearning_cross_entropy, "retain-first", PREFERENCES)
