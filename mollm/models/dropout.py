"""What a model does in one mode only, and must not while it unlearns: dropout and the like."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

_LORA_DROPOUT = "lora_dropout"


def without_dropout(model: nn.Module, *, training: bool) -> None:
    """Puts a model into evaluation mode for good, whatever mode its caller left it in.

    Whatever a model does in training mode only is off then, by whatever name: dropout of states
    and of attention, dropped layers, noise in a router. Two things stay on where it trains: layers
    whose activations are checkpointed still are, and `lora_dropout`, which the user asked for, acts
    on the input of an adapter.

    Args:
        model: The model, or what holds it.
        training: Whether a backward pass will follow.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.eval()
    if not training:
        return
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            checkpoint: Any = module._gradient_checkpointing_func
            if not isinstance(checkpoint, _InEvaluationMode):
                module._gradient_checkpointing_func = _InEvaluationMode(module, checkpoint)
            module.training = True  # asked for by transformers, which else would not checkpoint
        elif _LORA_DROPOUT in name.split("."):
            module.training = True


def without_rescaling(model: nn.Module) -> None:
    """Keeps the weights of RWKV as they are, which in evaluation mode divides them in place.

    What trained in that mode would be the divided weights, and so would what is written. Outputs
    stay the same, for the divisors undo each other; so does the configuration that is written.
    """
    for module in model.modules():
        scaled: Any = module
        if not hasattr(scaled, "layers_are_rescaled"):
            continue
        if scaled.layers_are_rescaled:
            before, scaled.training = scaled.training, True
            scaled._rescale_layers()
            scaled.training = before
        scaled.config = copy.copy(scaled.config)
        scaled.config.rescale_every = 0


class _InEvaluationMode:
    """Checkpoints a layer's activations, with the layer in evaluation mode when it computes."""

    def __init__(self, layer: nn.Module, checkpoint: Callable[..., Any]) -> None:
        self.layer = layer
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        def quietly(*inputs: Any, **more: Any) -> Any:  # again in backward
            before, self.layer.training = self.layer.training, False
            try:
                return function(*inputs, **more)
            finally:
                self.layer.training = before

        return self.checkpoint(quietly, *args, **options)
