"""The model of a run: with an adapter, with checkpointed activations, and whole again."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mollm.distributed import processes
from mollm.errors import UsageError, did_you_mean
from mollm.models import forward, four_bits
from mollm.system.finite import all_finite
from mollm.system.parsing import (
    check_file,
    is_file,
    parse_json,
    read_text,
    reason_of,
    user_path,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
"""Of target_modules: every linear layer but the head."""
_BEGINNINGS = (True, False, "gaussian", "orthogonal")
_TASKS = (None, "CAUSAL_LM")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _all_are(kind: type) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        listing = isinstance(value, list | tuple | set)
        return listing and all(isinstance(item, kind) for item in value)

    return holds


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and 0 < value < float("inf")


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST_RANK


def _by_name(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict)
        and all(isinstance(name, str) and holds(item) for name, item in value.items())
    )


_LARGEST_RANK = 1 << 20
_RULES: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (("r",), f"a whole number from 1 to {_LARGEST_RANK:,}", _is_rank),
    (("lora_alpha",), "a positive number", _is_positive),
    (("lora_dropout",), "a number from 0 to below 1", lambda v: _is_number(v) and 0 <= v < 1),
    (
        ("target_modules", "exclude_modules", "layers_pattern"),
        "a pattern or a list of names",
        lambda v: isinstance(v, str) or _all_are(str)(v),
    ),
    (("modules_to_save", "target_parameters"), "a list of names", _all_are(str)),
    (
        ("layers_to_transform",),
        "a whole number or a list of them",
        lambda v: isinstance(v, int) or _all_are(int)(v),
    ),
    (
        ("trainable_token_indices",),
        "a list of token ids, or such lists by name",
        lambda v: _all_are(int)(v) or _by_name(_all_are(int))(v),
    ),
    (("rank_pattern",), "ranks by name", _by_name(_is_rank)),
    (("alpha_pattern",), "positive numbers by name", _by_name(_is_positive)),
    (("bias",), "none, all or lora_only", lambda v: v in ("none", "all", "lora_only")),
    (("fan_in_fan_out", "use_rslora"), "true or false", lambda v: isinstance(v, bool)),
)
"""Fields of a LoraConfig, of which peft checks few: what each must be, in words and as a test."""

FIXED_FIELDS = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "fan_in_fan_out",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "modules_to_save",
        "r",
        "rank_pattern",
        "target_modules",
        "target_parameters",
        "trainable_token_indices",
        "use_rslora",
    }
)
"""Fields of a LoraConfig that a resumed run must have as they were."""
FREE_FIELDS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "megatron_core",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    }
)
"""Fields that have no part in what an adapter computes; any other must be left at its default."""


def is_first_factor(name: str) -> bool:
    """Whether a parameter of that name is A of an adapter's product s B A.

    Example:
        >>> is_first_factor("model.layers.0.mlp.up_proj.lora_A.default.weight")
        True
    """
    return "lora_A" in name.split(".") or "lora_embedding_A" in name.split(".")


# ---- an adapter of one's own


def adapted(model: PreTrainedModel, config: Any) -> Any:
    """The model with a new adapter, in the wrapper of `peft`.

    Raises:
        UsageError: It is not LoRA, names parts that the model lacks, or would change embeddings or
            head in a way that the losses and an export cannot follow.
    """
    from peft import get_peft_model

    check_adapter(config)
    _refuse_unknown_names(model, config)
    config = copy.deepcopy(config)
    _leave_out_what_cannot_be_adapted(model, config)
    if model.device.type == "meta":
        config.init_lora_weights = True  # what it begins with comes from the first process
    _let_gradients_through_four_bits(model)
    try:
        _refuse_what_no_adapter_reaches(model, config)
        wrapped = get_peft_model(model, config)
    except UsageError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, re.error) as error:
        reason = reason_of(error)
        raise UsageError(
            f"the adapter does not suit {type(model).__name__}: {reason}: change peft_config."
        ) from error
    _refuse_heads_out_of_reach(model, config)
    return wrapped


def given(model: Any) -> Any:
    """A `peft.PeftModel` that the user hands over; its adapter is what trains.

    Raises:
        UsageError: The adapter is not LoRA, not the only one, or was loaded for inference.
    """
    if len(model.peft_config) != 1:
        raise UsageError(
            f"a PeftModel must have one adapter, but got {', '.join(model.peft_config)}: delete "
            "the others, or merge them."
        )
    (config,) = model.peft_config.values()
    check_adapter(config, of_given_model=True)
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise UsageError(
            "the adapter of a PeftModel must not be merged, for then nothing in it trains: call "
            "unmerge_adapter() first."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError(
            "the adapter of a PeftModel must be loaded with is_trainable=True, but nothing in it "
            "trains."
        )
    _let_gradients_through_four_bits(model)
    _refuse_heads_out_of_reach(model.get_base_model(), config)
    return model


def is_adapter(name: str) -> bool:
    """Whether there is a folder of that name with an adapter and no whole model."""
    folder = user_path(name)
    return is_file(folder / _CONFIG) and not is_file(folder / "config.json")


def load_adapter(model: PreTrainedModel, name: str) -> Any:
    """The model in the wrapper of `peft`, with the adapter of a folder; not to be trained.

    Raises:
        UsageError: The adapter cannot be read, is pickled, was made for another model, or its
            weights are not, one for one, those that it says it has, or not finite.
    """
    from peft import PeftModel
    from safetensors.torch import load_file

    folder = user_path(name)
    if not is_file(folder / _WEIGHTS):
        raise UsageError(
            f"the adapter {name} must have its weights in {_WEIGHTS}, but has none: save it again "
            "with `save_pretrained` of peft."
        )
    parse_json(read_text(folder / _CONFIG), str(folder / _CONFIG))
    try:
        check_file(folder / _WEIGHTS)
        saved = load_file(folder / _WEIGHTS)
        with warnings.catch_warnings():  # peft warns of weights that are refused below
            warnings.simplefilter("ignore")
            wrapped = PeftModel.from_pretrained(model, str(folder), local_files_only=True).eval()
            # Once more, for from_pretrained keeps to itself which weights found no place.
            found = wrapped.load_adapter(str(folder), wrapped.active_adapter, local_files_only=True)
    except UsageError:
        raise
    except Exception as error:  # readers of configurations and weights raise what they like
        raise UsageError(
            f"the adapter {name} cannot be put on {model.name_or_path}: {reason_of(error)}."
        ) from error
    _refuse_other_weights(wrapped, found, name)
    # Of the file: in the model VB-LoRA has infinities by design.
    broken = [n for n, t in saved.items() if t.is_complex()] or not_finite(saved)
    if broken:
        raise UsageError(
            f"the adapter {name} must have finite weights, but {named(broken)} are not: take an "
            "earlier one."
        )
    return wrapped


def _refuse_other_weights(wrapped: Any, found: Any, name: str) -> None:
    """peft fills what an adapter's file lacks with its beginning, and passes over what it has no
    place for."""
    config = wrapped.peft_config[wrapped.active_adapter]
    if getattr(config, "alora_invocation_tokens", None):
        raise UsageError(
            f"the adapter {name} must be one that acts on every token, but its "
            "alora_invocation_tokens let it act after some words alone."
        )
    missing, unknown = _without_place(wrapped, found)
    if missing or unknown:
        what = "is missing" if missing else "is one too many"
        raise UsageError(
            f"the adapter {name} must have the weights that its {_CONFIG} asks for, but "
            f"{(missing or unknown)[0]} {what}: was it cut short, or made for another model?"
        )


def _without_place(wrapped: Any, found: Any) -> tuple[list[str], list[str]]:
    """What peft missed in a file, and what it found too much."""
    if wrapped.peft_config[wrapped.active_adapter].is_prompt_learning:
        return [], []  # it puts prompts in their place itself, and raises where one is missing
    tensors = dict(wrapped.named_parameters(remove_duplicate=False))
    missing = set(found.missing_keys)
    loaded = {id(t) for n, t in tensors.items() if n not in missing}
    # What layers share, such as the vectors of VB-LoRA, is in the file by one of its names.
    missing = {n for n in missing if id(tensors.get(n)) not in loaded}
    return sorted(missing), sorted(found.unexpected_keys)


def check_adapter(config: Any, *, of_given_model: bool = False) -> None:
    """Says what can be said about an adapter before there is a model.

    Raises:
        UsageError: It is not LoRA, or a variant of it that training cannot follow.
    """
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise UsageError(f"peft_config must be a LoraConfig, but got {type(config).__name__}.")
    if not of_given_model and config.init_lora_weights not in _BEGINNINGS:
        raise UsageError(
            f"init_lora_weights must be one of {', '.join(map(str, _BEGINNINGS))}, for others "
            "change the weights that the original is made of, or need data, but got "
            f"{config.init_lora_weights!r}."
        )
    for f in fields(config):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        value = getattr(config, f.name)
        if f.name not in FIXED_FIELDS | FREE_FIELDS and value and value != default:
            raise UsageError(
                f"{f.name} is not supported in a LoraConfig, but got {value!r}: leave it out."
            )
    if config.task_type not in _TASKS:
        raise UsageError(f"task_type must be CAUSAL_LM, but got {config.task_type}.")
    if of_given_model:
        return
    if config.inference_mode:
        raise UsageError("inference_mode must be False for an adapter that trains, but got True.")
    for names, rule, holds in _RULES:
        for name in names:
            value = getattr(config, name)
            if value is not None and not holds(value):
                raise UsageError(f"{name} of an adapter must be {rule}, but got {value!r}.")


def _refuse_unknown_names(model: PreTrainedModel, config: Any) -> None:
    """peft passes over names that nothing has, as long as another one fits."""
    names = [name for name, _ in model.named_modules() if name]
    parts = {part for name in names for part in name.split(".") if not part.isdecimal()}

    def refuse(field: str, name: str) -> None:
        raise UsageError(
            f"{field} must name modules of the model, but {type(model).__name__} has none called "
            f"{name!r}{did_you_mean(name.rpartition('.')[2], parts)}"
        )

    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        asked = getattr(config, field) or ()
        if isinstance(asked, str):
            if asked.lower() != ALL_LINEAR and not _fits_any(asked, names):
                refuse(field, asked)
            continue
        for name in sorted(asked):
            if not any(found == name or found.endswith(f".{name}") for found in names):
                refuse(field, name)
    for field in _PATTERNS:
        for name in getattr(config, field) or ():
            if not _fits_any(rf"(.*\.)?({name})", names):
                refuse(field, name)
    layers = config.layers_to_transform
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for layer in [layers] if isinstance(layers, int) else layers or ():
        if count is not None and not 0 <= layer < count:
            raise UsageError(
                f"layers_to_transform must be numbers of the {count} layers, from 0, but got "
                f"{layer}."
            )


def _can_be_adapted(modules: Mapping[str, nn.Module], name: str) -> bool:
    layer = modules[name]
    return not isinstance(layer, nn.Linear) or (
        not _read_past_adapters(modules, name) and _returns_product(layer)
    )


def _leave_out_what_cannot_be_adapted(model: PreTrainedModel, config: Any) -> None:
    """Of "all-linear": routers that return more than a product, and what Mamba takes the matrix of,
    past an adapter."""
    if not isinstance(config.target_modules, str) or config.target_modules.lower() != ALL_LINEAR:
        return
    modules = dict(model.named_modules())
    found = [name for name in modules if not _can_be_adapted(modules, name)]
    excluded = config.exclude_modules or ()
    if found and not isinstance(excluded, str):
        config.exclude_modules = {*excluded, *found}


def _refuse_what_no_adapter_reaches(model: PreTrainedModel, config: Any) -> None:
    """An adapter that nothing calls would never train, and an export would add it all the same."""
    from peft.tuners.tuners_utils import check_target_module_exists

    asked, modules = config.target_modules, dict(model.named_modules())
    if not asked or (isinstance(asked, str) and asked.lower() == ALL_LINEAR):
        return
    for name in modules:
        if _read_past_adapters(modules, name) and check_target_module_exists(config, name):
            raise UsageError(
                f"target_modules must leave out {name.rpartition('.')[2]!r}, whose matrix "
                f"{type(model).__name__} reads past an adapter, but got {asked!r}: name others, or "
                f"{ALL_LINEAR}."
            )


def _read_past_adapters(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Of Mamba: its kernels are given the matrix of one layer, and its own code that of another."""
    parent, _, own = name.rpartition(".")
    return own in ("out_proj", "dt_proj") and hasattr(modules[parent], "A_log")


