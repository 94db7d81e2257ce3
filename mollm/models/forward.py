"""From token ids to the final hidden states of answer tokens, and the head that follows them."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mollm.data.chat import IGNORE_INDEX, Batch
from mollm.errors import UsageError
from mollm.models.four_bits import in_four_bits
from mollm.system.precision import autocast, compute_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def head(model: PreTrainedModel) -> nn.Linear:
    """The layer that turns final hidden states into logits."""
    layer: nn.Linear = model.get_output_embeddings()
    return layer


def head_weights(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """The matrix [V, H] and the bias [V] of the head, as they are in use at the moment.

    Of a head that `peft` adapts by LoRA, the matrix is W + s B A, with a graph to A and B; of one
    it trains as a whole (`modules_to_save`), the copy that trains; of one of which rows train
    (`trainable_token_indices`), W with those rows. Inside `disable_adapter()` all are the original
    W.
    """
    layer: Any = head(model)
    if hasattr(layer, "token_adapter"):  # rows of it train, or of the embeddings that it shares
        tokens = layer.token_adapter
        active = [] if tokens.disable_adapters else tokens.active_adapters
        return tokens.get_merged_weights(active), getattr(tokens.base_layer, "bias", None)
    if not hasattr(layer, "get_delta_weight"):
        return layer.weight, layer.bias
    base = layer.base_layer
    weight: Tensor = base.weight
    if not layer.disable_adapters:
        for name in layer.active_adapters:
            weight = weight + layer.get_delta_weight(name).to(weight.dtype)
    return weight, base.bias


def freeze_embeddings(model: PreTrainedModel) -> None:
    """Takes the token embeddings and the head, often one matrix, out of training.

    Through the softmax every token of the vocabulary gets some gradient from every batch, mostly
    noise, and AdamW turns that into steps as large as any other. The facts sit in the layers.
    """
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.requires_grad_(False)


def answer_hidden_states(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """The final hidden states from which the answer tokens are predicted, and those tokens.

    Only these states meet the head, so that no logits of prompts and padding are ever computed.

    Args:
        model: A causal language model.
        batch: Padded examples on the model's device.

    Returns:
        States [N, H] in the dtype of the head's weight and targets [N].
    """
    with autocast(model.device):
        hidden = hidden_states(model, batch.input_ids, batch.attention_mask, batch.padded_left)
    targets = batch.labels[:, 1:]
    rows = targets != IGNORE_INDEX
    return hidden[:, :-1][rows].to(head(model).weight.dtype), targets[rows]


def layers(model: nn.Module) -> nn.ModuleList:
    """The list of the model's blocks: of its lists of modules the one with the most parameters.

    Raises:
        UsageError: It has no list of modules.
    """
    found = list(outermost_lists(model))
    if not found:
        raise UsageError(
            f"a model must have a list of blocks for a loss on what one of them returns, but "
            f"{type(model).__name__} has none: choose another method."
        )
    return max(found, key=lambda some: sum(p.numel() for p in some.parameters()))


def outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """The lists of modules in a module that lie in no other list."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from outermost_lists(child)


def check_layer(model: nn.Module, layer: int) -> None:
    """Says that a model has no block of that number.

    Raises:
        UsageError: It has none.
    """
    last = len(layers(model)) - 1
    if not 0 <= layer <= last:
        raise UsageError(
            f"layer must be from 0 to {last} for this model, but got {layer}: give one in its "
            "first third in method_options."
        )


@contextlib.contextmanager
def kept_output(model: nn.Module, layer: int | None) -> Iterator[list[Tensor]]:
    """What the block `layer` returns in a forward pass inside, [B, T, H]; nothing for None."""
    seen: list[Tensor] = []
    if layer is None:
        yield seen
        return

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        if not seen:  # not where checkpointing computes the block again
            seen.append(output[0] if isinstance(output, tuple) else output)

    handle = layers(model)[layer].register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def at_answers(states: Tensor, batch: Batch) -> Tensor:
    """[N, H]: of what a block returned, the places from which answer tokens are predicted."""
    labels, padded_left = batch.labels, batch.padded_left
    if padded_left is None:
        padded_left = not bool(batch.attention_mask[:, 0].all())
    if padded_left:  # which `hidden_states` has moved
        labels = labels.gather(1, _to_the_left(batch.attention_mask))
    return states[:, :-1][labels[:, 1:] != IGNORE_INDEX]


