"""PCGrad on the three losses: see `mollm.rules.pcgrad_weights` for the equation.

Source: Yu et al., Gradient surgery for multi-task learning, arXiv 2001.06782, algorithm 1.
"""

from __future__ import annotations

from mollm.methods.method import Method, unlearning_cross_entropy
from mollm.settings import PREFERENCES

PCGRAD = Method("pcgrad", unlearning_cross_entropy, "pcgrad", PREFERENCES)
