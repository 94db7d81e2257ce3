"""Checkpoints without pickle: tensors as safetensors, all else as JSON.

A checkpoint is a folder that appears when it is whole, see `mollm.system.folders.complete`, and
goes all at once; so the last one that has a name is good, whenever a run was killed.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mollm.distributed.processes import gathered, placed
from mollm.errors import UsageError
from mollm.models.forward import own_tensors
from mollm.system import folders
from mollm.training.serialization import load_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "checkpoint-"
_FORMAT = 2
_ABOUT = "mollm.json"
_WEIGHTS = "model.safetensors"
_ADAPTER = "adapter_model.safetensors"
_SAMPLED = 1024


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


def save_weights(model: PreTrainedModel, wrapped: Any | None, folder: Path | None) -> None:
    """Writes what trains for `from_pretrained`: the whole model, or its adapter.

    Args:
        model: The model, without the wrapper of `peft`.
        wrapped: The same in its wrapper, if it has one.
        folder: Where to, on the first process; where processes hold parts of the model the others
            must call it too, with None.
    """
    from safetensors.torch import save_file

    own = own_tensors(model)
    if wrapped is not None:
        own = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    weights = gathered({name: t.detach() for name, t in own.items()})
    if folder is None:
        return
    if wrapped is not None:
        wrapped.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
        return
    # By the module's own names, and tied weights once: read back, each finds its place.
    tensors = {name: t.contiguous() for name, t in weights.items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


@torch.no_grad()
def load_weights(model: PreTrainedModel, wrapped: Any | None, folder: Path) -> None:
    """Reads what `save_weights` wrote into the same model, or into this process's parts of it.

    Raises:
        UsageError: The weights are those of another model, or damaged.
    """
    if wrapped is not None:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        mine = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        adapter = {
            name: placed(tensor, mine[name]) if name in mine else tensor
            for name, tensor in load_file(folder / _ADAPTER).items()
        }
        result: Any = set_peft_model_state_dict(wrapped, adapter)
        if result.unexpected_keys:
            raise _other_model(folder)
        return
    own, saved = own_tensors(model), load_file(folder / _WEIGHTS)
    if {name: t.shape for name, t in own.items()} != {n: t.shape for n, t in saved.items()}:
        raise _other_model(folder)
    for name, tensor in own.items():
        tensor.copy_(placed(saved[name], tensor))


def _other_model(folder: Path) -> UsageError:
    return UsageError(
        f"{folder} must be a checkpoint of this model and adapter, but it is of another: name the "
        "model it was made with, or train without --resume in another folder."
    )


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of a model's shape, and of 1024 values of each of its weights.

    Read from the original: adapters, which begin at random, do not count.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(own_tensors(model).items()):
        if "lora_" in name or "modules_to_save" in name:
            continue
        name = name.replace(".base_layer", "").replace(".original_module", "")
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED]
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()


# ---- the folders of a run


def describe(folder: Path, about: Mapping[str, Any]) -> None:
    """Writes what a checkpoint is of; `about` is compared by `check`."""
    text = json.dumps({"format": _FORMAT, **about}, indent=2)
    (folder / _ABOUT).write_text(text, encoding="utf-8")


def check(folder: Path, about: Mapping[str, Any]) -> None:
    """Refuses a checkpoint that is not of this run.

    Args:
        folder: The checkpoint.
        about: What it must be of, by the words with which to say so.

    Raises:
        UsageError: It is of another format, or one of the values differs.
    """
    try:
        found = dict(json.loads((folder / _ABOUT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{folder} must be a checkpoint of mollm, but it is not.") from error
    if found.get("format") != _FORMAT:
        raise UsageError(
            f"{folder} must be a checkpoint of format {_FORMAT}, but it is of format "
            f"{found.get('format')}: go on with the version of mollm that wrote it "
            f"({found.get('version', 'unknown')})."
        )
    for name, value in about.items():
        if name != "version" and found.get(name) != value:
            raise UsageError(
                f"{folder} must be a checkpoint of the same {name}, but that is {_short(value)} "
                f"now and was {_short(found.get(name))}: change it back, or train without "
                "--resume in another folder."
            )


def _short(value: Any) -> str:
    text = str(value)
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
