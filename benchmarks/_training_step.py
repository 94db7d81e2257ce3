"""The whole training step against one step of the weighted sum of the same three losses.

    MOLLM           mollm.training.step.accumulate, then MOLLMOptimizer.step
    streamed        the same with gradient_memory="streamed", which computes each block again twice
    blocks          the same with gram="blocks", which computes each block again once
    weighted sum    the same forwards, one backward of c_1 forget + c_2 kl + c_3 retain, then
                    torch.optim.AdamW(fused=True)

All walk with the same parameters and the same moments, on the same batches, in turns.

FLOPs, in units of one forward pass F of one batch through the decoder's L layers:
                                          weighted sum   MOLLM   streamed                blocks
    forwards of both batches,                  6F          8F     2F + (2 - 1/L) 8F     2F + 8F
    backwards of 2F each
    the frozen copy, or the model without    + 1F        + 1F    + 1F                  + 1F
    its adapter
    checkpointing, one more forward          + 2F        + 3F
    LoRA, backwards of 1F                    - 2F        - 3F
and, on both sides alike, products of the head with N answers: three for the forget loss (two where
the head is frozen), six for KL and cross-entropy (four).
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _common import Row, interleaved_medians, most_allocated

from mollm import MOLLMOptimizer, find_blocks
from mollm.data.chat import IGNORE_INDEX, Batch, Tokens, collate
from mollm.methods import METHODS, method
from mollm.models import forward, tape
from mollm.optim import optimizer
from mollm.optim.constants import BLOCKS, STREAMED
from mollm.planning import memory, shapes
from mollm.planning.memory import MemoryPlan
from mollm.planning.settings import PlanSettings
from mollm.planning.shapes import Shape
from mollm.system import precision
from mollm.system.units import GIB
from mollm.training import step
from mollm.training.objectives import Objectives
from mollm.training.reference_model import CachedReference, make_reference

METHOD = METHODS["mollm"]
LR = 1e-6
PARTS = ("forward", "backward", "Gram", "update")


@dataclass(frozen=True)
class Case:
    """A model and how it trains."""

    name: str
    config: dict[str, Any]
    """Options of a LlamaConfig."""
    settings: PlanSettings

    @cached_property
    def shape(self) -> Shape:
        from transformers import LlamaConfig

        return shapes.shape_of(LlamaConfig(**self.config), self.name)

    @property
    def plan(self) -> MemoryPlan:
        computed = precision.compute_dtype(torch.device(self.settings.device)).name
        metric = METHOD.optimizer_options()["metric"]
        settings = replace(self.settings, compute_dtype=computed, metric=metric)
        return memory.plan(self.shape, settings)

    @property
    def streamed(self) -> Case:
        """The same with gradients of one block at a time."""
        settings = replace(self.settings, gradient_memory=STREAMED, gradient_checkpointing=False)
        return replace(self, settings=settings)


CPU_SETTINGS = PlanSettings(batch_size=4, sequence_length=128, device="cpu")
_ON_GPU = PlanSettings(
    batch_size=4, sequence_length=512, dtype="bfloat16", gradient_checkpointing=True
)
_SMOL = shapes.NAMED_SHAPES["smollm2-135m"]
SMALL = _SMOL | {
    "num_hidden_layers": 8,
    "hidden_size": 384,
    "num_attention_heads": 6,
    "intermediate_size": 1024,
}
_TINY = SMALL | {"num_hidden_layers": 2, "hidden_size": 96, "vocab_size": 512}


def cases(device: str, *, quick: bool) -> Iterator[Case]:
    """What is measured on a device; on a GPU the largest Llama 3 that fits."""
    if quick:
        for name, settings in _ways(replace(CPU_SETTINGS, sequence_length=16, device=device)):
            yield Case(f"tiny, {name}", _TINY, settings)
    elif device == "cpu":
        for name, settings in _ways(CPU_SETTINGS):
            yield Case(f"34M, {name}", SMALL, settings)
        for name, settings in _ways(CPU_SETTINGS):
            yield Case(f"SmolLM2-135M, {name}", _SMOL, settings)
        settings = replace(CPU_SETTINGS, freeze_embeddings=True, gradient_checkpointing=True)
        yield Case("SmolLM2-135M, copy, checkpointing", _SMOL, settings)
    else:
        free, _ = torch.cuda.mem_get_info()
        for checkpointing in (True, False):
            for name, settings in _ways(replace(_ON_GPU, gradient_checkpointing=checkpointing)):
                for shape in ("llama-3-8b", "llama-3.2-3b", "llama-3.2-1b"):
                    case = Case(f"{shape}, {name}", shapes.NAMED_SHAPES[shape], settings)
                    if case.plan.fits(0.95 * free):
                        yield case
                        break


def streamed_case(shape: str, device: str, *, quick: bool) -> Case:
    """A model that trains in full on one card, with nothing beside the streamed step."""
    on_device = _ON_GPU if device == "cuda" else replace(CPU_SETTINGS, batch_size=1)
    settings = replace(on_device, freeze_embeddings=True, reference="cache")
    if quick:
        settings = replace(settings, sequence_length=16)
    config = _TINY if quick else shapes.NAMED_SHAPES[shape]
    return Case(f"{'tiny' if quick else shape}, streamed", config, settings).streamed


def _ways(settings: PlanSettings) -> Iterator[tuple[str, PlanSettings]]:
    yield "copy", replace(settings, freeze_embeddings=True)
    yield "cache", replace(settings, freeze_embeddings=True, reference="cache")
    yield "copy, embeddings train", settings
    yield "LoRA", replace(settings, lora_rank=16, reference="adapter")


@contextmanager
def prepared(case: Case, device: str) -> Iterator[dict[str, WeightedSum | Mollm]]:
    """Both steps of a case by name, on one random model."""
    settings = case.settings
    model, adapted = _model(case, device)
    forget, retain = _rows(case)
    with tempfile.TemporaryDirectory() as folder:
        reference = make_reference(settings.reference, model, adapted, folder=Path(folder))
        objectives = Objectives(model, reference, METHOD.forget_loss)
        if isinstance(reference, CachedReference):
            reference.fill(
                retain,
                objectives.states,
                device=model.device,
                batch_size=settings.batch_size,
                pad_id=0,
            )
        pair = tuple(collate(rows, pad_id=0).to(device) for rows in (forget, retain))
        held = _optimizer(model, settings)
        steps: dict[str, WeightedSum | Mollm] = {}
        if not settings.streams:
            steps["weighted sum"] = WeightedSum(objectives, _torchs_adamw(held), pair)
            steps["MOLLM"] = Mollm(objectives, held, pair)
        if not settings.lora_rank:
            streamed = _optimizer(model, case.streamed.settings)
            streamed.state = streamed.base.state = held.state
            checkpoints = settings.gradient_checkpointing
            steps["streamed"] = Streamed(objectives, streamed, pair, checkpoints)
            by_blocks = _optimizer(model, replace(case.streamed.settings, gram=BLOCKS))
            by_blocks.state = by_blocks.base.state = held.state
            steps["blocks"] = Streamed(objectives, by_blocks, pair, checkpoints)
        yield steps


def rows_of(case: Case, device: str, rounds: int) -> list[Row]:
    """A row for each of the steps, which are measured in turns."""
    settings = case.settings
    with prepared(case, device) as steps:
        seconds = interleaved_medians(steps, device, rounds=rounds)
        first = next(iter(steps))
        return [
            {
                "case": case.name,
                "P": float(case.plan.trainable),
                "dtype": settings.dtype,
                "tokens": 2 * settings.tokens,
                "checkpointing": settings.gradient_checkpointing and not isinstance(call, Streamed),
                "step": name,
                "ms": 1e3 * seconds[name],
                "/ sum": seconds[name] / seconds[first],
                "by FLOPs": flops(case, name) / flops(case, first),
                "tokens/s": 2 * settings.tokens / seconds[name],
                **(shares(call, device) if math.isfinite(seconds[name]) else {}),
                **({} if name == "weighted sum" else peak(call, case)),
            }
            for name, call in steps.items()
        ]


def flops(case: Case, name: str) -> float:
    """Multiply-adds of the matrix products of one step."""
    shape, settings = case.shape, case.settings
    attention = settings.sequence_length * shape.query  # causal: half of the scores, twice
    layers = settings.tokens * shape.num_layers * (shape.linear // shape.num_layers + attention)
    backward = (1 if settings.lora_rank else 2) + settings.gradient_checkpointing
    sweeps = {"streamed": 2 - 1 / shape.num_layers, "blocks": 1}.get(name)
    backwards = 2 if name == "weighted sum" else 3 * (sweeps or 1)
    original = 0 if settings.reference == "cache" else 1
    if sweeps:
        original, backward = original + sweeps * 2, 2  # each sweep runs both batches once more
    answers = settings.batch_size * settings.sequence_length // 2
    passes = 9 if settings.trains_head else 6
    if sweeps and settings.trains_head:
        passes = 6 + 12  # in slices: each projection and gradient of the weight is made twice more
    head = answers * shape.embedding * passes
    return layers * (2 + original + backwards * backward) + head


def _model(case: Case, device: str) -> tuple[Any, Any | None]:
    """A random model, and the same in the wrapper of peft where it trains an adapter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = case.settings
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(
            LlamaConfig(**case.config), dtype=getattr(torch, settings.dtype)
        )
    adapted = None
    if settings.lora_rank:
        from peft import LoraConfig, get_peft_model

        options = {"r": settings.lora_rank, "target_modules": "all-linear"}
        adapted = get_peft_model(model, LoraConfig(**options, task_type="CAUSAL_LM"))
    elif settings.freeze_embeddings:
        forward.freeze_embeddings(model)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model.train(), adapted


