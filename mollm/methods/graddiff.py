"""Gradient difference: ascent on the forget set, descent on the retain set.

    L = −CE_forget + CE_retain

Source: Liu et al., Continual learning and private unlearning, arXiv 2203.12817; Maini et al., TOFU,
arXiv 2401.06121, section 3.2.
"""

from __future__ import annotations

from mollm.methods.gradient_ascent import negative_cross_entropy
from mollm.methods.method import Method

GRADDIFF = Method("graddiff", negative_cross_entropy, "sum", (1.0, 0.0, 1.0))