@torch.no_grad()
def _returns_product(layer: nn.Linear) -> bool:
    if type(layer).forward is nn.Linear.forward or four_bits.in_four_bits(layer.weight):
        return True
    try:
        output = layer(layer.weight.new_zeros(1, layer.in_features))
    except Exception:  # it takes something else
        return False
    return isinstance(output, Tensor) and output.shape == (1, layer.out_features)


def _fits_any(pattern: str, names: Iterable[str]) -> bool:
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise UsageError(
            f"an adapter must name modules by valid patterns, but got {pattern!r}: {error}."
        ) from error


def _refuse_heads_out_of_reach(model: PreTrainedModel, config: Any) -> None:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    has_delta = hasattr(head, "get_delta_weight")
    if has_delta and config.lora_dropout > 0:
        raise UsageError(
            f"lora_dropout must be 0 where the head is adapted, but got {config.lora_dropout}: "
            "leave the head out of target_modules, or the dropout."
        )
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    changed = has_delta or any(
        hasattr(layer, name)
        for layer in (head, embeddings)
        for name in ("modules_to_save", "lora_embedding_A")
    )
    if tied and changed:
        raise UsageError(
            "an adapter must leave the head alone where it shares its matrix with the embeddings, "
            f"and the embeddings too, but got target_modules {config.target_modules} and "
            f"modules_to_save {config.modules_to_save}: take it out."
        )


