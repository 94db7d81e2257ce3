"""Retain first: forgetting may not harm what is kept, see `mollm.rules.retain_first_weights`.

Source: after Zhou et al., Geometric-disentanglement unlearning, arXiv 2511.17100.
"""

from __future__ import annotations

from mollm.methods.method import Method, unlearning_cross_entropy
from mollm.settings import PREFERENCES

RETAIN_FIRST = Method("retain-first", unlearning_cross_entropy, "retain-first", PREFERENCES)
