"""Peak memory of a training step, predicted from a model's configuration alone.

One step runs through eight stages, and each holds something else:

    forget forward     activations of the forget batch
    forget loss        the same, logits of one projection
    forget backward    activations give way to the first gradient
    reference          activations of the retain batch, the original model's forward pass
    retain loss        the same activations, logits of two projections
    kl backward        all activations, because the next backward needs them again
    retain backward    activations give way to the third gradient
    update             K gradients, state

Parameters, reference and optimizer state are there all the time. Everything is counted in bytes, as
the tensors that are alive at once; what an allocator loses between them is not.

Activations are those of decoders like Llama (RMSNorm, rotary attention through SDPA, a gated MLP)
as transformers runs them, with padding in the batch. Per token and layer, with H hidden size, I
intermediate size, Q = heads x head size, T tokens in a row, r bytes of a weight and of the residual
stream, e bytes of a matrix product's operands (2 under autocast, else r):

    norms              2 (4 H + r H + 4)                       input in float32, x / rms, 1 / rms
    their outputs      2 r H, or 5 e H where autocast casts one copy for each of q, k, v, gate, up
    attention          4 e Q + 4 heads + e T                   q, k, v, output, log-sum-exp, mask
    MLP                4 e I                                   gate, silu(gate), up, their product

Keys and values count Q each, because under a mask they are expanded to all heads. Under autocast
the cast weights, e bytes each, are kept as well. With gradient checkpointing only r H per layer
is kept, and one layer's activations at a time. LoRA on all linear layers of the decoder keeps an
operand of its own for each of them, and no x / rms. With these layers in 4 bits (QLoRA) no cast
weights are kept, and autocast does not make the MLP's 4 I narrower than r bytes.

On the CPU, against the bytes that Torch allocated in real steps of small models
(tests/test_plan.py): what lasts is exact; what the step adds came out between 0 and 3% too high for
full training, LoRA and QLoRA, and 7% too low for LoRA with gradient checkpointing. On a GPU it
has not been measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from mollm.errors import UsageError
from mollm.models import NF4
from mollm_ops import _chunks

if TYPE_CHECKING:
    from torch import nn

GIB = 1 << 30
OBJECTIVES = 3
"""forget, kl, retain."""

BYTES = {"float32": 4, "bfloat16": 2}
DEVICES = ("cpu", "cuda")
GRADIENT_MEMORIES = ("as-produced", "bfloat16", "host")
REFERENCES = ("copy", "adapter", "cache")
OPTIMIZERS = ("adamw", "sgd")
METRICS = ("base", "euclidean")
PER_OBJECTIVE = "per-objective"

OVERHEAD_BYTES = {"cpu": 512 << 20, "cuda": 640 << 20}
"""An allowance: Python with Torch and transformers, or a CUDA context with cuBLAS workspaces."""
_HOST_BUCKET_BYTES = 256 << 20
_NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""4 bits, a scale of 8 bits for 64 weights, and one in float32 for 256 of these."""
_LORA_BYTES = 4
"""peft keeps adapters in float32, whatever the base model's dtype."""

_FAMILY = {
    "num_layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "vocab": "vocab_size",
}

