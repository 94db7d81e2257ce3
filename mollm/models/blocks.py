"""The blocks of a model: the modules that its hidden states pass one after the other.

They are found by what the model does with a few tokens, not by their names, and a second pass of
these tokens shows that gradients can be streamed through them, see `mollm.models.tape`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from mollm.errors import UsageError
from mollm.models.forward import hidden_states, in_evaluation_mode, outermost_lists
from mollm.models.tape import Tape
from mollm.system.parsing import reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 4


def find_blocks(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The blocks of a causal language model, first to last, for `MOLLMOptimizer.streamed`.

    Three passes of eight tokens, one of them with a backward to the first block's input.

    Args:
        model: A model of transformers whose body runs a list of modules one after the other.

    Returns:
        The list with the most parameters of those that run once each, in their order.

    Raises:
        UsageError: The model has no such list, modules in it share parameters, or they hand each
            other more than they return; what it computes is not finite; or an adapter trains,
            which streaming gives nothing.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16,
        ...                      num_hidden_layers=3, num_attention_heads=2)
        >>> [type(block).__name__ for block in find_blocks(LlamaForCausalLM(config))]
        ['LlamaDecoderLayer', 'LlamaDecoderLayer', 'LlamaDecoderLayer']
    """
    if _has_adapter(model):
        raise UsageError(
            "gradient_memory must be another one than 'streamed' with an adapter, whose gradients "
            "take next to no memory as they are: leave it out."
        )
    with in_evaluation_mode(model):
        lists = [found for found in outermost_lists(model) if len(found)]
        try:
            order = _order(model, lists)
        except Exception as error:  # whatever a model raises that wants other inputs
            _refuse(model, f"does not run on token ids alone ({reason_of(error, 200)})")
        candidates = [tuple(found) for found in lists if _runs_in_turn(found, order)]
        if not candidates:
            _refuse(model, "has no list of blocks that run once each and one after the other")
        blocks = max(candidates, key=_size)
        _refuse_shared(model, blocks)
        _refuse_side_paths(model, blocks)
    return blocks


def _has_adapter(model: nn.Module) -> bool:
    if hasattr(model, "peft_config"):
        return True
    if "peft" not in sys.modules:  # nor can a layer be of its classes
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def _name_of(model: nn.Module) -> str:
    return getattr(model, "name_or_path", "") or type(model).__name__


def _refuse(model: nn.Module, what: str) -> NoReturn:
    raise UsageError(
        f"gradient_memory must be another one than 'streamed' for the model {_name_of(model)}, "
        f"which {what}: "
        "choose as-produced, bfloat16 or host."
    )


def _size(modules: Sequence[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def _ids(model: PreTrainedModel) -> Tensor:
    vocabulary: int = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(2 * _TOKENS, device=model.device).reshape(2, _TOKENS)
    return ids % vocabulary


def _states(model: PreTrainedModel) -> Tensor:
    ids = _ids(model)
    return hidden_states(model, ids, torch.ones_like(ids))


@torch.no_grad()
def _order(model: PreTrainedModel, lists: list[nn.ModuleList]) -> list[int]:
    """The ids of the lists' modules, as they run."""
    order: list[int] = []
    handles = [
        module.register_forward_pre_hook(lambda module, _: order.append(id(module)))
        for found in lists
        for module in found
    ]
    try:
        _states(model)
    finally:
        for handle in handles:
            handle.remove()
    return order


def _runs_in_turn(found: nn.ModuleList, order: list[int]) -> bool:
    mine = [id(module) for module in found]
    return [one for one in order if one in set(mine)] == mine


def _refuse_shared(model: PreTrainedModel, blocks: tuple[nn.Module, ...]) -> None:
    own = [p for block in blocks for p in block.parameters()]
    inside = {id(module) for block in blocks for module in block.modules()}
    others = {
        p
        for module in model.modules()
        if id(module) not in inside
        for p in module.parameters(recurse=False)
    }
    if len(set(own)) < len(own) or not others.isdisjoint(own):
        _refuse(model, "has blocks that share parameters")


def _refuse_side_paths(model: PreTrainedModel, blocks: tuple[nn.Module, ...]) -> None:
    """Compares the gradient at the embedded tokens with and without a tape."""
    embedded: list[Tensor] = []

    def replace(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not embedded:
            embedded.append(output.detach().requires_grad_())
        return embedded[0]

    def loss() -> Tensor:
        hidden = _states(model)
        ramp = torch.linspace(-1, 1, hidden.numel(), device=hidden.device)
        return (hidden.float().flatten() * ramp).sum()

    handle = model.get_input_embeddings().register_forward_hook(replace)
    try:
        with torch.enable_grad():
            (plain,) = torch.autograd.grad(loss(), embedded)
            tape = Tape(blocks, embedded, 1)
            with tape.recording():
                tape.record(0, loss(), keep_graph=False)
            for _ in tape.sweep():
                pass
            streamed = next((rows[0][0] for _, rows in tape.ends()), None)
    except UsageError as error:
        _refuse(model, f"cannot be cut at its blocks ({reason_of(error, 200)})")
    finally:
        handle.remove()
    if not bool(plain.isfinite().all()):
        raise UsageError(
            f"the model {_name_of(model)} must compute finite numbers, but its hidden states or "
            f"their gradients are not finite for {2 * _TOKENS} plain tokens: mend its weights, or "
            "load it in a wider dtype."
        )
    tolerance = 1e-5 if plain.dtype in (torch.float32, torch.float64) else 1e-2
    largest = float(plain.double().abs().max())
    if (
        streamed is None
        or not float((plain - streamed).double().abs().max()) <= tolerance * largest
    ):
        _refuse(model, "has blocks that hand each other more than they return")
