"""Settings of a run from a YAML file and from the command line."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from mollm.commands.arguments import format_of, template_options
from mollm.errors import UsageError, did_you_mean
from mollm.system.parsing import is_unicode, parse_yaml, read_text, user_path

_DATA = ("forget", "retain", "eval_forget", "eval_retain")


OWN_SETTINGS = ("model", *_DATA, "out", "lora", "device")


_BYTES = 1 << 18
"""The most that a settings file may have."""
_RENAMED = {"divergence": "max_loss_rise", "warmup_ratio": "warmup_steps"}
_LONGEST = 255
"""Bytes of a file's name."""
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "options by name",
}


def read_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line says, over what its settings file says.

    Args:
        given: Arguments of the command line by name, `config`, `set` and `method_option` among
            them.

    Raises:
        UsageError: The file cannot be read, or a name in it or in `set` is not known.
    """
    given = dict(given)
    for name in _DATA:
        if str(given.get(name, "")).startswith(("{", "[")):
            given[name] = parse_yaml(given[name], f"the {name} data")
    for name, read in (("chat_template_kwargs", template_options), ("prompt_format", format_of)):
        if name in given:
            given[name] = read(given[name])
    settings = _read_file(given.pop("config")) if "config" in given else {}
    settings |= _named_values(given.pop("set", ()), "set")
    chosen = _named_values(given.pop("method_option", ()), "method-option")
    if chosen:
        known = settings.get("method_options") or {}
        settings["method_options"] = {**known, **chosen} if isinstance(known, dict) else chosen
    settings |= given
    types = _fields()
    for name, value in settings.items():
        if name in _RENAMED and name not in types:
            raise UsageError(f"{name} is now {_RENAMED[name]}, but got it with {value!r}.")
        if name not in types and name not in OWN_SETTINGS:
            raise UsageError(
                f"a setting must be one of {', '.join(OWN_SETTINGS)} or a field of MOLLMConfig, "
                f"but got {name!r}{did_you_mean(str(name), (*OWN_SETTINGS, *types))}"
            )
        settings[name] = (
            _own(name, value) if name in OWN_SETTINGS else _typed(name, value, types[name])
        )
    return settings


def _named_values(texts: Iterable[str], flag: str) -> dict[str, Any]:
    """The values of NAME=VALUE, by name."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{flag} must be NAME=VALUE, but got {text!r}.")
        found[name] = parse_yaml(value, f"the value of {name}")
    return found


def require(settings: Mapping[str, Any]) -> None:
    """Refuses settings that do not name a model and both sets.

    Raises:
        UsageError: One is missing.
    """
    for name in ("model", "forget", "retain"):
        if not settings.get(name):
            raise UsageError(
                f"{name} must be given, but it is not: add it to the settings file, or --{name}."
            )


def evaluated_sets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The data to evaluate on by role, as far as there is such."""
    return {
        role: settings[f"eval_{role}"]
        for role in ("forget", "retain")
        if f"eval_{role}" in settings
    }


def _own(name: str, value: Any) -> Any:
    """The value of a setting that is no field of MOLLMConfig."""
    if value is None or name == "lora":
        return value
    path = value.get("path") if isinstance(value, Mapping) else value
    if isinstance(path, str) and not is_unicode(path):
        raise UsageError(f"{name} must be a name in UTF-8, but got {path!r}: rename it.")
    if isinstance(path, str) and any(len(part.encode()) > _LONGEST for part in path.split("/")):
        raise UsageError(
            f"{name} must be a name that a file can have, but got one of {len(path)} characters: "
            f"{path[:40]}..."
        )
    if name in _DATA and isinstance(value, Mapping | list):
        return value
    if not isinstance(value, str):
        kind = "a path, a name or options by name" if name in _DATA else "a text"
        raise UsageError(f"{name} must be {kind}, but got {value!r}: put it in quotes.")
    return value


def _read_file(path: Path) -> dict[str, Any]:
    settings = parse_yaml(read_text(user_path(path), _BYTES), str(path))
    if not isinstance(settings, dict):
        raise UsageError(f"{path} must hold settings by name, but it does not.")
    return settings


def _fields() -> dict[str, Any]:
    """The names of a MOLLMConfig's fields, with their types."""
    from mollm.training.config import MOLLMConfig

    types = get_type_hints(MOLLMConfig)
    return {f.name: types[f.name] for f in fields(MOLLMConfig) if f.name != "output_dir"}


def _typed(name: str, value: Any, declared: Any) -> Any:
    """The value of a field as its declared type has it, as far as YAML reads it as another."""
    united = get_origin(declared) in (Union, UnionType)
    kinds = set(get_args(declared) if united else (declared,))
    kinds = {get_origin(kind) or kind for kind in kinds}
    optional, kinds = NoneType in kinds, kinds - {NoneType}
    if Any in kinds or type(value) in kinds or (value is None and optional):
        return value
    if isinstance(value, bool) and bool not in kinds:
        if value is False and optional:  # to YAML, no is false
            return None
        if value is False and str in kinds:
            return "no"
        raise UsageError(f"{name} must be {_described(kinds)}, but got {value!r}: quote a text.")
    try:  # to YAML, 1e-5 is a text, for want of a point
        if bool not in kinds and type(value) in (str, int, float):
            number = float(value)
            if float in kinds:
                return number
            if int in kinds and number.is_integer():
                return int(number)
    except ValueError:
        pass
    if str in kinds and not isinstance(value, Mapping | list):
        return str(value)
    raise UsageError(f"{name} must be {_described(kinds)}, but got {value!r}.")


def _described(kinds: Collection[type]) -> str:
    words = [word for kind, word in _KINDS.items() if kind in kinds]
    return " or ".join(words) or "of another kind"