def _optimizer(model: Any, settings: PlanSettings) -> MOLLMOptimizer:
    return MOLLMOptimizer(
        [p for p in model.parameters() if p.requires_grad],
        lr=LR,
        objectives=method.OBJECTIVES,
        gradient_memory=settings.gradient_memory,
        gram=settings.gram,
        **METHOD.optimizer_options(),
    )


def _rows(case: Case) -> tuple[list[Tokens], list[Tokens]]:
    """Random rows to forget and to retain; the second half of each is its answer."""
    settings, length = case.settings, case.settings.sequence_length
    torch.manual_seed(1)
    ids = torch.randint(case.shape.vocab, (2, settings.batch_size, length)).tolist()
    prompt = length - length // 2
    forget, retain = (
        [Tokens(row, [IGNORE_INDEX] * prompt + row[prompt:]) for row in rows] for rows in ids
    )
    return forget, retain


def _torchs_adamw(optimizer: MOLLMOptimizer) -> torch.optim.Optimizer:
    """Torch's own optimizer with the very moments of ours, as far as those go: a second set may
    not fit."""
    optimizer.base.make_state()  # type: ignore[attr-defined]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    torchs = torch.optim.AdamW(params, lr=LR, fused=True)
    for p in params:
        held = optimizer.state[p]  # in Adam's metric without a first moment
        torchs.state[p] = held if "exp_avg" in held else held | {"exp_avg": torch.zeros_like(p)}
    return torchs


