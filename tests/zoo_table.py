"""Prints docs/guide/models.md: what becomes of every causal language model of transformers.

python tests/zoo_table.py > docs/guide/models.md    # some minutes
"""

from __future__ import annotations

import sys
import warnings

import transformers
import zoo
from zoo_checks import FAST, Walk

from mollm.errors import UsageError
from mollm.planning.memory import plan
from mollm.planning.settings import PlanSettings
from mollm.planning.shapes import shape_of

ABOVE = """# Models

Every model type that transformers {release} lists for causal language models, made tiny and
trained: losses and gradients of a step beside those of each row's own logits, in full and with LoRA
on all linear layers, and whether `mollm plan` can count it. `tests/zoo_table.py` prints this page.

What decides is the model itself, not its name. Logits may be the head's outputs, scaled or capped;
whatever happens to states before the head is the model's own. Padding on the left is moved to the
right, so that recurrent models, and those that count padding as positions, train on the same losses
with either; asked for replies they answer a row at a time. LoRA on all linear layers passes over
routers that return more than a product, and over `out_proj` and `dt_proj` of Mamba, whose
matrices are read past an adapter.

| model type | full | LoRA | plan | |
|---|---|---|---|---|"""


def trains(walk: Walk, number: int) -> str:
    """Of one way to train: "yes", or why not."""
    try:
        return "yes" if walk.errors(FAST[number]).right else "wrong losses"
    except UsageError as error:
        _, _, reason = str(error).partition("ForCausalLM ")
        return (reason or str(error)).partition(", ")[0]
    except (AssertionError, RuntimeError):
        return "transformers cannot train it in evaluation mode"


def is_planned(kind: str) -> bool:
    """Whether its memory can be predicted."""
    try:
        settings = PlanSettings(sequence_length=16, device="cpu", dtype="bfloat16")
        return plan(shape_of(zoo.config_of(kind), kind), settings).peak.total > 0
    except UsageError:
        return False


def row(kind: str) -> str:
    """A line of the table."""
    if kind in zoo.NOT_MADE:
        return f"| `{kind}` | no | no | no | {zoo.NOT_MADE[kind]} |"
    walk = Walk(kind)
    found = [trains(walk, 0), trains(walk, 1)]
    reason = next((words for words in found if words != "yes"), "")
    marks = ["yes" if words == "yes" else "no" for words in found]
    planned = "yes" if "yes" in marks and is_planned(kind) else "no"
    return f"| `{kind}` | {' | '.join(marks)} | {planned} | {reason} |"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print(ABOVE.format(release=transformers.__version__))
    for kind in zoo.LISTED:
        print(row(kind), flush=True)
        print(kind, file=sys.stderr)
