"""The options of `mollm evaluate`: one table of what each says, and where it has an effect."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mollm.commands.arguments import CHAT_OPTIONS, add_loading, add_long_rows
from mollm.errors import UsageError, did_you_mean
from mollm.system.parsing import user_path

OWN, TOFU, SAFETY = "own sets", "tofu", "safety"
FIXED = "a suite that fixes its prompts and figures"
REPLIES = "stored replies"
_ASKED = (OWN, TOFU, SAFETY)
"""Where a model is asked in a format that the user may choose."""
_MODEL = (*_ASKED, FIXED)
_ALL = (*_MODEL, REPLIES)


@dataclass(frozen=True)
class Option:
    """One option: its flag, its help and default, and the ways to evaluate that use it."""

    name: str
    ways: Sequence[str]
    help: str
    default: Any = None
    how: Mapping[str, Any] = field(default_factory=dict)
    """More for `add_argument`."""
    instead_of: str | None = None
    """The group of flags of which one may be given; "measured" must be."""

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


_PLACE = {"metavar": "PATH_OR_HUB_NAME"}
_WHOLE = {"type": int}
_SWITCH = {"action": "store_true"}
_OPTIONS = (
    Option(
        "model",
        _MODEL,
        "a run, a model folder, a .gguf file or a hub name",
        how=_PLACE,
        instead_of="measured",
    ),
    Option(
        "replies",
        (REPLIES,),
        "instead of a model: the examples.jsonl of an evaluation, or its folder; its replies are "
        "judged again, with --judge, and nothing is generated",
        how={"type": user_path, "metavar": "PATH"},
        instead_of="measured",
    ),
    Option(
        "suite",
        (TOFU, SAFETY, FIXED),
        "a benchmark by name: tofu, muse-news, muse-books, wmdp, rwku, lume or safety; its data "
        "come from the hub, or from the folder or hub name that --data gives",
        how={"metavar": "NAME"},
    ),
    Option(
        "data",
        (TOFU, SAFETY, FIXED),
        "of the suite: a folder laid out as on the hub, or a hub name; without --suite those of "
        "TOFU: locuslab/TOFU, or a folder with forget10_perturbed.jsonl, retain_perturbed.jsonl, "
        "real_authors_perturbed.jsonl, world_facts_perturbed.jsonl, and perhaps holdout10.jsonl",
        how={"metavar": "FOLDER_OR_HUB_NAME"},
        instead_of="sets",
    ),
    Option(
        "forget",
        (OWN,),
        "instead of TOFU: the examples to forget, as for `mollm unlearn`, optionally with "
        "options: '{path: locuslab/TOFU, config: forget10}' (default: those of the run)",
        how=_PLACE,
        instead_of="sets",
    ),
    Option("retain", (OWN,), "with --forget: examples to retain", how=_PLACE),
    Option(
        "holdout",
        (OWN,),
        "with --forget: examples like those to forget that no model was trained on",
        how=_PLACE,
    ),
    Option(
        "forget_split",
        (TOFU,),
        "with --data: forget01, forget05 or forget10 (default: forget10)",
    ),
    Option(
        "retain_logs",
        _ALL,
        "evaluation of a retain-only model, for forget_quality and privleak: its examples.jsonl, "
        "or open-unlearning's TOFU_EVAL.json; with muse, wmdp, rwku or lume its folder with "
        "metrics.json, for figures relative to that model's as well",
        how={"type": user_path, "metavar": "PATH"},
    ),
    Option(
        "original",
        _MODEL,
        "the model before unlearning, or none (default: as the run or the card says); its figures "
        "are kept for the next time, but for those of suites with prompts of their own",
        how=_PLACE,
    ),
    Option(
        "judge",
        (*_ASKED, REPLIES),
        "a classifier of replies, such as toxicity=unitary/toxic-bert:toxic,obscene, of which any "
        "label counts; without a label a model that writes safe or unsafe, such as "
        "harmful=meta-llama/Llama-Guard-3-8B; or all by name: '{name: toxicity, model: "
        'unitary/toxic-bert, labels: [toxic], threshold: 0.7, template: "{reply}"}\'; several '
        "allowed",
        how={"action": "append", "metavar": "NAME=MODEL:LABEL"},
    ),
    Option(
        "judge_template",
        (*_ASKED, REPLIES),
        "what judges without a template of their own read, with {reply} and perhaps {question} "
        "(default: {reply}; a model that writes its verdict is asked by its chat template)",
        how={"metavar": "TEXT"},
    ),
    Option(
        "benchmarks",
        _ASKED,
        "tasks of lm-evaluation-harness to run as well",
        how={"metavar": "mmlu,hellaswag,..."},
    ),
    Option(
        "metrics",
        _ALL,
        "metrics to compute (default: all that the inputs allow)",
        how={"metavar": "model_utility,forget_quality,..."},
    ),
    Option(
        "limit", _MODEL, "examples of each set and of each benchmark (default: all)", how=_WHOLE
    ),
    Option("batch_size", _MODEL, "examples per batch", 16, _WHOLE),
    Option("max_new_tokens", _ASKED, "longest reply, in tokens", 200, _WHOLE),
    Option("resamples", _ALL, "resamples of each confidence interval", 1000, _WHOLE),
    Option("seed", _ALL, "seed of the resampling", 0, _WHOLE),
    Option("no_cache", _ASKED, "measure the original even if that is known", False, _SWITCH),
    Option("explain", _ALL, "say why figures are missing, and how to get them", False, _SWITCH),
    Option(
        "out",
        _ALL,
        "folder for the results (default: evaluation in the folder of the run, else runs/evaluate; "
        "judged in the folder of the replies)",
        how={"type": user_path},
    ),
    Option("quiet", _ALL, "print the figures alone, and no bar", False, _SWITCH),
    Option("json", _ALL, "print the figures as JSON", False, _SWITCH),
)
_WAYS = {one.name: one.ways for one in _OPTIONS}
_WAYS |= dict.fromkeys((*CHAT_OPTIONS, "long_rows"), _ASKED)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds all of them to a parser, none with a default: what is in the result was typed."""
    groups = {
        "measured": parser.add_mutually_exclusive_group(required=True),
        "sets": parser.add_mutually_exclusive_group(),
    }
    for one in _OPTIONS:
        silent = one.default is None or one.default is False
        told = one.help if silent else f"{one.help} (default: {one.default})"
        where = parser if one.instead_of is None else groups[one.instead_of]
        where.add_argument(one.flag, default=argparse.SUPPRESS, help=told, **one.how)
    add_long_rows(parser)
    add_loading(parser)


