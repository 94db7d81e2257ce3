"""What would make a step fit, in the order in which one would try it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from mollm.models.four_bits import NF4
from mollm.optim.constants import EIGHT_BITS, MODEL, STREAMED
from mollm.planning.memory import MemoryPlan, plan
from mollm.planning.settings import PlanSettings, flag_of


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
    if not now.settings.streams:
        yield "--gradient-checkpointing", replace(now.settings, gradient_checkpointing=True)


def _smaller_batch(now: MemoryPlan, memory: float) -> Iterator[tuple[str, PlanSettings]]:
    """The largest part of both batches that fits, or the one that needs least."""
    settings = now.settings
    forget, retain = settings.batch_size, settings.retain_batch_size
    common = math.gcd(forget, retain or forget)
    tried = [
        replace(
            settings,
            batch_size=forget // n,
            retain_batch_size=retain and retain // n,
            accumulation=settings.accumulation * n,
        )
        for n in range(2, common + 1)
        if common % n == 0
    ]
    if tried:
        best = _first_that_fits(now, tried, memory)
        names = ("batch_size", "retain_batch_size", "accumulation")
        changed = [name for name in names if getattr(best, name) is not None]
        yield " ".join(f"{flag_of(name)} {getattr(best, name)}" for name in changed), best


def _narrow_state(now: MemoryPlan, memory: float) -> Iterator[tuple[str, PlanSettings]]:
    if now.settings.moments_kept:
        yield "--state-dtype bfloat16", replace(now.settings, state_dtype="bfloat16")


def _small_gradients(now: MemoryPlan, memory: float) -> Iterator[tuple[str, PlanSettings]]:
    """Rounded gradients if those fit, and else gradients of one block at a time."""
    if now.settings.lora_rank:
        return
    tried = [replace(now.settings, gradient_memory="bfloat16")]
    if now.settings.streamed is not None:
        tried.append(now.settings.streamed)
    best = _first_that_fits(now, tried, memory)
    words = f"--gradient-memory {best.gradient_memory}"
    given_up = now.settings.gradient_checkpointing and not best.gradient_checkpointing
    yield f"{words}, no checkpointing" if given_up else words, best


def _first_that_fits(now: MemoryPlan, tried: Sequence[PlanSettings], memory: float) -> PlanSettings:
    plans = [plan(now.shape, settings) for settings in tried]
    fitting = [p for p in plans if p.fits(memory)]
    best = fitting[0] if fitting else min(plans, key=lambda p: p.peak.total)
    return best.settings


def _cached_reference(now: MemoryPlan, memory: float) -> Iterator[tuple[str, PlanSettings]]:
    if now.settings.reference == "copy":
        yield "--reference cache", replace(now.settings, reference="cache")


def _frozen_embeddings(now: MemoryPlan, memory: float) -> Iterator[tuple[str, PlanSettings]]:
    if not (now.settings.lora_rank or now.settings.trainable_parameters):
        yield "--freeze-embeddings", replace(now.settings, freeze_embeddings=True)


def _narrow_weights(now: MemoryPlan, memory: float) -> Iterator[tuple[str, PlanSettings]]:
    if not now.settings.lora_rank:
        narrow = replace(now.settings, dtype="bfloat16")
        if narrow.gradient_memory == "bfloat16":  # rounds nothing more
            narrow = replace(narrow, gradient_memory="as-produced")
        yield "--dtype bfloat16", narrow
        if narrow.streamed is not None:
            yield f"--gradient-memory {STREAMED}, no checkpointing", narrow.streamed


def _small_second_moment(now: MemoryPlan, memory: float) -> Iterator[tuple[str, PlanSettings]]:
    """State in 8 bits if that fits, and else none."""
    settings = now.settings
    if settings.lora_rank or not settings.moments_kept:
        return
    tried = {}
    if settings.shards == 1:
        eight = replace(settings, state_dtype=EIGHT_BITS)
        tried[eight] = f"--state-dtype {EIGHT_BITS}"
    if settings.adam_beta2:
        words, dtype = "--adam-beta2 0", settings.state_dtype
        if dtype and settings.moments_kept == 1:  # the second, whose dtype would do nothing
            words, dtype = f"{words}, no state dtype", None
        tried[replace(settings, adam_beta2=0.0, state_dtype=dtype)] = words
    if tried:
        best = _first_that_fits(now, list(tried), memory)
        yield tried[best], best


def _adapters(now: MemoryPlan, memory: float) -> Iterator[tuple[str, PlanSettings]]:
    if now.settings.lora_rank:
        return
    words, settings = "--lora 16 --reference adapter", now.settings
    if settings.streams:
        words = f"{words} --gradient-memory as-produced --gradient-checkpointing"
        settings = replace(
            settings, gradient_memory="as-produced", gram=MODEL, gradient_checkpointing=True
        )
    if settings.trainable_parameters:
        words = f"{words}, without --trainable-parameters"
    yield words, replace(settings, lora_rank=16, reference="adapter", trainable_parameters=())


def _four_bits(now: MemoryPlan, memory: float) -> Iterator[tuple[str, PlanSettings]]:
    if now.settings.lora_rank and now.settings.shards == 1:
        yield f"--quantization {NF4}", replace(now.settings, quantization=NF4)


_CHANGES: tuple[Change, ...] = (
    _checkpointed,
    _smaller_batch,
    _narrow_state,
    _small_gradients,
    _cached_reference,
    _frozen_embeddings,
    _narrow_weights,
    _small_second_moment,
    _adapters,
    _four_bits,
)