def adapter_settings(wrapped: Any) -> dict[str, Any]:
    """The fields that a resumed run must have as they were, as plain values for JSON."""
    (config,) = wrapped.peft_config.values()
    return {name: _plain(getattr(config, name, None)) for name in sorted(FIXED_FIELDS)}


def adapter_told(wrapped: Any) -> dict[str, Any]:
    """The fields that differ from those of a LoraConfig by itself, for a model card."""
    from peft import LoraConfig

    usual = LoraConfig()
    told = {"adapter": "LoRA"}
    for name, value in adapter_settings(wrapped).items():
        if name in ("r", "lora_alpha") or value != _plain(getattr(usual, name, None)):
            told[f"adapter {name}"] = value
    return told


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return json.loads(json.dumps(value, default=str))


# ---- the model as it was


class Original:
    """The model that an adapted one was when this was made, for a reference.

    Of a new adapter, that is the model with the adapter switched off. What trains outside of it and
    so stays on, biases with `bias` "all" or "lora_only", is kept: a copy of those tensors and no
    others. Of a model that was given with its adapter, what trains is kept, and the adapter stays
    on.

    Args:
        wrapped: A `peft.PeftModel` that has not been trained since.
        with_adapter: Whether its adapter is part of the original.
    """

    def __init__(self, wrapped: Any, *, with_adapter: bool = False) -> None:
        self.wrapped = wrapped
        self.with_adapter = with_adapter
        inside = set() if with_adapter else {id(p) for p in _adapter_parameters(wrapped)}
        self._kept: list[tuple[nn.Parameter, Tensor]] = [
            (p, p.detach().clone())
            for p in wrapped.parameters()
            if p.requires_grad and id(p) not in inside
        ]

    @property
    def keeps_copies(self) -> bool:
        """Whether tensors of the original are kept."""
        return bool(self._kept)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the model computes what the original does."""
        trained = [p.detach().clone() for p, _ in self._kept]
        asked = [(p, p.requires_grad) for p in self.wrapped.parameters()]
        off = contextlib.nullcontext() if self.with_adapter else self.wrapped.disable_adapter()
        with off:
            # FSDP2 learns in its first forward, which may be this one, what is to train.
            for p, trains in asked:
                p.requires_grad_(trains)
            try:
                self._put(kept for _, kept in self._kept)
                yield
            finally:
                self._put(trained)

    def _put(self, values: Iterable[Tensor]) -> None:
        for (p, _), value in zip(self._kept, values, strict=True):
            p.data.copy_(value)  # of `data`, so that a graph that leads to p stays valid

    def tensor(self, tensor: Tensor) -> Tensor:
        """What a tensor that was read inside `restored` held there, also outside of it."""
        for p, kept in self._kept:
            if tensor.data_ptr() == p.data_ptr() and tensor.shape == p.shape:
                return kept
        return tensor.detach()


def _adapter_parameters(wrapped: Any) -> Iterator[nn.Parameter]:
    """What is of no account while the adapter is switched off."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for module in wrapped.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            for name in module.adapter_layer_names:
                with contextlib.suppress(AttributeError):
                    part: Any = module
                    for step in name.split("."):
                        part = getattr(part, step)
                    yield from part.parameters()


