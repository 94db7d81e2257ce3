"""The three losses of MOLLM, added up with fixed weights.

    L = c_f UCE_forget + c_k KL(original ‖ model) + c_r CE_retain

What the common descent directions are compared with: the same losses, without a choice of
direction.
"""

from __future__ import annotations

from mollm.methods.method import PREFERENCES, Method, unlearning_cross_entropy

WEIGHTED_SUM = Method("sum", unlearning_cross_entropy, "sum", PREFERENCES)
