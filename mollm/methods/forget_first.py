"""Forget first: what keeps the rest may not hinder forgetting, see
`mollm.rules.forget_first_weights`.

Source: after Reisizadeh et al., BLUR, arXiv 2506.08164.
"""

from __future__ import annotations

from mollm.methods.method import Method, unlearning_cross_entropy
from mollm.settings import PREFERENCES

FORGET_FIRST = Method("forget-first", unlearning_cross_entropy, "forget-first", PREFERENCES)
