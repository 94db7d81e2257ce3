"""The settings to begin with, for a model, its data and the memory that there is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mollm.planning.memory import MemoryPlan, plan
from mollm.planning.proposals import proposals
from mollm.planning.settings import OPTIONS, PlanSettings
from mollm.planning.shapes import Shape
from mollm.system.units import GIB

_ROWS = 8
_ROUNDED_TO = 64
_PASSES = 4
_FEWEST, _MOST = 12, 60
_RATES = ((10e6, 1e-3), (500e6, 2e-5), (math.inf, 1e-5))
"""Parameters up to which a rate is one to begin with; see the page on choosing."""
_ADAPTER_RATE = 1e-4


@dataclass(frozen=True)
class FirstSettings:
    """What to begin with."""

    plan: MemoryPlan
    changes: tuple[str, ...]
    """What was changed to make it fit, in the words of `mollm plan`."""
    fits: bool | None
    """None where the memory is not known."""
    learning_rate: float
    max_steps: int

    def by_name(self) -> dict[str, Any]:
        """The settings of a run that differ from the defaults, or that one would change first."""
        return {
            "learning_rate": self.learning_rate,
            "max_steps": self.max_steps,
            **run_settings(self.plan.settings),
        }


def run_settings(chosen: PlanSettings) -> dict[str, Any]:
    """What is planned as settings of a run: sizes, and what differs from the defaults of both."""

    def other(name: str) -> Any:
        value = getattr(chosen, name)
        return None if value == OPTIONS[name].default else value

    usual = "adapter" if chosen.lora_rank else "copy"
    options = {
        "base": other("optimizer"),
        "state_dtype": chosen.state_dtype,
        "gradient_memory": other("gradient_memory"),
        "gram": other("gram"),
        "momentum": chosen.momentum,
        "metric": other("metric"),
    }
    told: dict[str, Any] = {
        "per_device_train_batch_size": chosen.batch_size,
        "per_device_retain_batch_size": chosen.retain_batch_size,
        "gradient_accumulation_steps": chosen.accumulation,
        "max_length": chosen.sequence_length,
        "gradient_checkpointing": chosen.gradient_checkpointing or None,
        "reference": None if chosen.reference == usual else chosen.reference,
        "relearn_steps": chosen.relearn_steps or None,
        "lora": chosen.lora_rank or None,
        "quantization": chosen.quantization,
        "dtype": other("dtype"),
        "trainable_parameters": list(chosen.trainable_parameters) or None,
        "freeze_embeddings": None if chosen.freeze_embeddings or chosen.lora_rank else False,
        "adam_beta2": other("adam_beta2"),
        "optimizer_options": {n: v for n, v in options.items() if v is not None} or None,
    }
    return {name: value for name, value in told.items() if value is not None}


def first_settings(
    shape: Shape,
    settings: PlanSettings,
    memory: float | None,
    *,
    longest: int,
    forget_rows: int,
) -> FirstSettings:
    """Eight rows of each set a step, and what `plan` proposes where that does not fit.

    Args:
        shape: The model.
        settings: What is given: dtypes, device, LoRA.
        memory: Bytes; None where they are not known.
        longest: Tokens of the longest row.
        forget_rows: How many rows there are to forget.
    """
    length = min(
        math.ceil(longest / _ROUNDED_TO) * _ROUNDED_TO, max(settings.sequence_length, longest)
    )
    rows = min(_ROWS, forget_rows)
    wanted = replace(settings, batch_size=rows, sequence_length=length, freeze_embeddings=True)
    first = plan(shape, wanted)
    found = [] if memory is None or first.fits(memory) else proposals(first, memory)
    last = found[-1].plan if found else first
    chosen = last.settings
    steps = math.ceil(_PASSES * forget_rows / (chosen.batch_size * chosen.accumulation))
    return FirstSettings(
        last,
        tuple(proposal.words for proposal in found),
        None if memory is None else last.fits(memory),
        rate_for(last.shape.parameters, adapter=bool(chosen.lora_rank)),
        min(_MOST, max(_FEWEST, steps)),
    )


def rate_for(parameters: int, *, adapter: bool) -> float:
    """A learning rate to begin with, for a model of so many parameters."""
    rate = next(rate for most, rate in _RATES if parameters <= most)
    return max(rate, _ADAPTER_RATE) if adapter else rate


def written(data: Mapping[str, Any], first: FirstSettings, facts: str) -> str:
    """A settings file with a comment to each line.

    Args:
        data: model, forget, retain and out.
        first: What to begin with.
        facts: A line about the data.
    """
    import json

    def line(name: str, value: Any, comment: str = "") -> str:
        shown = f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
        text = f"{name}: {shown}"
        return f"{text:<32}  # {comment}" if comment else text

    peak = first.plan.peak.total / GIB
    fits = {
        True: ": it fits.",
        False: ": IT DOES NOT FIT, use a smaller model or a larger device.",
        None: ".",
    }
    chosen = first.by_name()
    lines = [
        "# Settings of a run: mollm unlearn --config THIS_FILE",
        f"# {facts}",
        f"# Planned peak of memory: {peak:.2f} GiB{fits[first.fits]}",
        *(f"# To fit: {words}" for words in first.changes),
        "",
        *(line(name, value, _COMMENTS.get(name, "")) for name, value in data.items()),
        "",
        *(line(name, value, _COMMENTS.get(name, "")) for name, value in chosen.items()),
        "",
        "# End the run where the answers are gone, looked at every 10 steps:",
        "# stop_when: {forget_probability: 0.1, retain_probability: 0.5}",
        "# Rows that training does not see, to evaluate on:",
        "# eval_forget: held-out-forget.jsonl",
        "# eval_retain: held-out-retain.jsonl",
        "# eval_strategy: steps",
        "# eval_steps: 10",
    ]
    return "\n".join(lines) + "\n"


_COMMENTS = {
    "model": "a folder, a .gguf file or a hub name",
    "forget": "to forget; also {path: …, split: …}",
    "retain": "to keep",
    "out": "a new folder for model and report",
    "learning_rate": "to begin with; `mollm tune` finds a better",
    "max_steps": "four passes over the forget set, 12 to 60",
    "per_device_train_batch_size": "rows of each set that go together",
    "gradient_accumulation_steps": "such batches a step",
    "max_length": "tokens of a row, as long as the longest",
    "gradient_checkpointing": "less memory, more time",
    "reference": "cache: no second model in memory",
    "lora": "rank of the adapter that trains instead",
    "quantization": "under the adapter; needs bitsandbytes",
    "dtype": "half the memory; small steps round away",
    "adam_beta2": "0: AdamW without a second moment",
    "device": "cpu or cuda",
    "optimizer_options": "less memory for state and gradients",
}
