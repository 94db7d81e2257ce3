"""Stateless functions on tensors: the losses, the Gram matrix and the dual-space solver."""

from mollm_ops.dual_space import (
    Solution,
    Status,
    dual_space_weights,
    min_norm_weights,
    project_weights,
    upgrad_weights,
)
from mollm_ops.gram import combine, dots, gram, gram_direction
from mollm_ops.linear_losses import (
    linear_ce_kl,
    linear_cross_entropy,
    linear_kl_div,
    linear_uce_loss,
)
from mollm_ops.uce import uce_loss

__all__ = [
    "Solution",
    "Status",
    "combine",
    "dots",
    "dual_space_weights",
    "gram",
    "gram_direction",
    "linear_ce_kl",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_uce_loss",
    "min_norm_weights",
    "project_weights",
    "uce_loss",
    "upgrad_weights",
]
