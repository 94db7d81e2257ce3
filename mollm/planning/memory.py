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

Where processes hold shards (FSDP2), a process has its share of weights, copied reference, gradients
and state, all of the embeddings, head and norm of model and reference from the first forward to the
last backward, and up to three layers: the one that runs, and the next twice while it is unpacked.
Layers compute in the dtype of matrix products, and so do their activations and gradients, of which
one layer's are whole, and once more in the dtype in which they are added up. A sweep that streams
gradients holds one layer, and embeddings and head only as shards.

That is the formula for decoders like Llama whose layers are all alike. Of any other kind, what is
kept is counted in a forward pass of tensors without memory, see `mollm.planning.activations`; the
other terms are the same, with the widest matrix in place of I.

On the CPU, against the bytes that Torch allocated in real steps of small models
(tests/planning/test_memory.py): what lasts is exact; what the step adds came out between 0 and
3% too high for full training, LoRA and QLoRA, and 7% too low for LoRA with gradient checkpointing.
Of a dozen other kinds it came out between 7% too low and 8% too high in float32, full and LoRA,
and as near under autocast, with and without gradient checkpointing.
On a GPU it has not been measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from mollm.models.matrices import SLICES_OF_A_BLOCK
from mollm.models.trainable import names_with
from mollm.optim.constants import BUCKET_BYTES, EIGHT_BITS, PER_OBJECTIVE
from mollm.planning.settings import (
    LORA_BYTES,
    OBJECTIVES,
    STATE_BYTES,
    PlanSettings,
)
from mollm.planning.shapes import Shape, Weight
from mollm_ops import _chunks, deferred

OVERHEAD_BYTES = {"cpu": 512 << 20, "cuda": 640 << 20}
"""An allowance: Python with Torch and transformers, or a CUDA context with cuBLAS workspaces."""
_NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""4 bits, a scale of 8 bits for 64 weights, and one in float32 for 256 of these."""


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
    """Predicts the memory of a training step.

    Raises:
        UsageError: One of `trainable_parameters` is in no name of a parameter that trains.
    """
    chosen = settings.trainable_parameters
    if chosen and not any(weight.embedding for weight in _trained(shape, settings)):
        settings = replace(settings, freeze_embeddings=True)
    return MemoryPlan(
        shape=shape,
        settings=settings,
        trainable=trainable(shape, settings),
        stages=tuple((_streamed_stages if settings.streams else _stages)(shape, settings)),
        host_bytes=settings.objectives * _pinned(shape, settings),
        cache_bytes_per_token=settings.weight_bytes * shape.hidden
        if settings.reference == "cache"
        else 0,
    )


# ---- what is there all the time


def _shard(size: int, settings: PlanSettings) -> int:
    """What one process holds of something that is cut."""
    return -(-size // settings.shards)


def _layer_trainable(shape: Shape, settings: PlanSettings) -> int:
    if settings.lora_rank:
        return settings.lora_rank * shape.sides // shape.num_layers
    if not settings.trainable_parameters:
        return shape.layers // shape.num_layers
    of_layers: Counter[int | None] = Counter()
    for weight in _trained(shape, settings):
        of_layers[weight.layer] += weight.size
    return max((size for n, size in of_layers.items() if n is not None), default=0)


def _in_layers(shape: Shape, settings: PlanSettings) -> int:
    """Parameters of all layers that train, without an adapter."""
    return sum(w.size for w in _trained(shape, settings) if w.layer is not None)


def trainable(shape: Shape, settings: PlanSettings) -> int:
    """Parameters that train, of all shards."""
    if settings.lora_rank:
        return settings.lora_rank * shape.sides
    return sum(weight.size for weight in _trained(shape, settings))


def _trained(shape: Shape, settings: PlanSettings) -> list[Weight]:
    """Without an adapter."""
    frozen = settings.freeze_embeddings
    may = {weight.name: not (frozen and weight.embedding) for weight in shape.tensors}
    if settings.trainable_parameters:
        names = names_with(settings.trainable_parameters, may)
        may = {name: name in names for name in may}
    return [weight for weight in shape.tensors if may[weight.name]]


def _pinned(shape: Shape, settings: PlanSettings) -> int:
    """Bytes of the host for one objective's gradients: Torch rounds each up to a power of two."""
    if settings.gradient_memory != "host" or settings.device != "cuda":
        return 0
    if settings.lora_rank:  # a thousandth of the weights, in too many ranks to count
        return _shard(trainable(shape, settings) * settings.gradient_bytes, settings)
    trained = _trained(shape, settings)
    parts = (_shard(weight.size, settings) * settings.gradient_bytes for weight in trained)
    return sum(1 << (part - 1).bit_length() for part in parts)


