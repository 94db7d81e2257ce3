"""Trees of tensors and plain values as safetensors and JSON, never as pickle."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from mollm.errors import UsageError
from mollm.system.parsing import check_file, read_text

_DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,  # deep nesting too
    SafetensorError,
    TypeError,
    ValueError,
)


def save_tree(tree: Any, folder: Path, name: str) -> None:
    """Writes nested dicts, lists and tuples of tensors and plain values.

    Args:
        tree: Keys of dicts may be texts or whole numbers; values None, bool, int, float, str,
            tensors, NumPy arrays and Torch dtypes, which come back as they were.
        folder: Where `name`.json and `name`.safetensors are written.
        name: Of the files.

    Raises:
        TypeError: Something else is in the tree.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    plain = _encode(tree, tensors)
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(plain), encoding="utf-8")


def load_tree(folder: Path, name: str) -> Any:
    """What `save_tree` wrote, on the CPU.

    Raises:
        UsageError: A file is missing or damaged.
    """
    try:
        plain = json.loads(read_text(folder / f"{name}.json", None))
        return _decode(plain, _tensors_in(folder / f"{name}.safetensors"))
    except _DAMAGE as error:
        raise _damaged(folder, error) from error


def tensors_of(tree: Any) -> dict[str, Tensor]:
    """The tensors of a tree, by where they are in it."""
    if isinstance(tree, Tensor):
        return {"": tree}
    items: Any = ()
    if isinstance(tree, Mapping):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    return {f"{at}.{name}": t for at, part in items for name, t in tensors_of(part).items()}


def load_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of a checkpoint, on the CPU.

    Raises:
        UsageError: It is missing or damaged.
    """
    try:
        return _tensors_in(path)
    except _DAMAGE as error:
        raise _damaged(path.parent, error) from error


def _tensors_in(path: Path) -> dict[str, Tensor]:
    from safetensors import torch as files

    check_file(path)
    tensors: dict[str, Tensor] = files.load_file(path)
    return tensors


@contextlib.contextmanager
def corrupt_checkpoint_errors(folder: Path) -> Iterator[None]:
    """What goes wrong inside while a checkpoint is read becomes a UsageError that names it."""
    try:
        yield
    except UsageError as error:
        if str(folder) in str(error):
            raise
        raise UsageError(f"{folder} cannot be resumed from: {error}") from error
    except _DAMAGE as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> UsageError:
    told = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    reason = " ".join(told.split())[:300].rstrip(".") or type(error).__name__
    return UsageError(
        f"{folder} must be a whole checkpoint, but it is damaged: {reason}: remove it, and go on "
        "from the one before."
    )


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        key = str(len(tensors))
        tensor = torch.as_tensor(value).detach()
        tensors[key] = tensor.cpu().clone(memory_format=torch.contiguous_format)
        return {kind: key}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, list):
        return [_encode(each, tensors) for each in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(each, tensors) for each in value]}
    if isinstance(value, Mapping):
        if all(isinstance(key, str | int) for key in value):
            return {"dict": [[key, _encode(each, tensors)] for key, each in value.items()]}
        raise TypeError(f"keys must be texts or whole numbers, but got {list(value)}.")
    raise TypeError(f"a checkpoint must hold tensors and plain values, but got {type(value)}.")


def _decode(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(plain, list):
        return [_decode(each, tensors) for each in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, value),) = plain.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "array":
        return tensors[value].numpy()
    if kind == "dtype":
        dtype = getattr(torch, value, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{value} is no dtype")
        return dtype
    if kind == "tuple":
        return tuple(_decode(each, tensors) for each in value)
    return {key: _decode(each, tensors) for key, each in value}
