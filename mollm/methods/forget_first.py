"""Forget first: what keeps the rest may not hinder forgetting, see
`mollm.optim.directions.forget_first_weights`.

Source: after Reisizadeh et al., BLUR, arXiv 2506.08164.
"""

from __future__ import annotations

from mollm.methods.method import PREFERENCES, Method, unlearning_cross_entropy

FORGET_FIRST = Method("forget-first", unlearning_cross_entropy, "forget-first", PREFERENCES)
