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

__all__ = [
    "Solution",
    "Status",
    "combine",
    "dots",
    "dual_space_weights",
    "gram",
    "gram_direction",
    "min_norm_weights",
    "project_weights",
    "upgrad_weights",
]
