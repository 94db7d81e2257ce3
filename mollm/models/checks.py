"""What the files of a model say, checked before anything is built from them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mollm.distributed.sharding import local
from mollm.errors import UsageError
from mollm.system.finite import all_finite
from mollm.system.parsing import (
    check_file,
    is_file,
    is_folder,
    parse_json,
    read_text,
    reason_of,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_JSON_BYTES = 1 << 26
_TOKENIZER_BYTES = 1 << 27
_INDEX = "model.safetensors.index.json"
_TEMPLATES = "additional_chat_templates"
_TEXTS = (".json", ".jinja", ".txt", ".model")
_FLOATS = re.compile("B?F[0-9].*")  # F32, BF16, F8_E4M3 and so on, not I64, BOOL or C64

_LIMITS: tuple[tuple[str, int], ...] = (
    # The largest known values are 128 layers, 512 experts, 10 million positions, 262144 tokens.
    (r"(num|n)_(\w+_)?layers?|\w+_layers|n_blocks?", 1_000),
    (r"(num|n)_(\w+_)?(heads?|experts?|groups?)|\w+_heads", 10_000),
    (r"(\w+_)?vocab_size(_\w+)?", 1 << 24),
    (r"(max|n)_(\w+_)?(positions?|ctx)(_\w+)?|max_(seq|sequence)\w*", 1 << 24),
    (r"(\w+_)?(size|dim|rank|width|embd|inner|model|ff)", 1 << 20),
)
"""The largest number of what has such a name; the first that matches counts."""
_NUMBERS = [(re.compile(pattern), most) for pattern, most in _LIMITS]
_POSITIVE = re.compile(
    r"(num_hidden|n|num)_layers?|hidden_size|n_embd|d_model|vocab_size|intermediate_size"
    r"|num_attention_heads|n_heads?|max_position_embeddings|n_positions"
)
_LONGEST = 100_000
_DEEPEST = 20


def check_config(said: Mapping[str, Any], label: str) -> None:
    """Refuses a config from which nothing sensible can be built, before anything is.

    Args:
        said: What the config says, as in its file.
        label: The model, for the error.

    Raises:
        UsageError: A size is no number, not positive or beyond that of any model there is.
    """
    for name, value in _values(said, "config", 0, label):
        if isinstance(value, bool) or value is None:
            continue
        if isinstance(value, float) and value != value:
            raise UsageError(
                f"the config of the model {label} must hold numbers, but {name} is {value}."
            )
        most = next((most for match, most in _NUMBERS if match.fullmatch(name)), None)
        if most is None or isinstance(value, float):
            continue
        if _POSITIVE.fullmatch(name) and isinstance(value, str):
            raise UsageError(
                f"the config of the model {label} must hold a number as {name}, but got {value!r}."
            )
        least = 1 if _POSITIVE.fullmatch(name) else -1
        if isinstance(value, int) and not least <= value <= most:
            raise UsageError(
                f"the config of the model {label} must have a {name} from {least} to {most:,}, "
                f"but got {_number(value)}: is the file damaged?"
            )


def _number(value: int) -> str:
    return (
        f"{value}"
        if abs(value) < 10**20
        else f"about {value:.3g}"
        if abs(value) < 10**300
        else "a number of more than 300 digits"
    )


def _values(said: Any, name: str, depth: int, label: str) -> Iterator[tuple[str, Any]]:
    """The name and value of everything in a config, however deep it stands."""
    if not isinstance(said, list | dict):
        yield name, said
        return
    if len(said) > _LONGEST or depth > _DEEPEST:
        raise UsageError(
            f"the config of the model {label} must hold short lists, but its {name} has "
            f"{len(said)} entries, {depth} deep: is the file damaged?"
        )
    pairs = said.items() if isinstance(said, dict) else ((name, item) for item in said)
    for key, value in pairs:
        yield from _values(value, str(key), depth + 1, label)


def check_files(folder: Path) -> None:
    """Refuses a folder in which a file of a model is something else, or of an absurd size.

    Raises:
        UsageError: There is such a file; it is named.
    """
    try:
        places = [folder, folder / _TEMPLATES] if is_folder(folder / _TEMPLATES) else [folder]
        found = sorted(path for place in places for path in place.iterdir())
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}.") from error
    for path in found:
        if path.suffix == ".safetensors":
            check_file(path)
        elif path.name == "tokenizer.json" or path.suffix == ".model":
            check_file(path, _TOKENIZER_BYTES)
        elif path.suffix in _TEXTS:
            check_file(path, _JSON_BYTES)


def check_json_files(folder: Path) -> None:
    """Refuses a folder whose JSON files of a model cannot be read or hold something else.

    Raises:
        UsageError: A file is malformed; it is named.
    """
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        _INDEX,
    ):
        path = folder / name
        if not is_file(path):
            continue
        text = read_text(path)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = parse_json(text, str(path))  # says what is wrong
        if not isinstance(value, dict):
            raise UsageError(
                f"{path} must hold one JSON object, but it holds {type(value).__name__}."
            )
        if "\\ud" in text.lower() and name != "tokenizer.json":
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise UsageError(
                    f"{path} must hold valid Unicode, but it holds half of a surrogate pair."
                ) from error


def stored_elements(folder: Path, gguf_file: str | None, *, packed: bool = False) -> int | None:
    """The number of elements of all weights in the files of a model, read from their headers.

    Args:
        folder: Where they are.
        gguf_file: The name of a GGUF file there, if the weights are in one.
        packed: Whether an element may hold several weights.

    Raises:
        UsageError: A file is damaged or cut short, the index names a file elsewhere, or weights
            are no floating-point numbers though nothing is packed.
    """
    if gguf_file is not None:
        return _gguf_elements(folder / gguf_file)
    _check_index(folder)
    files = sorted(folder.glob("*.safetensors"))
    return sum(_safetensors_elements(path, packed) for path in files) if files else None


def _check_index(folder: Path) -> None:
    if not is_file(folder / _INDEX):
        return
    index = parse_json(read_text(folder / _INDEX, _JSON_BYTES), str(folder / _INDEX))
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise UsageError(f"{folder / _INDEX} must hold a weight_map, but it holds none.")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or not is_file(folder / name):
            raise UsageError(
                f"{folder / _INDEX} must name weight files beside it, but it names {name!r}."
            )


def _safetensors_elements(path: Path, packed: bool) -> int:
    from safetensors import safe_open

    try:
        total = 0
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                elements, stored = 1, file.get_slice(name)
                if not (packed or _FLOATS.fullmatch(stored.get_dtype())) and _is_weight(name):
                    raise UsageError(
                        f"the weight file {path} must hold floating-point numbers, but {name} has "
                        f"the dtype {stored.get_dtype()}, and its config names no quantization."
                    )
                for size in stored.get_shape():
                    elements *= size
                total += elements
        return total
    except UsageError:
        raise
    except Exception as error:  # SafetensorError, OSError or what the header makes of it
        raise UsageError(
            f"the weight file {path} cannot be read, it is damaged or cut short: "
            f"{reason_of(error)}."
        ) from error


def _is_weight(name: str) -> bool:
    return name.endswith((".weight", ".bias"))  # and no buffer, such as one of positions


def _gguf_elements(path: Path) -> int:
    from gguf import GGUFReader

    try:
        return sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    except Exception as error:  # whatever numpy makes of bytes that are not there
        raise UsageError(
            f"the weight file {path} cannot be read, it is damaged or cut short: "
            f"{reason_of(error)}."
        ) from error


def check_size(parameters: int, stored: int | None, label: str, *, packed: bool) -> None:
    """Refuses a config of a model much larger than its weight files, before memory is taken.

    Args:
        parameters: Of the model that the config describes.
        stored: Elements in the weight files; None where they are not known.
        label: The model, for the error.
        packed: Whether an element may hold several weights.

    Raises:
        UsageError: The files cannot hold the model.
    """
    times, spare = (64 if packed else 2), 10_000_000
    if stored is not None and parameters > times * stored + spare:
        raise UsageError(
            f"the config of the model {label} must describe its weights, but it describes "
            f"{parameters:,} parameters, and the weight files hold {stored:,}: is one of them "
            "damaged?"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, label: str) -> None:
    """Refuses a tokenizer whose vocabulary goes beyond the token embeddings.

    Tokens that were added to it, such as one for padding, may: many models have such, unused.

    Raises:
        UsageError: A token has no embedding; it is named.
    """
    added = set(tokenizer.get_added_vocab())
    beyond = {
        token: i for token, i in tokenizer.get_vocab().items() if i >= rows and token not in added
    }
    if beyond:
        token = min(beyond, key=lambda name: beyond[name])
        raise UsageError(
            f"the tokenizer of the model {label} must be made for it, but {len(beyond):,} of its "
            f"tokens, such as {token!r} with the id {beyond[token]}, lie beyond the {rows:,} token "
            "embeddings: take the tokenizer that the model came with."
        )


@torch.no_grad()
def check_finite(model: nn.Module, label: str) -> None:
    """Refuses weights that are not finite.

    Raises:
        UsageError: There is one; it is named.
    """
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.is_meta:
            continue
        if not all_finite(local(weight)):
            count = int((~local(weight).float().isfinite()).sum())
            raise UsageError(
                f"the model {label} must have finite weights, but {count:,} of {name} are NaN or "
                "infinite: its files are damaged, or the run that wrote them diverged."
            )
