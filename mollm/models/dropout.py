"""Dropout is off while a model unlearns: a step compares two models, without noise."""

from __future__ import annotations

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
