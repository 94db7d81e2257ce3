"""The sizes of a model, from its configuration or by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mollm.errors import UsageError
from mollm.system.parsing import reason_of

if TYPE_CHECKING:
    from torch import nn


_FAMILY = {
    "num_layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "vocab": "vocab_size",
}


_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "max_position_embeddings": 8192,
}


NAMED_SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": _LLAMA_3
    | {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "intermediate_size": 14336,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": _LLAMA_3
    | {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "head_dim": 64,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": _LLAMA_3
    | {
        "num_hidden_layers": 28,
        "hidden_size": 3072,
        "num_attention_heads": 24,
        "head_dim": 128,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}
"""Options of a LlamaConfig."""


@dataclass(frozen=True)
class Shape:
    """What decides about the memory of a decoder."""

    label: str
    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    head_dim: int
    vocab: int
    tied: bool
    """Whether head and token embeddings are one matrix."""
    parameters: int
    """Of the whole model, a tied matrix once."""
    layer_parameters: int
    """Of one decoder layer."""
    layer_linear: int
    """Of the weights of its linear layers."""
    layer_sides: int
    """Σ (inputs + outputs) of its linear layers: what LoRA of rank 1 adds."""

    @property
    def embedding(self) -> int:
        """Parameters of the token embeddings, and of the head."""
        return self.vocab * self.hidden

    @property
    def query(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_dim


def shape_named(name: str) -> Shape:
    """One of NAMED_SHAPES.

    Raises:
        UsageError: There is none of that name.
    """
    from transformers import LlamaConfig

    if name not in NAMED_SHAPES:
        raise UsageError(f"preset must be one of {', '.join(NAMED_SHAPES)}, but got {name!r}.")
    return shape_of(LlamaConfig(**NAMED_SHAPES[name]), name)


def shape_of(config: Any, label: str) -> Shape:
    """Counts a model of this configuration, built without memory on the `meta` device.

    Raises:
        UsageError: It is not a decoder like Llama.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever the code of an architecture makes of odd sizes
        raise UsageError(
            f"the config of the model {label} must describe a causal language model, but none can "
            f"be built from it: {reason_of(error)}."
        ) from error
    try:
        sizes = {ours: int(getattr(config, theirs)) for ours, theirs in _FAMILY.items()}
        layers = list(model.base_model.layers)
        layers[0].mlp.gate_proj  # noqa: B018
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise UsageError(
            f"the model {label} must be a decoder with RMSNorm and a gated MLP, like Llama, for "
            f"its memory to be planned, but it is of type "
            f"{getattr(config, 'model_type', 'unknown')!r}."
        ) from error
    linear = [m.weight for m in layers[0].modules() if isinstance(m, torch.nn.Linear)]
    heads = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    return Shape(
        label=label,
        head_dim=getattr(config, "head_dim", None) or sizes["hidden"] // sizes["heads"],
        tied=heads[0] is heads[1],
        parameters=_count(model),
        layer_parameters=_count(layers[0]),
        layer_linear=sum(w.numel() for w in linear),
        layer_sides=sum(sum(w.shape) for w in linear),
        **sizes,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
