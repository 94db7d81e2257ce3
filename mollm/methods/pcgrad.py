"""PCGrad on the three losses: see `mollm.optim.directions.pcgrad_weights` for the equation.

Source: Yu et al., Gradient surgery for multi-task learning, arXiv 2001.06782, algorithm 1.
"""

from __future__ import annotations

from mollm.methods.method import PREFERENCES, Method, unlearning_cross_entropy

PCGRAD = Method("pcgrad", unlearning_cross_entropy, "pcgrad", PREFERENCES)
