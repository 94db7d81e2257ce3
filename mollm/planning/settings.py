"""What the memory of a step depends on, besides the model."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from mollm.errors import UsageError
from mollm.models.four_bits import NF4
from mollm.models.trainable import read_parts
from mollm.optim.constants import (
    BLOCKS,
    EIGHT_BITS,
    ELEMENTS_PER_SCALE,
    MEMORIES,
    MODEL,
    PER_OBJECTIVE,
    STREAMED,
)
from mollm.system import options

BYTES = {"float32": 4, "bfloat16": 2}


STATE_BYTES = BYTES | {EIGHT_BITS: 1 + 4 / ELEMENTS_PER_SCALE}
"""Of an element of the optimizer's state; in 8 bits with its part of a scale in float32."""


DEVICES = ("cpu", "cuda")


REFERENCES = ("copy", "adapter", "cache")


OPTIMIZERS = ("adamw", "sgd")


METRICS = ("base", "euclidean")


GRAMS = (MODEL, BLOCKS)


OBJECTIVES = 3
"""forget, kl, retain: with one set of each role."""


LORA_BYTES = 4
"""peft keeps adapters in float32, whatever the base model's dtype."""


@dataclass(frozen=True)
class PlanSettings:
    """How the model is to be trained.

    Raises:
        UsageError: A value is out of range.
    """

    batch_size: int = field(
        default=4,
        metadata={
            "flag": "--per-device-train-batch-size",
            "help": "forget examples per micro-batch",
        },
    )
    retain_batch_size: int | None = field(
        default=None,
        metadata={
            "flag": "--per-device-retain-batch-size",
            "help": "retain examples per micro-batch",
            "default": "as many as forget examples",
        },
    )
    objectives: int = field(
        default=OBJECTIVES,
        metadata={"help": "losses whose gradients meet: of each set to forget or retain, and KL"},
    )
    relearn_steps: int = field(
        default=0, metadata={"help": "steps of simulated relearning before each forget loss"}
    )
    sequence_length: int = field(
        default=512, metadata={"flag": "--max-length", "help": "tokens per example"}
    )
    """All but the first carry a loss, which is the most memory they can cost."""
    accumulation: int = field(
        default=1,
        metadata={"flag": "--gradient-accumulation-steps", "help": "micro-batches per step"},
    )
    dtype: str = field(
        default="float32", metadata={"choices": tuple(BYTES), "help": "weight dtype"}
    )
    compute_dtype: str = field(
        default="bfloat16",
        metadata={
            "choices": tuple(BYTES),
            "help": "dtype of matrix products",
            "default": "bfloat16 if the device has instructions for it",
        },
    )
    """Autocast casts where the weights are wider."""
    state_dtype: str | None = field(
        default=None,
        metadata={
            "choices": tuple(STATE_BYTES),
            "help": "optimizer-state dtype; 8bit needs bitsandbytes",
            "default": "that of the trainable parameters",
        },
    )
    adam_beta2: float = field(
        default=0.999, metadata={"help": "AdamW's second beta; with 0 it keeps no second moment"}
    )
    gradient_memory: str = field(
        default="as-produced",
        metadata={
            "choices": MEMORIES,
            "help": "how the objectives' gradients are kept until the step",
        },
    )
    gram: str = field(
        default=MODEL,
        metadata={
            "choices": GRAMS,
            "help": "one Gram matrix for the model, or with streamed gradients one for each block, "
            "in half as many passes",
        },
    )
    momentum: str | None = field(
        default=None,
        metadata={
            "choices": (PER_OBJECTIVE,),
            "help": "an EMA of each objective's gradient in place of the base's momentum",
        },
    )
    metric: str = field(
        default="base",
        metadata={
            "choices": METRICS,
            "help": "metric of the Gram matrix; euclidean gives AdamW a first moment",
        },
    )
    reference: str = field(
        default="copy",
        metadata={
            "choices": REFERENCES,
            "help": "reference model: a frozen copy, the model with its adapter disabled, or a "
            "cache of its final hidden states on disk",
        },
    )
    lora_rank: int = field(
        default=0,
        metadata={
            "flag": "--lora",
            "metavar": "RANK",
            "help": "rank of LoRA on all linear layers of the decoder; 0 for full training",
        },
    )
    quantization: str | None = field(
        default=None,
        metadata={
            "choices": (NF4,),
            "help": "keep the decoder's linear layers in 4 bits (needs --lora)",
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "recompute each layer's activations in backward"}
    )
    freeze_embeddings: bool = field(
        default=False, metadata={"help": "do not train token embeddings and head"}
    )
    trainable_parameters: tuple[str, ...] = field(
        default=(),
        metadata={
            "nargs": "+",
            "metavar": "PART",
            "help": "train only parameters with one of these in their names, such as .mlp.; "
            "activations and FLOPs are planned as if all trained",
        },
    )
    optimizer: str = field(
        default="adamw", metadata={"choices": OPTIMIZERS, "help": "base optimizer"}
    )
    device: str = field(
        default="cuda",
        metadata={
            "choices": DEVICES,
            "help": "device to train on",
            "default": "cuda if there is a GPU, else cpu",
        },
    )
    shards: int = 1
    """Processes that each hold a shard of weights, reference, gradients and state (FSDP2)."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length", "accumulation", "shards"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, but got {getattr(self, name)}.")
        for name, least in (("objectives", OBJECTIVES), ("relearn_steps", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, but got {getattr(self, name)}.")
        if self.relearn_steps and self.streams:
            raise UsageError(
                f"relearn_steps must be 0 with gradient_memory {STREAMED!r}, whose gradients are "
                f"taken once the weights are put back, but got {self.relearn_steps}: leave it out."
            )
        object.__setattr__(self, "trainable_parameters", read_parts(self.trainable_parameters))
        if self.trainable_parameters and self.lora_rank:
            raise UsageError(
                "trainable_parameters must be left out with LoRA, which trains in place of the "
                f"weights, but got {list(self.trainable_parameters)}: leave it out."
            )
        if self.retain_batch_size is not None and self.retain_batch_size < 1:
            raise UsageError(
                f"retain_batch_size must be at least 1, but got {self.retain_batch_size}."
            )
        if not 0 <= self.adam_beta2 < 1:
            raise UsageError(f"adam_beta2 must be in [0, 1), but got {self.adam_beta2}.")
        if self.lora_rank < 0:
            raise UsageError(f"lora_rank must not be negative, but got {self.lora_rank}.")
        if self.state_dtype and self.optimizer == "adamw" and not self.moments_kept:
            raise UsageError(
                "state_dtype must be left out with adam_beta2 0 and no first moment, where AdamW "
                f"keeps no state, but got {self.state_dtype!r}: leave it out."
            )
        for name, option in OPTIONS.items():
            value, known = getattr(self, name), option.metadata.get("choices")
            if known and value not in known and value != option.default:
                raise UsageError(f"{name} must be one of {', '.join(known)}, but got {value!r}.")
        if self.reference == "adapter" and not self.lora_rank:
            raise UsageError(
                "reference must be copy or cache without LoRA, but got 'adapter': give a lora_rank."
            )
        if self.quantization and not self.lora_rank:
            raise UsageError(
                f"quantization must be left out without LoRA, but got {self.quantization!r}: give "
                "a lora_rank."
            )
        if self.gram == BLOCKS and not self.streams:
            raise UsageError(
                f"gram must be model without gradient_memory {STREAMED!r}, which alone knows "
                f"blocks, but got {self.gram!r}: leave it out."
            )
        if self.gram == BLOCKS and self.momentum == PER_OBJECTIVE:
            raise UsageError(
                f"momentum must be left out with gram {BLOCKS!r}, but got {self.momentum!r}."
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

        if self.shards > 1 and self.state_dtype == EIGHT_BITS:
            raise UsageError(
                f"state_dtype must not be {EIGHT_BITS} in shards, whose scales no checkpoint could "
                f"cut, but got {self.shards} shards: choose bfloat16."
            )
        if self.shards > 1 and self.quantization:
            raise UsageError(
                f"shards must be 1 with {self.quantization}, which needs each layer as a whole, "
                f"but got {self.shards}: let each process hold a copy."
            )
        if self.shards > 1 and self.streams and not self.freeze_embeddings:
            raise UsageError(
                f"freeze_embeddings must be True with gradient_memory {STREAMED!r} in shards, but "
                f"got {self.freeze_embeddings}: freeze them, or let each process hold a copy."
            )

    @property
    def moments_kept(self) -> int:
        """Of a parameter, from one step to the next."""
        if self.optimizer != "adamw":
            return 0
        first = self.metric == "euclidean" and self.momentum != PER_OBJECTIVE
        return first + (self.adam_beta2 > 0)

    @property
    def further_sets(self) -> int:
        """Beside one to forget and one to retain."""
        return self.objectives - OBJECTIVES

    @property
    def relearning_passes(self) -> int:
        """Of simulated relearning: one of a micro-batch of each set to forget for each step."""
        return self.relearn_steps * (1 + self.further_sets)

    @property
    def gathered(self) -> PlanSettings:
        """The same settings as a layer meets them once FSDP2 has gathered it: in the dtype of
        matrix products."""
        if self.shards == 1:
            return self
        return replace(self, dtype=self.compute_dtype if self.casts else self.dtype)

    @property
    def reduced_bytes(self) -> int:
        """Of an element of a gradient that FSDP2 adds up over the processes."""
        return 4 if self.compute_dtype == "bfloat16" else self.gradient_bytes

    @property
    def of_retain_batch(self) -> PlanSettings:
        """The same settings where `tokens` and `answers` are those of the retain batch."""
        return replace(self, batch_size=self.retain_batch_size or self.batch_size)

    @property
    def tokens(self) -> int:
        """Of one batch, padding included: the forget batch."""
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
    def sweeps(self) -> int:
        """Over the blocks, in a step that streams its gradients."""
        return 1 if self.gram == BLOCKS else 2

    @property
    def streamed(self) -> PlanSettings | None:
        """The same with streamed gradients, where something comes of that."""
        in_shards = self.shards > 1 and not self.freeze_embeddings
        if self.lora_rank or in_shards or self.relearn_steps:
            return None
        return replace(self, gradient_memory=STREAMED, gradient_checkpointing=False)

    @property
    def trains_head(self) -> bool:
        return not (self.lora_rank or self.freeze_embeddings)


OPTIONS = {option.name: option for option in fields(PlanSettings)}


def flag_of(name: str) -> str:
    """The flag of `mollm plan` for a field of PlanSettings, named as `mollm unlearn` names it."""
    return options.flag_of(OPTIONS[name])