def read_options(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The way to evaluate, and the options by name, also put into `arguments` with their defaults.

    Raises:
        UsageError: There is no such suite, or an option would have no effect.
    """
    typed = {name: value for name, value in vars(arguments).items() if value is not None}
    way = _way_of(typed)
    for name in _WAYS:
        if name in typed and way not in _WAYS[name]:
            raise UsageError(
                f"{name.replace('_', '-')} must be left out {_why_not(name, way, typed)}, but got "
                f"{str(typed[name])!r}."
            )
    for one in _OPTIONS:
        if one.default is not None and one.name not in typed:
            setattr(arguments, one.name, one.default)
            typed[one.name] = one.default
    return way, typed


def _way_of(typed: Mapping[str, Any]) -> str:
    from mollm.evaluation.field import BENCHMARKS

    if "replies" in typed:
        return REPLIES
    if "suite" not in typed:
        return TOFU if "data" in typed else OWN
    name, known = typed["suite"], (TOFU, SAFETY, *BENCHMARKS)
    if name not in known:
        raise UsageError(
            f"suite must be one of {', '.join(known)}, but got {name!r}{did_you_mean(name, known)}"
        )
    return str(name) if name in (TOFU, SAFETY) else FIXED


def _why_not(name: str, way: str, typed: Mapping[str, Any]) -> str:
    """Where an option has no effect, and why."""
    where = f"with the suite {typed['suite']}" if "suite" in typed else "with --data"
    return {
        REPLIES: "with --replies, of which nothing is generated or measured but by judges",
        OWN: "without --data or a suite",
        TOFU: f"{where}, whose sets are its own",
        SAFETY: f"{where}, whose sets are its own",
        FIXED: f"{where}, which measures its original anew each time"
        if name == "no_cache"
        else f"{where}, which fixes its prompts and figures",
    }[way]