def _lasting(shape: Shape, settings: PlanSettings) -> dict[str, int]:
    """Components that no stage is without."""
    weights = _model(shape, settings)
    if settings.lora_rank:
        weights += trainable(shape, settings) * LORA_BYTES
    reference = _reference(shape, settings)
    copied = settings.reference == "copy"  # a cached head is a buffer, which FSDP2 does not cut
    return {
        "parameters": _shard(weights, settings),
        "reference model": _shard(reference, settings) if copied else reference,
        "optimizer state": _shard(_state(shape, settings), settings),
        "running means": _shard(_means(shape, settings), settings),
        "overhead": OVERHEAD_BYTES[settings.device],
    }


def _model(shape: Shape, settings: PlanSettings) -> int:
    narrow = shape.linear if settings.quantization else 0
    return round(narrow * _NF4_BYTES) + (shape.parameters - narrow) * settings.weight_bytes


def _reference(shape: Shape, settings: PlanSettings) -> int:
    if settings.reference == "copy" and settings.quantization:
        return _model(shape, settings)
    if settings.reference == "copy":  # see mollm.models.forward.frozen_copy
        cast = shape.linear if settings.casts else 0
        rest = shape.parameters - cast
        return cast * settings.operand_bytes + rest * settings.weight_bytes
    if settings.reference == "cache" and settings.trains_head:
        return shape.embedding * settings.weight_bytes  # cached states need the original head
    return 0


def _state(shape: Shape, settings: PlanSettings) -> int:
    return round(settings.moments_kept * trainable(shape, settings) * _state_bytes(settings))


def _state_bytes(settings: PlanSettings) -> float:
    return STATE_BYTES[settings.state_dtype] if settings.state_dtype else settings.gradient_bytes