def adapter_tensors(wrapped: Any, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What trains of an adapted model, by the names that peft gives it in a file.

    Args:
        wrapped: The model in its wrapper.
        trained: Its parameters that train, by name.
    """
    from peft import get_peft_model_state_dict

    tensors: dict[str, Tensor] = get_peft_model_state_dict(
        wrapped,
        state_dict=dict(trained),
        adapter_name=wrapped.active_adapter,
        save_embedding_layers=False,
    )
    inside = {id(p) for p in _adapter_parameters(wrapped)}
    outside = {n for n, p in wrapped.named_parameters() if n in trained and id(p) not in inside}
    # It looks for biases where they were before layers were wrapped.
    return tensors | {name: trained[name] for name in sorted(outside)}


# ---- what else a model is made to be


def _let_gradients_through_four_bits(model: nn.Module) -> None:
    """On some processors bitsandbytes packs matrices for inference, where gradients end silently.

    It does so in the first forward pass in evaluation mode, and for good.
    """
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
        layer.state_dict()  # unpacks


def uncompiled(model: Any) -> tuple[Any, bool]:
    """The model without what `torch.compile` wrapped around it and its parts, and whether it did.

    A step runs other methods than the one that was compiled, and names of weights in files must not
    begin with `_orig_mod`.
    """
    from torch._dynamo.eval_frame import OptimizedModule

    found = False
    while isinstance(model, OptimizedModule):
        model, found = model._orig_mod, True
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, OptimizedModule):
                setattr(module, name, child._orig_mod)
                found = True
        forward = vars(module).get("forward")
        own = getattr(forward, "_torchdynamo_orig_callable", None)
        if own is not None:  # as after `layer.forward = torch.compile(layer.forward)`
            module.forward, found = own, True
    return model, found


def checkpoint_activations(model: PreTrainedModel, options: Mapping[str, Any] | None) -> None:
    """Lets the model keep the inputs of its layers alone, and compute the rest again.

    Raises:
        UsageError: Its class cannot.
    """
    if not model.supports_gradient_checkpointing:
        raise UsageError(
            f"gradient_checkpointing must be left out for a {type(model).__name__}, which does not "
            "support it, but got it: make smaller batches, or shorter rows."
        )
    options = {"use_reentrant": False} | dict(options or {})
    # Releases before 5.20 know it by the older name alone.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if options["use_reentrant"]:
        # They pass no gradient on to adapters behind an input that asks for none.
        model.enable_input_require_grads()
    else:  # which transformers enabled, and models that add to their embeddings in place forbid
        model.disable_input_require_grads()


def merged(model: PreTrainedModel, wrapped: Any | None, *, parts: bool) -> PreTrainedModel | None:
    """The model whole, its adapter merged into it, on the first process; the others get None.

    To merge takes the memory of a second model, of one in 4 bits that of its full width on the CPU;
    the first stays as it is. All processes must call it.

    Args:
        model: The model, without the wrapper of `peft`.
        wrapped: The same in its wrapper, if it has one.
        parts: Whether the processes hold parts of it, see `mollm.distributed.processes.shard`.
    """
    own = forward.own_tensors(model)
    tensors = processes.gathered(own) if parts else own
    if processes.rank() > 0:
        return None
    narrow = any(four_bits.in_four_bits(t) for t in own.values())
    if not parts and not narrow:
        return model if wrapped is None else copy.deepcopy(wrapped).merge_and_unload()
    config = copy.deepcopy(model.config)
    if narrow:  # merged into 4 bits, most of the adapter would be rounded away
        tensors = {name: t.cpu() for name, t in own.items()} | four_bits.dequantized(model)
        vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        whole = type(model)(config)
    whole.generation_config = model.generation_config
    holder: Any = None
    if wrapped is not None:
        from peft import get_peft_model

        config = copy.deepcopy(wrapped.peft_config[wrapped.active_adapter])
        config.inference_mode = False
        name = wrapped.active_adapter
        holder = get_peft_model(whole, config, adapter_name=name, low_cpu_mem_usage=True)
    whole.load_state_dict(tensors, strict=False, assign=True)  # strict: a tied head has no tensor
    whole.tie_weights()
    return whole if holder is None else holder.merge_and_unload()


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold NaN or infinity; of parts, in this process's part."""
    from mollm.distributed.sharding import local

    return [
        name
        for name, t in tensors.items()
        if t.is_floating_point() and not t.is_meta and not all_finite(local(t))
    ]


def trained_tensors(model: PreTrainedModel, wrapped: Any | None) -> dict[str, Tensor]:
    """What a run changes, by name: the parameters that train."""
    owner = model if wrapped is None else wrapped
    return {name: p for name, p in owner.named_parameters() if p.requires_grad}


def named(names: Collection[str]) -> str:
    """A few names as a text: the first, and how many more."""
    first, *others = names
    return first if not others else f"{first} and {len(others)} more"
