"""Checkpoints without pickle: tensors as safetensors, all else as JSON.

A checkpoint is a folder that appears when it is whole, see `mollm.system.folders.complete`, and
goes all at once; so the last one that has a name is good, whenever a run was killed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mollm.distributed.processes import gathered, placed
from mollm.errors import UsageError
from mollm.models.adapters import adapter_tensors, named, not_finite, trained_tensors
from mollm.models.forward import own_tensors
from mollm.system import folders
from mollm.system.folders import public_name
from mollm.system.parsing import read_text
from mollm.training.serialization import load_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "checkpoint-"
_FORMAT = 3
_ABOUT = "mollm.json"
_SETTINGS = "settings"
_OF_EVERY_RUN = ("format", "version", _SETTINGS)
_ADDED = ("weights that train",)
"""What older checkpoints of this format do not tell."""
_WEIGHTS = "model.safetensors"
_ADAPTER = "adapter_model.safetensors"
_SAMPLED = 1024
_OF_AN_ADAPTER = ("lora_", "modules_to_save", "token_adapter.trainable_tokens")


# ---- random numbers


def random_state() -> dict[str, Any]:
    """Where the generators of Python, NumPy and Torch stand, on all devices."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),  # noqa: NPY002
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts the generators where they stood."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


# ---- weights


def whole_weights(model: PreTrainedModel, wrapped: Any | None) -> dict[str, Tensor]:
    """What `write_weights` writes; of parts, on the first process. All processes must call it."""
    own = own_tensors(model) if wrapped is None else trained_tensors(model, wrapped)
    weights: dict[str, Tensor] = gathered({name: t.detach() for name, t in own.items()})
    return weights


def write_weights(
    model: PreTrainedModel, wrapped: Any | None, weights: Mapping[str, Tensor], folder: Path | None
) -> None:
    """Writes `whole_weights` on the first process; the others have no folder."""
    from safetensors.torch import save_file

    if folder is None:
        return
    if wrapped is not None:
        config = copy.deepcopy(wrapped.peft_config[wrapped.active_adapter])
        config.inference_mode = True
        config.base_model_name_or_path = public_name(model.name_or_path)
        config.save_pretrained(str(folder))
        adapter = adapter_tensors(wrapped, weights)
        tensors = {name: t.contiguous() for name, t in adapter.items()}
        save_file(tensors, folder / _ADAPTER, metadata={"format": "pt"})
        return
    # By the module's own names, and tied weights once: read back, each finds its place.
    tensors = {name: t.contiguous() for name, t in weights.items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


@torch.no_grad()
def load_weights(model: PreTrainedModel, wrapped: Any | None, folder: Path) -> None:
    """Reads what `write_weights` wrote into the same model, or into this process's parts of it.

    Raises:
        UsageError: The weights are those of another model, or damaged.
    """
    if wrapped is not None:
        from peft import set_peft_model_state_dict

        mine = adapter_tensors(wrapped, trained_tensors(model, wrapped))
        saved = load_file(folder / _ADAPTER)
        _refuse_others(folder, mine, saved)
        tensors = {n: placed(t, mine[n]) for n, t in saved.items()}
        set_peft_model_state_dict(wrapped, tensors, adapter_name=wrapped.active_adapter)
        return
    own, saved = own_tensors(model), load_file(folder / _WEIGHTS)
    _refuse_others(folder, own, saved)
    for name, tensor in own.items():
        tensor.copy_(placed(saved[name], tensor))


def _refuse_others(folder: Path, own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Refuses weights that are not, one for one, those of the model."""
    unlike = [
        name
        for name in sorted({*own, *saved})
        if name not in own or name not in saved or own[name].shape != saved[name].shape
    ]
    if unlike:
        what = "is missing" if unlike[0] not in saved else "does not fit"
        raise UsageError(
            f"{folder} must be a checkpoint of this model and adapter, but {unlike[0]} {what}: "
            "name the model it was made with, resume from the checkpoint before, or train without "
            "--resume in another folder."
        )
    broken = not_finite(saved)
    if broken:
        raise UsageError(
            f"{folder} must hold finite weights, but {named(broken)} are not: remove it, and "
            "resume from the checkpoint before."
        )


def fingerprint(model: PreTrainedModel, *, with_adapter: bool = False) -> str:
    """A hash of a model's shape, and of 1024 values of each of its weights.

    Args:
        model: The original.
        with_adapter: Whether an adapter counts. A new one does not, which begins at random.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(own_tensors(model).items()):
        if not with_adapter and any(part in name for part in _OF_AN_ADAPTER):
            continue
        for wrapper in (".token_adapter", ".base_layer", ".original_module"):
            name = name.replace(wrapper, "")
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED]
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()


# ---- the folders of a run


def describe(
    folder: Path, about: Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> None:
    """Writes what a checkpoint is of.

    Args:
        folder: The checkpoint.
        about: What a run that resumes from it must agree with, see `check`.
        settings: What such a run may change.
    """
    told = {"format": _FORMAT, **about, _SETTINGS: dict(settings or {})}
    (folder / _ABOUT).write_text(json.dumps(told, indent=2), encoding="utf-8")


def check(folder: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Refuses a checkpoint that is not of this run.

    Args:
        folder: The checkpoint.
        about: What it must be of, by the words with which to say so.

    Returns:
        The settings that it was made with and that may be others now.

    Raises:
        UsageError: It is of another format, or one of the values differs.
    """
    try:
        found = json.loads(read_text(folder / _ABOUT))
        settings = found.get(_SETTINGS, {})
        about = json.loads(json.dumps(dict(about)))  # tuples are lists there
        if not isinstance(settings, dict):
            raise TypeError("settings are a dict")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{folder} must be a checkpoint of mollm, but it is not.") from error
    if found.get("format") != _FORMAT:
        raise UsageError(
            f"{folder} must be a checkpoint of format {_FORMAT}, but it is of format "
            f"{found.get('format')}: resume with the version of mollm that wrote it "
            f"({found.get('version', 'unknown')})."
        )
    for name in dict.fromkeys((*about, *found)):
        if name in _OF_EVERY_RUN or (name in _ADDED and name not in found):
            continue
        now, was = about.get(name), found.get(name)
        if now != was:
            raise UsageError(
                f"cannot resume from {folder}: {name} was {_short(was)} and is now {_short(now)}: "
                "restore it, or train without --resume in another folder."
            )
    return settings


def _short(value: Any) -> str:
    text = "not there" if value is None else str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""

    def step(path: Path) -> str:
        return path.name.removeprefix(PREFIX)

    found = [p for p in folder.glob(f"{PREFIX}*") if step(p).isdecimal() and p.is_dir()]
    return sorted(found, key=lambda path: int(step(path)))


def keep_last(folder: Path, count: int | None, best: str | None) -> None:
    """Removes all but the last `count` checkpoints and the best one; None keeps all."""
    if not count:
        return
    for path in checkpoints(folder)[:-count]:
        if best is None or path.name != Path(best).name:
            folders.remove(path)
