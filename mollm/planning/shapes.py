"""The sizes of a model, from its configuration or by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from mollm.errors import UsageError
from mollm.system.parsing import reason_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mollm.planning.activations import Kept
    from mollm.planning.settings import PlanSettings


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
    "llama-3-70b": _LLAMA_3
    | {
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "intermediate_size": 28672,
        "tie_word_embeddings": False,
    },
    "llama-3.1-405b": _LLAMA_3
    | {
        "num_hidden_layers": 126,
        "hidden_size": 16384,
        "num_attention_heads": 128,
        "intermediate_size": 53248,
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
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
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
"""Options of a LlamaConfig, or of that of another model type."""


class Weight(NamedTuple):
    """A parameter of a model."""

    name: str
    size: int
    layer: int | None
    """The number of its decoder layer, if it is in one."""
    embedding: bool
    """Whether it is of the token embeddings or of the head."""


@dataclass(frozen=True)
class Shape:
    """What decides about the memory of a decoder."""

    label: str
    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    head_dim: int
    keys: int
    """Width of the keys of all heads, and of their values."""
    vocab: int
    tied: bool
    """Whether head and token embeddings are one matrix."""
    parameters: int
    """Of the whole model, a tied matrix once."""
    layers: int
    """Parameters of all decoder layers."""
    largest_layer: int
    """Of the largest of these."""
    linear: int
    """Of the weights of linear layers, without the head."""
    sides: int
    """Σ (inputs + outputs) of what LoRA adapts: the parameters of one of rank 1."""
    largest: int
    """Of the largest matrix of a layer."""
    tensors: tuple[Weight, ...]
    """Every parameter, a tied one once."""
    active: int
    """Of all layers' matrices, those that a token is multiplied with: of experts its own alone."""
    kept: Callable[[PlanSettings], Kept] | None = field(default=None, compare=False)
    """What its layers keep for backward, counted; None where the formula of `memory` holds."""

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
    from transformers import AutoConfig

    if name not in NAMED_SHAPES:
        raise UsageError(f"preset must be one of {', '.join(NAMED_SHAPES)}, but got {name!r}.")
    options = {"model_type": "llama"} | NAMED_SHAPES[name]
    return shape_of(AutoConfig.for_model(**options), name)


def shape_of(config: Any, label: str) -> Shape:
    """Counts a model of this configuration, built without memory on the `meta` device.

    Raises:
        UsageError: It is no causal language model.
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
        return _shape(model, config, label)
    except UsageError:
        raise
    except Exception as error:  # a config that answers for a layer alone, a head of its own kind
        raise UsageError(
            f"the memory of the model {label} cannot be planned: {reason_of(error, 200)}."
        ) from error


def _shape(model: Any, config: Any, label: str) -> Shape:
    from mollm.planning.activations import adapter_sides, counter

    inner, head = config.get_text_config(), model.get_output_embeddings()
    embeddings = model.get_input_embeddings()
    if head is None or embeddings is None or getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"the model {label} must be a causal language model for its memory to be planned, but "
            f"it is of type {getattr(config, 'model_type', 'unknown')!r}."
        )
    layers = _layers(model)
    linear = _linear(model, head)
    widths = [max(w.shape) for w in linear]
    hidden = head.weight.shape[1]
    formula = _is_like_llama(layers) and isinstance(inner.intermediate_size, int)
    # Some configurations answer for a layer alone; only the formula asks.
    heads = inner.num_attention_heads if formula else 1
    head_dim = getattr(inner, "head_dim", None) if formula else None
    counts = {
        "parameters": _count(model),
        "layers": sum(map(_count, layers)),
        "largest_layer": max(_count(layer) for layer in layers),
        "linear": sum(w.numel() for w in linear),
        "largest": max((p.numel() for layer in layers for p in layer.parameters()), default=0),
        "tensors": tuple(_weights(model, layers, (embeddings, head))),
        "active": sum(_active(layer, inner) for layer in layers),
        "tied": head.weight is embeddings.weight,
        "vocab": head.weight.shape[0],
    }
    width = head_dim or hidden // heads
    groups = getattr(inner, "num_key_value_heads", None) if formula else None
    return Shape(
        **counts,
        keys=(groups or heads) * width,
        label=label,
        num_layers=len(layers),
        hidden=hidden,
        intermediate=inner.intermediate_size if formula else max(widths, default=hidden),
        heads=heads,
        head_dim=width,
        sides=sum(sum(w.shape) for w in linear) if formula else adapter_sides(model),
        kept=None if formula else counter(config, label),
    )


def _layers(model: nn.Module) -> list[nn.Module]:
    """The modules of the list that holds most of the model."""
    from torch import nn

    lists: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=_count).children()) if lists else [model]


def _weights(
    model: nn.Module, layers: Iterable[nn.Module], ends: Iterable[nn.Module]
) -> Iterator[Weight]:
    inside = {p: n for n, layer in enumerate(layers) for p in layer.parameters()}
    outside = {p for module in ends for p in module.parameters()}
    for name, p in model.named_parameters():
        yield Weight(name, p.numel(), inside.get(p), p in outside)


def _linear(model: nn.Module, head: nn.Module) -> list[Tensor]:
    """The matrices of linear layers without the head."""
    from torch import nn

    layers = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    return [layer.weight for layer in layers if layer is not head]


_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts")
"""What configurations call the number of experts of a layer."""


def _active(layer: nn.Module, config: Any) -> int:
    """Parameters of a layer's matrices that a token is multiplied with."""
    experts = next((n for n in (getattr(config, name, None) for name in _EXPERTS) if n), 0)
    chosen = getattr(config, "num_experts_per_tok", None) or experts
    total = 0
    for module in layer.modules():
        for p in module.parameters(recurse=False):
            if p.ndim == 3 and p.shape[0] == experts:
                total += p.numel() * chosen // experts
            elif p.ndim >= 2:
                total += p.numel()
    return total


def _is_like_llama(layers: Iterable[nn.Module]) -> bool:
    """Whether all are alike, with RMSNorm and one gated MLP."""
    counts = {_count(layer) for layer in layers}
    return len(counts) == 1 and all(
        hasattr(getattr(layer, "mlp", None), "gate_proj") and hasattr(layer, "input_layernorm")
        for layer in layers
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