def _passing_state(parameters: int, largest: int, settings: PlanSettings) -> int:
    """Bytes of state that nothing holds, or 8 bits, while so many parameters change: the second
    moment with β₂ = 0, and slices of all moments in float32 with one in 8 bits again.

    Args:
        largest: parameters of the largest tensor.
    """
    if settings.optimizer != "adamw":
        return 0
    eight = settings.state_dtype == EIGHT_BITS
    if eight:
        parameters = min(parameters, max(largest, BUCKET_BYTES // 4))
    wide = 4 if eight else _state_bytes(settings)
    passing = (not settings.adam_beta2) * wide
    if eight:
        passing += 4 * settings.moments_kept + STATE_BYTES[EIGHT_BITS]
    return round(parameters * passing)


def _means(shape: Shape, settings: PlanSettings) -> int:
    if settings.momentum != PER_OBJECTIVE:
        return 0
    size = settings.waiting_bytes or settings.gradient_bytes
    return settings.objectives * trainable(shape, settings) * size


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
    if shape.kept is not None:
        kept = shape.kept(settings)
        return (kept.fixed + kept.row * settings.batch_size) // shape.num_layers
    copies = shape.linear // shape.num_layers * settings.operand_bytes if settings.casts else 0
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
    waiting = _shard(trainable(shape, settings) * settings.waiting_bytes, settings)
    again = settings.accumulation > 1  # then every gradient is there from the last batch
    inside, gathered = settings.gathered, {"gathered": _gathered(shape, settings)}

    def stage(name: str, held: int, parts: Mapping[str, int]) -> Stage:
        everything = lasting | {"gradients held": held * waiting} | dict(parts)
        return Stage(name, {part: size for part, size in everything.items() if size})

    def before(done: int) -> int:
        """Of how many objectives the gradients are held; more sets have theirs between these."""
        return settings.objectives - 1 if again else done + settings.objectives - OBJECTIVES

    gradient = _shard(trainable(shape, settings) * settings.gradient_bytes, settings)
    own = gradient if again else 0
    copied = gradient if settings.relearn_steps else 0
    put_back = {"weights to put back": copied}
    retain = settings.of_retain_batch
    if inside.casts and settings.gradient_checkpointing and not settings.lora_rank:
        # autocast holds on to its casts of what trains until the forward pass ends
        forward = shape.linear * settings.operand_bytes
    else:
        forward = 0
    retained = gathered | {"activations": _activations(shape, inside)}
    if settings.relearn_steps:
        attacker = {"weights to put back": copied, "attacker's state": 2 * gradient}
        yield stage("relearning", 0, attacker | _backward(shape, settings, keep=False))
    yield stage(
        "forget forward",
        before(0),
        {
            **retained,
            **put_back,
            "gradient in the making": own,
            "working set": forward + _adapter_input(shape, inside),
        },
    )
    yield stage(
        "forget loss",
        before(0),
        {**retained, **put_back, "gradient in the making": own} | _loss(shape, inside, 1),
    )
    yield stage("forget backward", before(0), put_back | _backward(shape, settings, keep=False))
    held = settings.objectives if again else before(1)
    inside = retain.gathered
    retained = gathered | {"activations": _activations(shape, inside)}
    yield stage("reference", held, {**retained, "working set": _reference_pass(shape, inside)})
    original = {"states of the original": retain.answers * shape.hidden * inside.weight_bytes}
    yield stage("retain loss", held, retained | original | _loss(shape, inside, 2))
    both = {"head gradients of the losses": _loss_gradients(shape, inside, 2)}
    yield stage("kl backward", before(1), original | both | _backward(shape, retain, keep=True))
    # KL's graph keeps its gradients until the step is over.
    left = original | {"head gradients of the losses": _loss_gradients(shape, inside, 1)}
    yield stage("retain backward", before(2), left | _backward(shape, retain, keep=False))
    moment = _passing_state(trainable(shape, settings), _largest(shape, settings), settings)
    update = {"working set": _shard(_update(shape, settings) + moment, settings)}
    yield stage("update", settings.objectives, left | update)


def _largest(shape: Shape, settings: PlanSettings) -> int:
    """Parameters of the largest tensor that trains."""
    if settings.lora_rank:
        return settings.lora_rank * max(shape.hidden, shape.intermediate)
    return shape.embedding if settings.trains_head else shape.largest


def ends(shape: Shape) -> int:
    """Parameters outside of the layers: embeddings, head and norm."""
    return shape.parameters - shape.layers


def _gathered(shape: Shape, settings: PlanSettings) -> int:
    """Bytes that are whole on every process while it computes, see the module's text."""
    if settings.shards == 1:
        return 0
    adapter = settings.lora_rank * shape.sides // shape.num_layers
    models = 2 if settings.reference == "copy" else 1
    whole = models * ends(shape) + 3 * (shape.largest_layer + adapter)
    return whole * settings.gathered.weight_bytes


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
    everything = settings.objectives * trainable(shape, settings) * size
    return min(2 * (BUCKET_BYTES + settings.objectives * largest * size), everything)


def _backward(shape: Shape, settings: PlanSettings, *, keep: bool) -> dict[str, int]:
    """The fullest moment of one objective's backward, where activations become a gradient.

    Args:
        keep: whether the activations stay, for one more backward.
    """
    return max(_moments(shape, settings, keep), key=lambda parts: sum(parts.values()))


def _moments(shape: Shape, outside: PlanSettings, keep: bool) -> Iterator[dict[str, int]]:
    settings = outside.gathered
    size, L = settings.gradient_bytes, shape.num_layers
    total = _shard(trainable(shape, outside) * outside.gradient_bytes, outside)
    layer = _shard(_layer_trainable(shape, outside) * outside.gradient_bytes, outside)
    dW = shape.embedding * size if settings.trains_head else 0
    down = shape.largest * size
    if settings.lora_rank:
        down = settings.lora_rank * (shape.hidden + shape.intermediate) * size
    final = _final(shape, settings)
    kept = _kept(shape, settings)
    again = settings.accumulation > 1
    gathered = {"gathered": _gathered(shape, outside)}
    whole = _whole_gradients(_layer_trainable(shape, outside), outside)

    def moment(layers_left: int, gradient: int, working: int) -> dict[str, int]:
        held = _activations(shape, settings) if keep else final + layers_left * kept
        return gathered | {
            "activations": held,
            "gradient in the making": total + dW + whole if again else gradient,
            "working set": working,
        }

    mlp, norm, residual = _working_sets(shape, settings)
    consumed = keep and not settings.gradient_checkpointing
    recomputed = _recomputed(shape, settings)
    for n in range(L, 0, -1):
        above = dW + (L - n) * layer
        # A graph that is not kept lets go of the MLP's product before its gradient is made.
        freed = 0 if consumed else settings.tokens * settings.product_bytes * shape.intermediate
        yield moment(n, above + (whole or down), recomputed + mlp + residual - freed)
        if recomputed:
            adapter = _adapter_input(shape, settings) + _adapter_gradient(shape, settings)
            yield moment(n, above + whole, recomputed + 2 * residual + adapter)
        if keep:
            yield moment(n, above + (whole or layer), norm + residual)
    matrix = shape.embedding * size if settings.trains_head else 0
    tied = matrix if shape.tied or again else 0
    if outside.shards > 1:
        within = 0 if settings.lora_rank else _in_layers(shape, settings)
        tied = _whole_gradients(trainable(shape, outside) - within, outside)
    yield moment(0, total + tied, residual)
    if outside.waiting_bytes < outside.gradient_bytes:
        # rounded, or sent away, while all of it is still there
        rounded = trainable(shape, outside) * outside.waiting_bytes
        yield moment(0, total, _shard(rounded, outside))


def _whole_gradients(parameters: int, settings: PlanSettings) -> int:
    """Bytes of gradients that no process has cut yet: as autograd made them, and to be added up."""
    if settings.shards == 1:
        return 0
    return parameters * (settings.gathered.weight_bytes + settings.reduced_bytes)


def _adapter_input(shape: Shape, settings: PlanSettings) -> int:
    """Bytes at the end of a layer's forward pass: the MLP's product on its way into an adapter,
    in the model's dtype and in float32, which is that of the adapter."""
    if not settings.lora_rank or settings.operand_bytes == LORA_BYTES:
        return 0
    return settings.tokens * (settings.operand_bytes + LORA_BYTES) * shape.intermediate


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
        max(M * product, _scan(shape, settings)),
        M * 5 * 4 * shape.hidden,
        M * settings.weight_bytes * shape.hidden,
    )


def _scan(shape: Shape, settings: PlanSettings) -> int:
    """Bytes of a scan's backward: both factors of the recurrence have a gradient that is added up,
    and one with a single token's."""
    return 0 if shape.kept is None else 3 * shape.kept(settings).scan * settings.batch_size


# ---- the stages of a step that streams its gradients


def _streamed_stages(shape: Shape, settings: PlanSettings) -> Iterator[Stage]:
    """Forward of both sides up to the last block, losses, and one or two sweeps over the blocks.

    Micro-batches wait for the sweeps with all of their block inputs.
    """
    lasting = _lasting(shape, settings)
    outside, settings = settings, settings.gathered
    retain = settings.of_retain_batch
    streams = [s.tokens * s.weight_bytes * shape.hidden for s in (settings, retain)]
    # What blocks are given, and what the last one returns; retain and KL share theirs.
    sides = [(shape.num_layers + 1) * stream for stream in streams]
    more = (settings.objectives - OBJECTIVES) * sides[0]  # of further sets
    objectives = [streams[0], *[streams[1]] * (settings.objectives - 1)]
    earlier = settings.accumulation - 1
    size = outside.gradient_bytes
    gathered = {"gathered": _gathered(shape, outside)}
    layers = 2 * shape.largest_layer * settings.weight_bytes if outside.shards > 1 else 0
    at_losses = {"gathered": gathered["gathered"] - layers}  # the one that FSDP2 gathers in advance
    sliced = matrices_in_slices(shape, settings)
    others = trainable(shape, settings) - _in_layers(shape, settings) - sliced
    ends = _shard(max(others, 0) * size, outside)
    dW = shape.embedding * size if settings.trains_head and not sliced else 0
    late = 0 if shape.tied else dW  # embeddings of their own have no gradient before the sweeps
    # Of a head in slices no loss makes a gradient: the states that met it are kept.
    states = [s.answers * s.weight_bytes * shape.hidden * bool(sliced) for s in (settings, retain)]
    if sliced:
        states[1] *= 2  # those of the original too

    def stage(name: str, done: int, cotangents: int, ends: int, parts: Mapping[str, int]) -> Stage:
        everything = lasting | {
            "block inputs": earlier * (sum(sides) + more) + sum(sides[:done]) + more,
            "states at the head": earlier * sum(states) + sum(states[: (cotangents + 1) // 2]),
            # Those of the losses, and in a sweep those at the block that it has come to.
            "cotangents": earlier * sum(objectives) * (2 if cotangents > len(objectives) else 1)
            + sum((2 * objectives)[:cotangents]),
            "embeddings, head and norm": ends,
            **parts,
        }
        return Stage(name, {part: n for part, n in everything.items() if n})

    def top(found: int) -> int:
        """Bytes of the gradients outside of the blocks that the losses have left by then."""
        return (settings.objectives if earlier else found) * (ends - late)

    def forward(side: PlanSettings) -> dict[str, int]:
        return gathered | {"working set": _forward_pass(shape, side)}

    def at_head(side: PlanSettings) -> PlanSettings:
        return replace(side, freeze_embeddings=True) if sliced else side

    def loss(side: PlanSettings, losses: int) -> dict[str, int]:
        return (
            at_losses | {"activations": _final(shape, side)} | _loss(shape, at_head(side), losses)
        )

    def backward(side: PlanSettings, losses: int) -> dict[str, int]:
        return at_losses | {
            "activations": _final(shape, side),
            "head gradients of the losses": _loss_gradients(shape, at_head(side), losses),
            "working set": _working_sets(shape, side)[1] + (dW if earlier else 0),
        }

    original = {"states of the original": retain.answers * shape.hidden * retain.weight_bytes}
    yield stage("forget forward", 1, 0, top(0), forward(settings))
    yield stage("forget loss", 1, 0, top(0), loss(settings, 1))
    yield stage("forget backward, head", 1, 1, top(1), backward(settings, 1))
    yield stage("retain forward", 2, 1, top(1), forward(retain))
    first = gathered | {"working set": _reference_pass(shape, retain)}
    yield stage("reference", 2, 1, top(1), first)
    yield stage("retain loss", 2, 1, top(1), original | loss(retain, 2))
    yield stage("retain backward, head", 2, 3, top(3), original | backward(retain, 2))
    whole = settings.objectives * ends
    larger = max(settings, retain, key=lambda side: side.tokens)
    block = max(_block_moments(shape, outside, larger), key=lambda parts: sum(parts.values()))
    # The second sweep is made beside all gradients of the embeddings; the first one finds them in
    # its last block, where those of the last objective come once its activations are gone.
    at_ends = whole if settings.sweeps > 1 else whole - late
    looked_up = (earlier + 1) * sum(objectives) if sliced else 0  # cotangents at the embeddings
    if settings.sweeps > 1:
        block = block | {"cotangents at the embeddings": looked_up}
    yield stage("blocks", 2, 2 * settings.objectives, at_ends, block)
    slices = min(sliced, shape.largest_layer // SLICES_OF_A_BLOCK)
    passing = max(ends // size, slices)
    largest = min(_largest(shape, settings), passing) if sliced else _largest(shape, settings)
    made = {
        "gradient in the making": dW - late,  # on top of those of a tied head
        # Of the lowest block, which the second sweep begins with.
        "gradients of a block": _shard(settings.objectives * shape.largest_layer * size, outside),
        # Those of KL and cross-entropy on their way to the sum.
        "gradients of a slice": (settings.objectives + 2) * slices * size,
        "logits": _slice_of_logits(shape, settings, slices),
        "state in passing": _passing_state(passing, largest, settings),
    }
    yield stage("embeddings, head and norm", 2, 2 * settings.objectives, whole, made)


def matrices_in_slices(shape: Shape, settings: PlanSettings) -> int:
    """Parameters of embeddings and head whose streamed gradients are made some rows at a time."""
    large = shape.embedding > shape.largest_layer // SLICES_OF_A_BLOCK
    if not (settings.streams and settings.trains_head and large):
        return 0
    return shape.embedding * (1 if shape.tied else 2)


def _slice_of_logits(shape: Shape, settings: PlanSettings, elements: int) -> int:
    """Bytes of the columns of logits that a slice of the head's gradients is made from."""
    if not elements:
        return 0
    width = -(-elements // shape.hidden)
    most = deferred.rows_at_a_time(settings.device, torch.float32, width)
    answers = max(side.answers for side in (settings, settings.of_retain_batch))
    return min(answers, most) * deferred.ROWS_ALIVE * 4 * width


def _block_moments(
    shape: Shape, outside: PlanSettings, settings: PlanSettings
) -> Iterator[dict[str, int]]:
    """The fullest moments of a block's K backwards: KL, whose activations stay, and retain.

    Args:
        shape: The model.
        outside: How it trains.
        settings: The same as a layer meets them, with the larger batch.
    """
    whole = _whole_gradients(shape.largest_layer, outside)
    layer = _shard(shape.largest_layer * outside.gradient_bytes, outside)
    down = 0 if whole else shape.hidden * shape.intermediate * settings.gradient_bytes
    gathered = 2 * shape.largest_layer * settings.weight_bytes if whole else 0
    mlp, norm, residual = _working_sets(shape, settings)
    freed = settings.tokens * settings.product_bytes * shape.intermediate
    again = settings.accumulation > 1  # then all objectives' are there from the last micro-batch

    def moment(gradients: int, working: int, kept: bool = True) -> dict[str, int]:
        return {
            "gathered": gathered,
            "gradients of a block": gradients + whole,
            "activations": kept * _layer(shape, settings),
            "working set": working,
        }

    before = (settings.objectives if again else settings.objectives - 1) * layer
    yield moment(before + again * layer, norm + residual)
    yield moment(before + down, mlp + residual - freed)
    yield moment(before + layer, norm + residual, kept=False)
    passing = _shard(_passing_state(shape.largest_layer, shape.largest, outside), outside)
    yield moment(before + layer, passing, kept=False)


def _forward_pass(shape: Shape, settings: PlanSettings) -> int:
    """Bytes of a layer's forward pass of which nothing is kept, at the end of its MLP."""
    r, p = settings.weight_bytes, settings.product_bytes
    return settings.tokens * (2 * r * shape.hidden + 3 * p * shape.intermediate)
