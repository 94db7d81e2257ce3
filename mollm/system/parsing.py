"""Text files that others wrote: UTF-8, JSON and YAML, each read whole or refused in a sentence."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from mollm.errors import UsageError

_YAML_BYTES = 1 << 18
_TEXT_BYTES = 1 << 28
_PART = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")


def reason_of(error: BaseException, length: int | None = 300) -> str:
    """What an error says, in one line without a full stop at its end; else its type."""
    return " ".join(str(error).split())[:length].rstrip(".") or type(error).__name__


def is_unicode(text: str) -> bool:
    """Whether no half of a surrogate pair is in it, which UTF-8 cannot hold."""
    return _SURROGATE.search(text) is None


def is_file(path: Path) -> bool:
    """Whether `path` is a file; what cannot be a path, such as a long name, is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder; what cannot be a path, such as a long name, is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def check_file(path: Path, most_bytes: int | None = None) -> None:
    """Refuses, before it is opened, what is no file, such as a pipe, which may never end, and a
    file that is too large to be what it should be.

    Raises:
        UsageError: It is such a thing, or cannot be looked at.
    """
    try:
        about = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise UsageError(f"{path} cannot be read: {reason}.") from error
    if not stat.S_ISREG(about.st_mode):
        what = "a folder" if stat.S_ISDIR(about.st_mode) else "a pipe, a socket or a device"
        raise UsageError(f"{path} must be a file, but it is {what}.")
    if most_bytes is not None and about.st_size > most_bytes:
        raise UsageError(
            f"{path} must have at most {most_bytes:,} bytes, but has {about.st_size:,}: is it the "
            "file that you meant, or is it damaged?"
        )


def user_path(name: str | Path) -> Path:
    """The path of that name, where a leading ~ is the user's home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~somebody, whom this machine does not know
        return Path(name)


def read_text(path: Path, most_bytes: int | None = _TEXT_BYTES) -> str:
    """The text of a UTF-8 file, with its own line ends and without a byte order mark.

    Raises:
        UsageError: It cannot be read, is not UTF-8, holds a null character, or has more than
            `most_bytes` or than fits into the memory.
    """
    check_file(path, most_bytes)
    try:
        return _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} must be UTF-8 text, but its byte {error.start} is not: save it as UTF-8."
        ) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    except MemoryError:
        raise UsageError(
            f"{path} has {path.stat().st_size:,} bytes, more than this machine has memory for: "
            "split it."
        ) from None


def _read_bytes(path: Path) -> bytearray:
    """All bytes, none of them 0: a hole in a file, which may take no room on the disk and
    terabytes in the memory, ends it at once."""
    found = bytearray()
    with path.open("rb") as file:
        while part := file.read(_PART):
            if b"\0" in part:
                line = found.count(b"\n") + part[: part.index(0)].count(b"\n") + 1
                raise UsageError(
                    f"{path}, line {line} must hold no null character, but it does: save it as "
                    "UTF-8, or write it again if it was cut short."
                )
            found += part
    return found


def parse_json(text: str, place: str) -> Any:
    """The value of a JSON text.

    Infinity and NaN, which are not JSON but which Python writes, are read as the numbers they name.

    Args:
        text: The text.
        place: The file, perhaps with a line, for the error.

    Raises:
        UsageError: It is malformed, a key stands twice in one object, or it is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f" of line {error.lineno}" if "\n" in text else ""
        raise UsageError(
            f"{place} is malformed JSON at column {error.colno}{line}: {error.msg}."
        ) from error
    except RecursionError:
        raise UsageError(f"{place} is nested too deeply to be read.") from None
    except ValueError as error:  # a number of more than 4300 digits, a key that stands twice
        raise UsageError(f"{place} cannot be read as JSON: {reason_of(error)}.") from error


