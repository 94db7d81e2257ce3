"""Data sets of the Hugging Face hub, by the package `datasets`.

What a repository says of itself may name only its own files, and only such as hold rows: anything
else could make a data set read this machine's files, or fetch from addresses of its author's
choice.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mollm.errors import UsageError
from mollm.system.parsing import reason_of

if TYPE_CHECKING:
    from datasets import Dataset

_NAME = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")
_CARDS = ("README.md", ".huggingface.yaml")
_KINDS = ("arrow", "cache", "csv", "json", "parquet")
"""Builders of `datasets`; "cache" reads what one of the others has made before."""


def is_hub_name(name: str) -> bool:
    """Whether a data set on the hub could have this name: OWNER/NAME."""
    return _NAME.fullmatch(name) is not None and ".." not in name


def load_from_hub(name: str, config: str | None, split: str) -> Dataset:
    """Loads a split of a data set.

    Args:
        name: OWNER/NAME.
        config: The subset; None for the only or the default one.
        split: The split.

    Raises:
        UsageError: There is none, it cannot be loaded, or it names files that are not its own.
    """
    import datasets

    called = " ".join(part for part in (name, config, split) if part)
    try:
        revision = _check_card(name)
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        _check_builder(name, builder)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except UsageError:
        raise
    except Exception as error:  # whatever a reader of some format raises, even StopIteration
        # A failure to build says nothing itself: its cause does.
        built = not isinstance(error, datasets.exceptions.DatasetGenerationError)
        reason = reason_of(error if built else error.__cause__ or error)
        raise UsageError(f"the data set {called} cannot be loaded: {reason}.") from error


def _check_card(name: str) -> str | None:
    """Checks what a repository says of itself, before `datasets` asks for the files it names.

    Returns:
        The commit that was looked at; None where there is nothing to look at.
    """
    from huggingface_hub import hf_hub_download

    commit = None
    for file in _CARDS:
        with contextlib.suppress(OSError):  # there is none, or no network: `datasets` says which
            path = Path(hf_hub_download(name, file, repo_type="dataset", revision=commit))
            commit = path.parent.name
            for pattern in _patterns(_said(path)):
                if _is_foreign(pattern):
                    raise UsageError(
                        f"the data set {name} must name files of its own, but its {file} names "
                        f"{pattern!r}: download what you trust, and name the file."
                    )
    return commit


def _said(path: Path) -> Any:
    """The mapping in a card, as `datasets` reads it."""
    import yaml
    from huggingface_hub import metadata_load

    if path.suffix == ".md":
        return metadata_load(path)
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _patterns(card: Any) -> Iterator[str]:
    """Which files the configurations of a card name."""
    configs = card.get("configs") if isinstance(card, dict) else None
    waiting: list[Any] = []
    for config in configs if isinstance(configs, list) else []:
        if isinstance(config, dict):
            waiting += [config.get("data_files"), config.get("data_dir")]
    seen = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list | dict) and id(value) not in seen:
            seen.add(id(value))  # aliases in YAML make a value stand in many places
            waiting += value.values() if isinstance(value, dict) else value


def _is_foreign(pattern: str) -> bool:
    path = PurePosixPath(pattern)
    return "::" in pattern or "://" in pattern or path.is_absolute() or ".." in path.parts


def _check_builder(name: str, builder: Any) -> None:
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in _KINDS:
        raise UsageError(
            f"the data set {name} must hold rows as .jsonl, .json, .csv or .parquet, but it is of "
            f"the kind {kind}: convert it, and name the file."
        )
    own = f"hf://datasets/{name}@"
    for files in (builder.config.data_files or {}).values():
        for file in files:
            if not str(file).startswith(own):
                raise UsageError(
                    f"the data set {name} must hold files of its own, but it names {file}: "
                    "download what you trust, and name the file."
                )
