"""Every op as it is defined: plain Torch, any dtype and device."""

from mollm_ops.reference.gram import (
    combine_reference,
    gram_reference,
    moved_means_reference,
    scaled_by_metric_reference,
)
from mollm_ops.reference.losses import (
    ce_rows_reference,
    kl_rows_reference,
    linear_ce_kl_reference,
    linear_cross_entropy_reference,
    linear_kl_div_reference,
    linear_uce_loss_reference,
    project,
    reduce_rows,
    uce_loss_reference,
)
from mollm_ops.reference.update import overflows, update_reference

__all__ = [
    "ce_rows_reference",
    "combine_reference",
    "gram_reference",
    "kl_rows_reference",
    "linear_ce_kl_reference",
    "linear_cross_entropy_reference",
    "linear_kl_div_reference",
    "linear_uce_loss_reference",
    "moved_means_reference",
    "overflows",
    "project",
    "reduce_rows",
    "scaled_by_metric_reference",
    "uce_loss_reference",
    "update_reference",
]
