"""IdkDPO: DPO in which "I don't know" is preferred to the answer that is to be forgotten.

    L = −(2/β) mean_i log σ(β (r(x_i, y'_i) − r(x_i, y_i))) + CE_retain,   β = 0.1

as in `mollm.methods.dpo`. The answers y' are drawn from texts that ship
(`mollm/samples/refusals.txt`), one for each row, by the seed of the data; open-unlearning draws a
new one each time that a row is seen.

Source: Maini et al., TOFU, arXiv 2401.06121, section 3.2; Zhang et al., arXiv 2404.05868.
"""

from __future__ import annotations

from mollm.methods.dpo import dpo_loss
from mollm.methods.method import REFUSALS, Method

IDKDPO = Method("idkdpo", dpo_loss, "sum", (1.0, 0.0, 1.0), compares=True, alternatives=REFUSALS)
