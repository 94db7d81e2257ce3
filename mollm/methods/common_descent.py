"""MOLLM: unlearning cross-entropy, KL and retain loss along a common descent direction.

    d in {d : g_k · P d < 0 for all k}

`mollm`, the default of this package, takes the cone in the metric P of AdamW's preconditioner, so
that the update really applied descends on all three, and its direction `upgrad`, the mean of the
projections of the single gradients. With P = 1 stand beside it: `dual`, the centre of the cone (the
paper's), `project`, its point nearest to the weighted sum, and `upgrad`; see `mollm_ops`. The names
that end in -unit work on gradients of one common norm, and weigh them alike; `dual` does not depend
on the gradients' norms.

Source: arXiv 2412.20412, section III; `upgrad`: Quinton and Rey, arXiv 2406.16232.
"""

from __future__ import annotations

from mollm.methods.method import PREFERENCES, Method, unlearning_cross_entropy

MOLLM = Method("mollm", unlearning_cross_entropy, "upgrad", PREFERENCES, {"metric": "base"})

COMMON_DESCENT = (
    MOLLM,
    *(
        Method(
            name,
            unlearning_cross_entropy,
            name.removesuffix("-unit"),
            PREFERENCES if name in ("project", "upgrad") else None,
            {"normalize": True} if name.endswith("-unit") else {},
        )
        for name in ("dual", "project", "project-unit", "upgrad", "upgrad-unit")
    ),
)