@contextlib.contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout inside; afterwards every submodule trains or not as it did before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` that does not train, for the reference of the KL.

    Where `autocast` computes matrix products in bf16, the copy holds their weights in bf16: the
    same products from half the memory, bit for bit.

    Raises:
        UsageError: A part of the model has a forward of its own that the copy would share.
    """
    copied = copy.deepcopy(model).requires_grad_(False)
    _refuse_shared_forward(model, copied)
    # A model without weights stands for one on the CPU, see `mollm.distributed.processes.shard`.
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    dtype = compute_dtype(device).dtype
    if dtype != torch.float32:
        for module in linears_before_head(copied):
            if not in_four_bits(module.weight):
                module.weight.data = module.weight.data.to(dtype)
    return copied


def _refuse_shared_forward(model: nn.Module, copied: nn.Module) -> None:
    """Python copies methods with their object, but of functions not even what they close over: the
    copy would run the layers that train."""
    for (place, own), its in zip(model.named_modules(), copied.modules(), strict=True):
        forward = vars(own).get("forward")
        if forward is None or vars(its).get("forward") is not forward:
            continue
        held = ("__closure__", "__defaults__", "__kwdefaults__")
        if any(getattr(forward, name, None) for name in held):
            raise UsageError(
                "a model must be one that can be copied for the reference model, but the forward "
                f"of {place or type(model).__name__} was replaced by a function, which its copy "
                "would share: replace it by a types.MethodType, or set reference to cache."
            )


def linears_before_head(model: PreTrainedModel) -> list[nn.Linear]:
    """The linear layers of a model but for those of its head."""
    after = set(head(model).modules())
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m not in after]


def hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    padded_left: bool | None = None,
) -> Tensor:
    """The final hidden states [B, T, H] of a batch, padded on either side: what its head is given.

    The whole model runs, with a head that computes nothing: some models transform what their
    layers return before the head sees it, and of some the layers are no module of their own.

    Padding on the left is moved to the right on the way. No token of a causal model sees what
    follows it, but several kinds count padding before it as tokens, whatever the mask says.
    Where it is not known whether there is any, the mask is read, for which a GPU is waited for.
    """
    if padded_left is None:
        padded_left = not bool(attention_mask[:, 0].all())
    if not padded_left:
        return states_at_head(model, input_ids, attention_mask)
    rows = _to_the_left(attention_mask)
    hidden = states_at_head(model, input_ids.gather(1, rows), attention_mask.gather(1, rows))
    return hidden.gather(1, rows.argsort(1)[:, :, None].expand_as(hidden))


def states_at_head(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What the head is given of a batch that has padding on the right or none."""
    options = {"use_cache": False} if _takes(model, "use_cache") else {}
    layer, seen = head(model), list[Tensor]()

    def take(states: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(states)
        return states.new_zeros(*states.shape[:-1], 1)

    with _forward_replaced(layer, take):
        model(input_ids=input_ids, attention_mask=attention_mask, **options)
    if len(seen) != 1:
        raise RuntimeError(f"the head of {type(model).__name__} ran {len(seen)} times")
    return seen[0]


def _to_the_left(attention_mask: Tensor) -> Tensor:
    """[B, T]: for each place the one that comes to it, when padding before a row goes behind it."""
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    start = attention_mask.argmax(1, keepdim=True)
    return (places + start) % attention_mask.shape[1]


def _takes(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@contextlib.contextmanager
def _forward_replaced(layer: Any, forward: Callable[..., Tensor]) -> Iterator[None]:
    own = vars(layer)
    if own.setdefault("_mollm_replaced", forward) is not forward:  # in one step, for threads
        raise RuntimeError(
            "the hidden states of a model can be taken by one call at a time, but another one is "
            "under way, in this thread or another: wait for it."
        )
    before = own.get("forward")
    own["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before
        del own["_mollm_replaced"]


def own_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and what else a checkpoint of the model holds, tied ones once."""
    persistent = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in persistent}
    return {**dict(model.named_parameters()), **buffers}