@dataclass
class WeightedSum:
    """One step of the weighted sum."""

    objectives: Objectives
    optimizer: torch.optim.Optimizer
    pair: tuple[Batch, ...]

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        losses = self.objectives(*self.pair)
        assert METHOD.preferences is not None, "the weights of the sum are those of the method"
        named = zip(method.OBJECTIVES, METHOD.preferences, strict=True)
        step.backward(sum(c * losses[name] for name, c in named))
        self.optimizer.step()

    @contextmanager
    def timed(self, clock: Clock) -> Iterator[None]:
        with (
            clock.watches(step, "backward", "backward"),
            clock.watches(self.optimizer, "step", "update"),
        ):
            yield


@dataclass
class Mollm:
    """One step of ours."""

    objectives: Objectives
    optimizer: MOLLMOptimizer
    pair: tuple[Batch, ...]

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        step.accumulate(self.objectives, self.optimizer, *self.pair)
        self.optimizer.step()

    @contextmanager
    def timed(self, clock: Clock) -> Iterator[None]:
        with (
            clock.watches(step, "backward", "backward"),
            clock.watches(self.optimizer, "_solve", "Gram"),
            clock.watches(self.optimizer.base, "step_along", "update"),
        ):
            yield


@dataclass
class Streamed(Mollm):
    """One step of ours with gradients of one block at a time."""

    checkpoints: bool = False
    """Whether the other steps, which share the model, checkpoint its activations."""

    def __post_init__(self) -> None:
        with self._without_checkpoints() as model:
            self._blocks = find_blocks(model)

    def __call__(self) -> None:
        with self._without_checkpoints():
            self.optimizer.zero_grad()
            step.accumulate(self.objectives, self.optimizer, *self.pair, blocks=self._blocks)
            self.optimizer.step()

    @contextmanager
    def _without_checkpoints(self) -> Iterator[Any]:
        model: Any = self.objectives.model
        if self.checkpoints:
            model.gradient_checkpointing_disable()
        try:
            yield model
        finally:
            if self.checkpoints:
                model.gradient_checkpointing_enable()

    @contextmanager
    def timed(self, clock: Clock) -> Iterator[None]:
        with (
            clock.watches(tape, "grad", "backward"),
            clock.watches(optimizer, "gram", "Gram"),
            clock.watches(self.optimizer.base, "step_along", "update"),
        ):
            yield


