"""Stateless functions on tensors: the losses, the Gram matrix and the dual-space solver."""

from mollm_ops.dual_space import (
    Solution,
    Status,
    dual_space_weights,
    min_norm_weights,
    project_weights,
    upgrad_weights,
)
from mollm_ops.gram import combine, dots, gram, gram_direction, gram_moved
from mollm_ops.linear_losses import (
    linear_ce_kl,
    linear_cross_entropy,
    linear_kl_div,
    linear_uce_loss,
)
from mollm_ops.operands import AdamMetric, AdamWStep, RunningMeans, SgdStep, Targets
from mollm_ops.uce import uce_loss
from mollm_ops.update import update_

__all__ = [
    "AdamMetric",
    "AdamWStep",
    "RunningMeans",
    "SgdStep",
    "Solution",
    "Status",
    "Targets",
    "combine",
    "dots",
    "dual_space_weights",
    "gram",
    "gram_direction",
    "gram_moved",
    "linear_ce_kl",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_uce_loss",
    "min_norm_weights",
    "project_weights",
    "uce_loss",
    "update_",
    "upgrad_weights",
]