def parse_json_lines(text: str, place: str) -> Iterator[tuple[int, Any]]:
    """The values of a text with JSON on each line, with the numbers of their lines from 1.

    Blank lines hold none. Only a line feed ends a line: a text within JSON may hold U+2028 and
    other characters as they are at which `str.splitlines` splits too.

    Args:
        text: The text.
        place: The file, for the error, which names the line besides.

    Raises:
        UsageError: A line is malformed, see `parse_json`; those before it have been given by then.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, parse_json(line, f"{place}, line {number}")


def lines_of(text: str) -> list[str]:
    """The lines of a text that a person wrote, ended as in Python's text files: by a line feed, a
    carriage return or both, and by nothing else at which `str.splitlines` splits too."""
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def parse_yaml(text: str, place: str) -> Any:
    """The value of a YAML text: mappings with texts as keys, lists, texts, numbers, true, false and
    null. What looks like a date is a text.

    Args:
        text: The text, one document.
        place: The file, or what the text is, for the error.

    Raises:
        UsageError: It is malformed, it holds a value of another kind, an alias, which a few lines
            can multiply to any size, or a key twice; or it is too long or nested too deeply.
    """
    import yaml

    if len(text) > _YAML_BYTES:
        raise UsageError(f"{place} must have at most {_YAML_BYTES:,} characters, but is longer.")
    try:
        return yaml.load(text, Loader=_loader())
    except RecursionError:
        raise UsageError(f"{place} is nested too deeply to be read.") from None
    except (yaml.YAMLError, ValueError, OverflowError, LookupError, AttributeError) as error:
        # The constructors of numbers and the scanner raise whatever their parsing raises.
        raise UsageError(
            f"{place} must be valid YAML, but it is not: {reason_of(error)}."
        ) from error


def _loader() -> type:
    """Made here, so that the package yaml is needed where a YAML text is read, and not before."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        yaml_constructors: ClassVar[dict[str | None, Any]] = {}

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                self.refuse("must hold no alias (*): write the value out", self.peek_event())
            return super().compose_node(parent, index)

        def construct_document(self, node: Any) -> Any:
            return self.construct_object(node, deep=True)

        def mapping(self, node: Any) -> dict[str, Any]:
            if not isinstance(node, yaml.MappingNode):
                self.refuse("must hold a mapping", node)
            found: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str):
                    self.refuse(f"must have texts as keys, but got {key!r}: quote it", key_node)
                if key in found:
                    self.refuse(f"must have every key once, but {key!r} stands twice", key_node)
                found[key] = self.construct_object(value_node, deep=True)
            return found

        def whole_number(self, node: Any) -> int:
            self.refuse_base_60(node)
            value: int = self.construct_yaml_int(node)
            if abs(value) >> 64:  # one of many digits cannot even be shown
                self.refuse("must hold whole numbers of at most 64 bits", node)
            return value

        def fraction(self, node: Any) -> float:
            self.refuse_base_60(node)
            value: float = self.construct_yaml_float(node)
            return value

        def refuse_base_60(self, node: Any) -> None:
            if ":" in str(node.value):  # 1:30:00 is 5400 in YAML 1.1 and a text in YAML 1.2
                self.refuse(f"must hold numbers without colons, but got {node.value[:40]}", node)

        def refuse(self, what: str, place: Any) -> NoReturn:
            raise yaml.MarkedYAMLError(problem=what, problem_mark=place.start_mark)

        def unknown(self, node: Any) -> NoReturn:
            self.refuse(f"must hold no value with the tag {node.tag}", node)

    tag = "tag:yaml.org,2002:"
    Loader.add_constructor(f"{tag}int", Loader.whole_number)
    Loader.add_constructor(f"{tag}float", Loader.fraction)
    for name in ("null", "bool"):
        Loader.add_constructor(f"{tag}{name}", getattr(yaml.SafeLoader, f"construct_yaml_{name}"))
    for name in ("str", "timestamp", "merge", "value"):
        Loader.add_constructor(f"{tag}{name}", yaml.SafeLoader.construct_scalar)
    Loader.add_constructor(f"{tag}seq", lambda self, node: self.construct_sequence(node, deep=True))
    Loader.add_constructor(f"{tag}map", Loader.mapping)
    Loader.add_constructor(None, Loader.unknown)
    return Loader
