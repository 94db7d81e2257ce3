"""Settings of a run from a YAML file and from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from mollm.errors import UsageError
from mollm.system.parsing import parse_yaml, read_text

if TYPE_CHECKING:
    pass


_DATA = ("forget", "retain", "eval_forget", "eval_retain")


_TEXTS = ("model", "out", "device")


_OWN = ("model", *_DATA, "out", "lora", "device")


_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}


def read_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line says, over what its settings file says.

    Args:
        given: Arguments of the command line by name, `config` and `set` among them.

    Raises:
        UsageError: The file cannot be read, or a name in it or in `set` is not known.
    """
    given = dict(given)
    settings = _read_file(given.pop("config")) if "config" in given else {}
    for text in given.pop("set", ()):
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"set must be NAME=VALUE, but got {text!r}.")
        settings[name] = parse_yaml(value, f"the value of {name}")
    settings |= given
    types = _fields()
    for name, value in settings.items():
        if name not in types and name not in _OWN:
            raise UsageError(
                f"a setting must be one of {', '.join(_OWN)} or a field of MOLLMConfig, but got "
                f"{name!r}."
            )
        if name in _TEXTS and not isinstance(value, str):
            raise UsageError(f"{name} must be a text, but got {value!r}: quote it.")
        settings[name] = _typed(name, value, types.get(name))
    return settings


def _read_file(path: Path) -> dict[str, Any]:
    settings = parse_yaml(read_text(path), str(path))
    if not isinstance(settings, dict):
        raise UsageError(f"{path} must hold settings by name, but it does not.")
    return settings


def _fields() -> dict[str, Any]:
    """The names of a MOLLMConfig's fields, with their types."""
    from mollm.training.config import MOLLMConfig

    types = get_type_hints(MOLLMConfig)
    return {f.name: types[f.name] for f in fields(MOLLMConfig) if f.name != "output_dir"}


def _typed(name: str, value: Any, declared: Any) -> Any:
    """The value of a field that is to be a bool, an int or a float; any other as it is."""
    united = get_origin(declared) in (Union, UnionType)
    kinds = set(get_args(declared) if united else (declared,))
    if type(value) in kinds or (value is None and NoneType in kinds):
        return value
    kind = next(iter(kinds - {NoneType}))
    if len(kinds - {NoneType}) > 1 or kind not in _KINDS:
        return value
    try:  # to YAML, 1e-5 is a text, for want of a point
        if kind is not bool and type(value) in (str, int, float):
            number = float(value)
            if kind is float or number.is_integer():
                return kind(number)
    except ValueError:
        pass
    raise UsageError(f"{name} must be {_KINDS[kind]}, but got {value!r}.")