_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "max_position_embeddings": 8192,
}
NAMED_SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": _LLAMA_3
    | {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "intermediate_size": 14336,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": _LLAMA_3
    | {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "head_dim": 64,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": _LLAMA_3
    | {
        "num_hidden_layers": 28,
        "hidden_size": 3072,
        "num_attention_heads": 24,
        "head_dim": 128,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}
"""Options of a LlamaConfig."""


@dataclass(frozen=True)
class Shape:
    """What decides about the memory of a decoder."""

    label: str
    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    head_dim: int
    vocab: int
    tied: bool
    """Whether head and token embeddings are one matrix."""
    parameters: int
    """Of the whole model, a tied matrix once."""
    layer_parameters: int
    """Of one decoder layer."""
    layer_linear: int
    """Of the weights of its linear layers."""
    layer_sides: int
    """Σ (inputs + outputs) of its linear layers: what LoRA of rank 1 adds."""

    @property
    def embedding(self) -> int:
        """Parameters of the token embeddings, and of the head."""
        return self.vocab * self.hidden

    @property
    def query(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_dim


def shape_named(name: str) -> Shape:
    """One of NAMED_SHAPES.

    Raises:
        UsageError: There is none of that name.
    """
    from transformers import LlamaConfig

    if name not in NAMED_SHAPES:
        raise UsageError(f"shape must be one of {', '.join(NAMED_SHAPES)}, but got {name!r}.")
    return shape_of(LlamaConfig(**NAMED_SHAPES[name]), name)


def shape_of(config: Any, label: str) -> Shape:
    """Counts a model of this configuration, built without memory on the `meta` device.

    Raises:
        UsageError: It is not a decoder like Llama.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        sizes = {ours: int(getattr(config, theirs)) for ours, theirs in _FAMILY.items()}
        layers = list(model.base_model.layers)
        layers[0].mlp.gate_proj  # noqa: B018
    except (AttributeError, ValueError, IndexError) as error:
        raise UsageError(
            f"the model {label} must be a decoder with RMSNorm and a gated MLP, like Llama, for "
            f"its memory to be planned, but it is of type "
            f"{getattr(config, 'model_type', 'unknown')!r}."
        ) from error
    linear = [m.weight for m in layers[0].modules() if isinstance(m, torch.nn.Linear)]
    heads = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    return Shape(
        label=label,
        head_dim=getattr(config, "head_dim", None) or sizes["hidden"] // sizes["heads"],
        tied=heads[0] is heads[1],
        parameters=_count(model),
        layer_parameters=_count(layers[0]),
        layer_linear=sum(w.numel() for w in linear),
        layer_sides=sum(sum(w.shape) for w in linear),
        **sizes,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


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
        return _LORA_BYTES if self.lora_rank else self.weight_bytes

    @property
    def waiting_bytes(self) -> int:
        """Of an element of a gradient that waits on the device for the step."""
        if self.gradient_memory == "host" and self.device == "cuda":
            return 0
        return 2 if self.gradient_memory == "bfloat16" else self.gradient_bytes

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


@dataclass(frozen=True)
class Stage:
    """What is alive at the fullest moment of one stage of the step."""

    name: str
    parts: Mapping[str, int]
    """Bytes by component."""

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryPlan:
    """The predicted memory of a training step."""

    shape: Shape
    settings: PlanSettings
    trainable: int
    """Parameters that train."""
    stages: tuple[Stage, ...]
    """In the order of the step."""
    host_bytes: int
    """Pinned memory of the host, for gradients that wait there."""
    cache_bytes_per_token: int
    """On disk, for the cached hidden states of the original model."""

    @property
    def peak(self) -> Stage:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.total)

    def fits(self, memory: float) -> bool:
        """Whether the step fits into that many bytes."""
        return self.peak.total <= memory

    def component(self, name: str) -> int:
        """The most that one component takes in any stage, in bytes."""
        return max(stage.parts.get(name, 0) for stage in self.stages)


def plan(shape: Shape, settings: PlanSettings) -> MemoryPlan:
    """Predicts the memory of a training step."""
    return MemoryPlan(
        shape=shape,
        settings=settings,
        trainable=_trainable(shape, settings),
        stages=tuple(_stages(shape, settings)),
        host_bytes=(
            OBJECTIVES * _trainable(shape, settings) * settings.gradient_bytes
            if settings.gradient_memory == "host" and settings.device == "cuda"
            else 0
        ),
        cache_bytes_per_token=settings.weight_bytes * shape.hidden
        if settings.reference == "cache"
        else 0,
    )


# ---- what is there all the time


def _layer_trainable(shape: Shape, settings: PlanSettings) -> int:
    if settings.lora_rank:
        return settings.lora_rank * shape.layer_sides
    return shape.layer_parameters


def _trainable(shape: Shape, settings: PlanSettings) -> int:
    if settings.lora_rank:
        return shape.num_layers * _layer_trainable(shape, settings)
    matrices = 1 if shape.tied else 2
    return shape.parameters - settings.freeze_embeddings * matrices * shape.embedding


def _lasting(shape: Shape, settings: PlanSettings) -> dict[str, int]:
    """Components that no stage is without."""
    weights = _model(shape, settings)
    if settings.lora_rank:
        weights += _trainable(shape, settings) * _LORA_BYTES
    return {
        "parameters": weights,
        "reference model": _reference(shape, settings),
        "optimizer state": _state(shape, settings),
        "running means": _means(shape, settings),
        "overhead": OVERHEAD_BYTES[settings.device],
    }


def _model(shape: Shape, settings: PlanSettings) -> int:
    narrow = shape.num_layers * shape.layer_linear if settings.quantization else 0
    return round(narrow * _NF4_BYTES) + (shape.parameters - narrow) * settings.weight_bytes


def _reference(shape: Shape, settings: PlanSettings) -> int:
    if settings.reference == "copy" and settings.quantization:
        return _model(shape, settings)
    if settings.reference == "copy":  # see mollm.models.freeze
        cast = shape.num_layers * shape.layer_linear if settings.casts else 0
        rest = shape.parameters - cast
        return cast * settings.operand_bytes + rest * settings.weight_bytes
    if settings.reference == "cache" and settings.trains_head:
        return shape.embedding * settings.weight_bytes  # cached states need the original head
    return 0


def _state(shape: Shape, settings: PlanSettings) -> int:
    if settings.optimizer == "sgd":
        return 0
    first = settings.metric == "euclidean" and settings.momentum != PER_OBJECTIVE
    moments = 2 if first else 1
    size = BYTES[settings.state_dtype] if settings.state_dtype else settings.gradient_bytes
    return moments * _trainable(shape, settings) * size


def _means(shape: Shape, settings: PlanSettings) -> int:
    if settings.momentum != PER_OBJECTIVE:
        return 0
    size = settings.waiting_bytes or settings.gradient_bytes
    return OBJECTIVES * _trainable(shape, settings) * size


# ---- activations


def layer_activations(shape: Shape, settings: PlanSettings) -> int:
    """Bytes per token that one decoder layer keeps for backward; the formula is the module's."""
    r, e, lora = settings.weight_bytes, settings.operand_bytes, settings.lora_rank
    H, Q = shape.hidden, shape.query
    norms = 2 * (4 * H + 4 + (0 if lora else r * H))
    # An operand that is cast, by autocast or for an adapter, is cast for each product anew.
    own = settings.casts or (lora and settings.compute_dtype == "bfloat16")
    outputs = 5 * e * H if own else 2 * r * H
    attention = 4 * e * Q + 4 * shape.heads + e * settings.sequence_length
    mlp = 4 * settings.product_bytes * shape.intermediate
    if lora:
        attention += e * Q if own else 0
        mlp += 7 * e * lora
    return norms + outputs + attention + mlp


def _kept(shape: Shape, settings: PlanSettings) -> int:
    """Bytes of one layer between its forward and its backward."""
    if settings.gradient_checkpointing:
        return settings.tokens * settings.weight_bytes * shape.hidden
    return _layer(shape, settings)


def _layer(shape: Shape, settings: PlanSettings) -> int:
    copies = shape.layer_linear * settings.operand_bytes if settings.casts else 0
    return settings.tokens * layer_activations(shape, settings) + copies


def _recomputed(shape: Shape, settings: PlanSettings) -> int:
    """Bytes that backward of a checkpointed layer adds to its kept input."""
    if not settings.gradient_checkpointing:
        return 0
    shared = 4 * shape.hidden if settings.weight_bytes == 4 else 0  # the first norm's input
    return _layer(shape, settings) - settings.tokens * shared


def _final(shape: Shape, settings: PlanSettings) -> int:
    """Bytes of the last norm, and of the states that meet the head."""
    r, H = settings.weight_bytes, shape.hidden
    norm = 4 * H + 4 + (0 if settings.lora_rank else r * H)
    return settings.tokens * norm + settings.answers * r * H


def _activations(shape: Shape, settings: PlanSettings) -> int:
    return shape.num_layers * _kept(shape, settings) + _final(shape, settings)


# ---- losses


def chunk_rows(shape: Shape, settings: PlanSettings, projections: int) -> int:
    """Rows of logits at a time, as mollm_ops cuts them."""
    size = _logit_bytes(settings, projections) * projections * shape.vocab
    most = max(
        _chunks.WORKSPACE_BYTES[settings.device] // size, _chunks.MIN_CHUNK_ROWS[settings.device]
    )
    chunks = max(1, -(-settings.answers // most))
    return -(-settings.answers // chunks)


def _logit_bytes(settings: PlanSettings, projections: int) -> int:
    return 4 if projections > 1 else settings.weight_bytes


def _loss(shape: Shape, settings: PlanSettings, losses: int) -> dict[str, int]:
    """The fullest moment of a linear loss: logits, and the gradients that it hands to autograd.

    Two losses are cross-entropy and KL together, from two projections.
    """
    rows, r = chunk_rows(shape, settings, losses), settings.weight_bytes
    logits = rows * shape.vocab * _logit_bytes(settings, losses) * losses
    several = rows < settings.answers
    wide = 4 if several else r
    # The first dW is rounded while the float32 sums of all losses are still there.
    dW = shape.embedding * (losses * wide + (r if wide > r else 0)) if settings.trains_head else 0
    upcast = 0
    if settings.device == "cpu" and r == 2 and (losses > 1 or several):
        upcast = rows * shape.hidden * 4 + min(_chunks._UPCAST_BYTES, 4 * shape.embedding)
    return {
        "logits": logits + upcast,
        "head gradients of the losses": losses * settings.answers * shape.hidden * r + dW,
    }


def _loss_gradients(shape: Shape, settings: PlanSettings, losses: int) -> int:
    """Bytes of dH and dW of that many losses, as they wait for backward."""
    r = settings.weight_bytes
    dW = shape.embedding * r if settings.trains_head else 0
    return losses * (settings.answers * shape.hidden * r + dW)


# ---- the stages


def _stages(shape: Shape, settings: PlanSettings) -> Iterator[Stage]:
    lasting = _lasting(shape, settings)
    waiting = _trainable(shape, settings) * settings.waiting_bytes
    again = settings.accumulation > 1  # then every gradient is there from the last batch

    def stage(name: str, held: int, parts: Mapping[str, int]) -> Stage:
        everything = lasting | {"gradients held": held * waiting} | dict(parts)
        return Stage(name, {part: size for part, size in everything.items() if size})

    def before(done: int) -> int:
        return OBJECTIVES - 1 if again else done

    own = _trainable(shape, settings) * settings.gradient_bytes if again else 0
    activations = _activations(shape, settings)
    if settings.casts and settings.gradient_checkpointing and not settings.lora_rank:
        # autocast holds on to its casts of what trains until the forward pass ends
        forward = shape.num_layers * shape.layer_linear * settings.operand_bytes
    else:
        forward = 0
    retained = {"activations": activations}

    yield stage(
        "forget forward",
        before(0),
        {
            **retained,
            "gradient in the making": own,
            "working set": forward + _adapter_input(shape, settings),
        },
    )
    yield stage(
        "forget loss",
        before(0),
        {**retained, "gradient in the making": own} | _loss(shape, settings, 1),
    )
    yield stage("forget backward", before(0), _backward(shape, settings, keep=False))
    held = OBJECTIVES if again else 1
    yield stage("reference", held, {**retained, "working set": _reference_pass(shape, settings)})
    original = {"states of the original": settings.answers * shape.hidden * settings.weight_bytes}
    yield stage("retain loss", held, retained | original | _loss(shape, settings, 2))
    both = {"head gradients of the losses": _loss_gradients(shape, settings, 2)}
    yield stage("kl backward", before(1), original | both | _backward(shape, settings, keep=True))
    # KL's graph keeps its gradients until the step is over.
    left = original | {"head gradients of the losses": _loss_gradients(shape, settings, 1)}
    yield stage("retain backward", before(2), left | _backward(shape, settings, keep=False))
    yield stage("update", OBJECTIVES, left | {"working set": _update(shape, settings)})


def _reference_pass(shape: Shape, settings: PlanSettings) -> int:
    """Bytes of a forward pass without a graph: residual, norm, and the MLP's three at its end."""
    r, e, p = settings.weight_bytes, settings.operand_bytes, settings.product_bytes
    if settings.reference == "cache":
        return settings.answers * shape.hidden * 2 * r
    states = settings.tokens * (2 * r * shape.hidden + 3 * p * shape.intermediate)
    if settings.reference == "adapter" and settings.casts:
        states += shape.hidden * shape.intermediate * e
    return states


def _update(shape: Shape, settings: PlanSettings) -> int:
    """Bytes of gradients on their way back from the host: two buckets, full and one tensor over."""
    if settings.waiting_bytes:
        return 0
    size = settings.gradient_bytes
    largest = shape.hidden * shape.intermediate
    if settings.lora_rank:
        largest = settings.lora_rank * (shape.hidden + shape.intermediate)
    elif settings.trains_head:
        largest = shape.embedding
    everything = OBJECTIVES * _trainable(shape, settings) * size
    return min(2 * (_HOST_BUCKET_BYTES + OBJECTIVES * largest * size), everything)


def _backward(shape: Shape, settings: PlanSettings, *, keep: bool) -> dict[str, int]:
    """The fullest moment of one objective's backward, where activations become a gradient.

    Args:
        keep: whether the activations stay, for one more backward.
    """
    return max(_moments(shape, settings, keep), key=lambda parts: sum(parts.values()))


def _moments(shape: Shape, settings: PlanSettings, keep: bool) -> Iterator[dict[str, int]]:
    size, L = settings.gradient_bytes, shape.num_layers
    total = _trainable(shape, settings) * size
    layer = _layer_trainable(shape, settings) * size
    dW = shape.embedding * size if settings.trains_head else 0
    down = shape.hidden * shape.intermediate * size
    if settings.lora_rank:
        down = settings.lora_rank * (shape.hidden + shape.intermediate) * size
    final = _final(shape, settings)
    kept = _kept(shape, settings)
    again = settings.accumulation > 1

    def moment(layers_left: int, gradient: int, working: int) -> dict[str, int]:
        held = _activations(shape, settings) if keep else final + layers_left * kept
        return {
            "activations": held,
            "gradient in the making": total + dW if again else gradient,
            "working set": working,
        }

    mlp, norm, residual = _working_sets(shape, settings)
    consumed = keep and not settings.gradient_checkpointing
    recomputed = _recomputed(shape, settings)
    for n in range(L, 0, -1):
        above = dW + (L - n) * layer
        # A graph that is not kept lets go of the MLP's product before its gradient is made.
        freed = 0 if consumed else settings.tokens * settings.product_bytes * shape.intermediate
        yield moment(n, above + down, recomputed + mlp + residual - freed)
        if recomputed:
            adapter = _adapter_input(shape, settings) + _adapter_gradient(shape, settings)
            yield moment(n, above, recomputed + 2 * residual + adapter)
        if keep:
            yield moment(n, above + layer, norm + residual)
    matrix = shape.embedding * size if settings.trains_head else 0
    tied = matrix if shape.tied or again else 0
    yield moment(0, total + tied, residual)
    if settings.waiting_bytes < size:  # rounded, or sent away, while all of it is still there
        yield moment(0, total, _trainable(shape, settings) * settings.waiting_bytes)


def _adapter_input(shape: Shape, settings: PlanSettings) -> int:
    """Bytes at the end of a layer's forward pass: the MLP's product on its way into an adapter,
    in the model's dtype and in float32, which is that of the adapter."""
    if not settings.lora_rank or settings.operand_bytes == _LORA_BYTES:
        return 0
    return settings.tokens * (settings.operand_bytes + _LORA_BYTES) * shape.intermediate


def _adapter_gradient(shape: Shape, settings: PlanSettings) -> int:
    """Bytes of the stream's gradient for the MLP's output and, scaled, for its adapter, with which
    a checkpointed layer waits for its activations."""
    return 2 * settings.tokens * settings.operand_bytes * shape.hidden * bool(settings.lora_rank)


def _working_sets(shape: Shape, settings: PlanSettings) -> tuple[int, int, int]:
    """Bytes of gradients of activations in backward: at MLP or attention, at a norm, of the stream.

    The MLP's product has gradients of itself and both factors at once, attention of output, q, k
    and v; the norm's formula makes five float32 rows.
    """
    e, M = settings.operand_bytes, settings.tokens
    product = max(3 * settings.product_bytes * shape.intermediate, 4 * e * shape.query)
    return (
        M * product,
        M * 5 * 4 * shape.hidden,
        M * settings.weight_bytes * shape.hidden,
    )


# ---- what would make it fit


@dataclass(frozen=True)
class Proposal:
    """One change on the way to a step that fits; each stands on those before it."""

    words: str
    plan: MemoryPlan
    saves: int
    """Bytes of peak memory, beside the plan before."""


def proposals(first: MemoryPlan, memory: float) -> list[Proposal]:
    """Changes in the order of what they cost, up to the first set of them that fits.

    Changes that save nothing are left out. Where the last plan does not fit either, nothing does.

    Args:
        first: a plan that does not fit.
        memory: bytes.
    """
    found: list[Proposal] = []
    now = first
    for change in _CHANGES:
        for words, settings in change(now, memory):
            if now.fits(memory):
                break
            then = plan(now.shape, settings)
            saves = now.peak.total - then.peak.total
            if saves > 0:
                found.append(Proposal(words, then, saves))
                now = then
    return found


Change = Callable[[MemoryPlan, float], Iterator[tuple[str, PlanSettings]]]
"""From a plan and the memory in bytes to options that may save some, and the settings with them."""


def _checkpointed(now: MemoryPlan, memory: float) -> Iterator[tuple[str, PlanSettings]]:
    yield (
        "--gradient-checkpointing",
        replace(now.settings, gradient_checkpointing=True),
    )


def _smaller_batch(now: MemoryPlan, memory: float) -> Iterator[tuple[str, PlanSettings]]:
    """The largest part of the batch that fits, or the one that needs least."""
    rows = now.settings.batch_size
    parts = [n for n in range(rows - 1, 0, -1) if rows % n == 0]
    tried = [
        replace(now.settings, batch_size=n, accumulation=now.settings.accumulation * rows // n)
        for n in parts
    ]
    if tried:
        best = _first_that_fits(now, tried, memory)
        yield f"--batch-size {best.batch_size} --accumulation {best.accumulation}", best


def _narrow_state(now: MemoryPlan, memory: float) -> Iterator[tuple[str, PlanSettings]]:
    yield "--state-dtype bfloat16", replace(now.settings, state_dtype="bfloat16")


def _small_gradients(now: MemoryPlan, memory: float) -> Iterator[tuple[str, PlanSettings]]:
    """Rounded gradients where those fit, and else whichever needs least."""
    tried = [replace(now.settings, gradient_memory=name) for name in GRADIENT_MEMORIES[1:]]
    best = _first_that_fits(now, tried, memory)
    yield f"--gradient-memory {best.gradient_memory}", best


def _first_that_fits(now: MemoryPlan, tried: Sequence[PlanSettings], memory: float) -> PlanSettings:
    plans = [plan(now.shape, settings) for settings in tried]
    fitting = [p for p in plans if p.fits(memory)]
    best = fitting[0] if fitting else min(plans, key=lambda p: p.peak.total)
    return best.settings


def _cached_reference(now: MemoryPlan, memory: float) -> Iterator[tuple[str, PlanSettings]]:
    if now.settings.reference == "copy":
        yield "--reference cache", replace(now.settings, reference="cache")


def _adapters(now: MemoryPlan, memory: float) -> Iterator[tuple[str, PlanSettings]]:
    if not now.settings.lora_rank:
        yield (
            "--lora-rank 16 --reference adapter",
            replace(now.settings, lora_rank=16, reference="adapter"),
        )


def _four_bits(now: MemoryPlan, memory: float) -> Iterator[tuple[str, PlanSettings]]:
    if now.settings.lora_rank:
        yield f"--quantization {NF4}", replace(now.settings, quantization=NF4)


_CHANGES: tuple[Change, ...] = (
    _checkpointed,
    _smaller_batch,
    _narrow_state,
    _small_gradients,
    _cached_reference,
    _adapters,
    _four_bits,
)

SETTING_NAMES = tuple(field.name for field in fields(PlanSettings))
