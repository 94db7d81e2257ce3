"""What the memory of a step depends on, besides the model."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mollm.errors import UsageError
from mollm.models.four_bits import NF4

GIB = 1 << 30


BYTES = {"float32": 4, "bfloat16": 2}


DEVICES = ("cpu", "cuda")


STREAMED = "streamed"


GRADIENT_MEMORIES = ("as-produced", "bfloat16", "host", STREAMED)


REFERENCES = ("copy", "adapter", "cache")


OPTIMIZERS = ("adamw", "sgd")


METRICS = ("base", "euclidean")


PER_OBJECTIVE = "per-objective"


LORA_BYTES = 4
"""peft keeps adapters in float32, whatever the base model's dtype."""


@dataclass(frozen=True)
class PlanSettings:
    """How the model is to be trained.

    Raises:
        UsageError: A value is out of range.
    """

    batch_size: int = 4
    """Rows of the forget batch, and as many of the retain batch, that go together."""
    sequence_length: int = 512
    """Tokens of a row; all but the first carry a loss, which is the most memory they can cost."""
    accumulation: int = 1
    """Batches whose gradients add up to one step."""
    dtype: str = "float32"
    """Of the weights."""
    compute_dtype: str = "bfloat16"
    """Of matrix products; autocast casts where the weights are wider."""
    state_dtype: str | None = None
    """Of the optimizer's state; None for that of the weights."""
    adam_beta2: float = 0.999
    """AdamW's β₂; with 0 it keeps no second moment."""
    gradient_memory: str = "as-produced"
    """See MOLLMOptimizer."""
    momentum: str | None = None
    """"per-objective" or None, see MOLLMOptimizer."""
    metric: str = "base"
    """See MOLLMOptimizer: "euclidean" gives AdamW a first moment."""
    reference: str = "copy"
    """The original model: a frozen "copy", the "adapter" switched off, or a "cache" of its final
    hidden states on disk."""
    lora_rank: int = 0
    """Rank of LoRA on all linear layers of the decoder, 0 for full training."""
    quantization: str | None = None
    """"nf4" for the linear layers of the decoder in 4 bits, under LoRA, or None."""
    gradient_checkpointing: bool = False
    freeze_embeddings: bool = False
    """Whether token embeddings and head stay as they are."""
    optimizer: str = "adamw"
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length", "accumulation"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, but got {getattr(self, name)}.")
        if not 0 <= self.adam_beta2 < 1:
            raise UsageError(f"adam_beta2 must be in [0, 1), but got {self.adam_beta2}.")
        if self.lora_rank < 0:
            raise UsageError(f"lora_rank must not be negative, but got {self.lora_rank}.")
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                words = ", ".join(str(word) for word in known if word is not None)
                raise UsageError(f"{name} must be one of {words}, but got {value!r}.")
        if self.reference == "adapter" and not self.lora_rank:
            raise UsageError(
                "reference must be copy or cache without LoRA, but got 'adapter': give a lora_rank."
            )
        if self.quantization and not self.lora_rank:
            raise UsageError(
                f"quantization must be left out without LoRA, but got {self.quantization!r}: give "
                "a lora_rank."
            )
        if self.streams and self.lora_rank:
            raise UsageError(
                f"gradient_memory must be another one than {STREAMED!r} with LoRA, whose gradients "
                "take next to no memory as they are: leave it out."
            )
        if self.streams and self.gradient_checkpointing:
            raise UsageError(
                f"gradient_checkpointing must be left out with gradient_memory {STREAMED!r}, which "
                "computes every block again anyway: leave it out."
            )

    @property
    def tokens(self) -> int:
        """Of one batch, padding included."""
        return self.batch_size * self.sequence_length

    @property
    def answers(self) -> int:
        """Tokens of one batch that carry a loss."""
        return self.batch_size * max(1, self.sequence_length - 1)

    @property
    def weight_bytes(self) -> int:
        return BYTES[self.dtype]

    @property
    def operand_bytes(self) -> int:
        """Of an element that enters a matrix product."""
        return min(BYTES[self.dtype], BYTES[self.compute_dtype])

    @property
    def product_bytes(self) -> int:
        """Of an element that leaves a linear layer; one in 4 bits gives the dtype it was given."""
        return self.weight_bytes if self.quantization else self.operand_bytes

    @property
    def casts(self) -> bool:
        """Whether autocast makes narrower copies of the weights."""
        return self.operand_bytes < self.weight_bytes and not self.quantization

    @property
    def gradient_bytes(self) -> int:
        """Of an element of a gradient as autograd makes it."""
        return LORA_BYTES if self.lora_rank else self.weight_bytes

    @property
    def waiting_bytes(self) -> int:
        """Of an element of a gradient that waits on the device for the step."""
        if self.gradient_memory == "host" and self.device == "cuda":
            return 0
        return 2 if self.gradient_memory == "bfloat16" else self.gradient_bytes

    @property
    def streams(self) -> bool:
        return self.gradient_memory == STREAMED

    @property
    def trains_head(self) -> bool:
        return not (self.lora_rank or self.freeze_embeddings)


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "dtype": tuple(BYTES),
    "compute_dtype": tuple(BYTES),
    "state_dtype": (None, *BYTES),
    "gradient_memory": GRADIENT_MEMORIES,
    "momentum": (None, PER_OBJECTIVE),
    "quantization": (None, NF4),
    "metric": METRICS,
    "reference": REFERENCES,
    "optimizer": OPTIMIZERS,
    "device": DEVICES,
}


SETTING_NAMES = tuple(field.name for field in fields(PlanSettings))


def flag_of(name: str) -> str:
    """The flag of `mollm plan` for a field of PlanSettings, named as `mollm unlearn` names it."""
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


_FLAGS = {
    "batch_size": "--per-device-train-batch-size",
    "sequence_length": "--max-length",
    "accumulation": "--gradient-accumulation-steps",
    "lora_rank": "--lora",
}
