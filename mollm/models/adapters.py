"""The model of a run: with an adapter, with checkpointed activations, and whole again."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from mollm.distributed import processes
from mollm.errors import UsageError
from mollm.models import forward, four_bits
from mollm.system.parsing import reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BEGINNINGS = (True, False, "gaussian", "orthogonal")


def adapted(model: PreTrainedModel, config: Any) -> Any:
    """The model with a new adapter, in the wrapper of `peft`.

    Raises:
        UsageError: It is not LoRA, or would change a head in a way that the losses cannot follow.
    """
    from peft import LoraConfig, get_peft_model

    if not isinstance(config, LoraConfig) or config.use_dora:
        raise UsageError(
            f"peft_config must be a LoraConfig without DoRA, but got {type(config).__name__}."
        )
    if config.init_lora_weights not in _BEGINNINGS:
        raise UsageError(
            f"init_lora_weights must be one of {', '.join(map(str, _BEGINNINGS))}, for others "
            "change the weights that the original is made of, or need data, but got "
            f"{config.init_lora_weights!r}."
        )
    config = copy.deepcopy(config)
    if model.device.type == "meta":
        config.init_lora_weights = True  # what it begins with comes from the first process
    _let_gradients_through_four_bits(model)
    tied = model.config.tie_word_embeddings
    try:
        wrapped = get_peft_model(model, config)
    except (TypeError, ValueError, KeyError, AttributeError, re.error) as error:
        raise UsageError(
            f"peft_config must be one that peft can apply to the model: {reason_of(error)}."
        ) from error
    layer = forward.head(model)
    has_delta = hasattr(layer, "get_delta_weight")
    if has_delta and config.lora_dropout > 0:
        raise UsageError(
            f"lora_dropout must be 0 where the head is adapted, but got {config.lora_dropout}: "
            "leave the head out of target_modules, or the dropout."
        )
    if tied and (has_delta or hasattr(layer, "modules_to_save")):
        raise UsageError(
            "an adapter must leave the head alone where it shares its matrix with the embeddings, "
            f"but got target_modules {config.target_modules} and modules_to_save "
            f"{config.modules_to_save}: take it out."
        )
    return wrapped


def _let_gradients_through_four_bits(model: PreTrainedModel) -> None:
    """On some processors bitsandbytes packs matrices for inference, where gradients end silently.

    It does so in the first forward pass in evaluation mode, and for good.
    """
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
        layer.state_dict()  # unpacks


def checkpoint_activations(model: PreTrainedModel, options: Mapping[str, Any] | None) -> None:
    """Lets the model keep the inputs of its layers alone, and compute the rest again."""
    # Releases before 5.20 know it by the older name alone.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    # Reentrant checkpoints pass no gradient on to adapters behind an input that asks for none.
    model.enable_input_require_grads()


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
        holder = get_peft_model(whole, config, low_cpu_mem_usage=True)
    whole.load_state_dict(tensors, strict=False, assign=True)  # strict: a tied head has no tensor
    whole.tie_weights()
    return whole if holder is None else holder.merge_and_unload()