class Clock:
    """Seconds of the functions it watches, the device's work included."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    def now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def watches(self, owner: Any, name: str, part: str) -> Iterator[None]:
        watched = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            start = self.now()
            result = watched(*args, **options)
            self.seconds[part] += self.now() - start
            return result

        with patch.object(owner, name, call):
            yield


def shares(call: WeightedSum | Mollm, device: str, steps: int = 2) -> Row:
    """Where the time of a few more steps goes; what is none of the other parts is forward."""
    clock = Clock(device)
    start = clock.now()
    with call.timed(clock):
        for _ in range(steps):
            call()
    total = clock.now() - start
    clock.seconds["forward"] = total - sum(clock.seconds.values())
    return {name: clock.seconds[name] / total for name in PARTS}


def peak(call: Mollm, case: Case) -> Row:
    """Peak memory of one more step beside what was planned, without the allowance for Torch.

    A plan is for rows that are answers but for their first token; these have as long a prompt.
    """
    planned = (case.streamed if isinstance(call, Streamed) else case).plan.peak.total
    planned -= memory.OVERHEAD_BYTES[case.settings.device]
    device = case.settings.device
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        found = torch.cuda.max_memory_allocated()
    else:
        call.optimizer.zero_grad()
        found = _lasting_bytes(call) + most_allocated(call)
    return {"peak GiB": found / GIB, "planned GiB": planned / GIB}


def _lasting_bytes(call: Mollm) -> int:
    state = (t for entry in call.optimizer.state.values() for t in entry.values())
    original = getattr(call.objectives.reference, "model", None)
    copied = () if original is None else original.parameters()
    tensors = {t.data_ptr(): t for t in (*call.objectives.model.parameters(), *copied, *state)}
    return sum(t.nbytes for t in tensors.values())


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """One bar for each step, cut into its parts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [f"{row['case']}: {row['step']}" for row in rows]
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(rows) + 1.6), layout="constrained")
    left = [0.0] * len(rows)
    for part in PARTS:
        widths = [row["ms"] * row.get(part, 0) for row in rows]
        axes.barh(labels, widths, left=left, label=part)
        left = [x + width for x, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
