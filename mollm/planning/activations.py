"""What a model keeps for backward, counted in a forward pass of tensors without memory."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mollm.errors import UsageError
from mollm.models.forward import states_at_head
from mollm.system.parsing import reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mollm.planning.settings import PlanSettings

_RANK = 8
"""Of the adapter while it is counted; its own part in what is kept is small."""
_FEW = 8
"""Tokens over which a model that goes from token to token is followed, and twice and three times
as many."""


@dataclass(frozen=True)
class Kept:
    """Bytes between forward and backward."""

    fixed: int
    """Whatever the batch: weights that autocast casts."""
    row: int
    """For each row of the batch."""


def counter(config: Any, label: str) -> Callable[[PlanSettings], Kept]:
    """A function from settings to what the layers keep; each answer is counted once.

    Args:
        config: Of the model.
        label: The model, for errors.
    """

    @cache
    def counted(dtype: str, casts: bool, lora: bool, length: int) -> Kept:
        try:
            one, two = (
                _bytes_of_length(config, dtype, casts, lora, rows, length) for rows in (1, 2)
            )
        except Exception as error:  # whatever the code of an architecture makes of such tensors
            raise UsageError(
                f"the memory of the model {label} cannot be planned, for a forward pass without "
                f"weights fails: {reason_of(error, 200)}."
            ) from error
        return Kept(fixed=2 * one - two, row=two - one)

    return lambda settings: counted(
        settings.dtype,
        settings.casts,
        bool(settings.lora_rank),
        settings.sequence_length,
    )


def adapter_sides(model: PreTrainedModel) -> int:
    """Gives a model without weights an adapter, and counts the parameters of one of rank 1.

    peft also adapts experts whose matrices are one tensor.
    """
    from peft import LoraConfig

    from mollm.models.adapters import adapted

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the adapter's names leave out
        adapted(model, LoraConfig(r=_RANK, target_modules="all-linear"))
    trained: int = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained // _RANK


def _bytes_of_length(
    config: Any, dtype: str, casts: bool, lora: bool, rows: int, length: int
) -> int:
    """What is kept of rows of that length.

    A model that goes from token to token is followed over a few of them: a pass of more takes
    minutes, and what it keeps is a polynomial of their number.
    """
    if length > 2 * _FEW:
        counted = [_counted(config, dtype, casts, lora, rows, n * _FEW) for n in (1, 2)]
        if counted[1][1] > 1.5 * counted[0][1]:
            few, more = (size for size, _ in counted)
            most, _ = _counted(config, dtype, casts, lora, rows, 3 * _FEW)
            n = length / _FEW - 1
            return int(few + n * (more - few) + n * (n - 1) / 2 * (most - 2 * more + few))
    return _counted(config, dtype, casts, lora, rows, length)[0]


class _WithoutGroups(TorchFunctionMode):
    """Products of experts with their tokens as one product: they keep the same; counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls += 1
        if "grouped_mm" in getattr(function, "__name__", str(function)):
            return torch.matmul(args[0], args[1][0])
        return function(*args, **(kwargs or {}))


def _counted(
    config: Any, dtype: str, casts: bool, lora: bool, rows: int, length: int
) -> tuple[int, int]:
    """Bytes that are kept, and the number of calls of Torch that it took."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes(), tensor  # which keeps the number its own
        return tensor

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), trust_remote_code=False
        )
    if lora:
        adapter_sides(model)
    model.eval()
    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.ExitStack() as stack:
        _leave_meta(model)
        ids = torch.zeros(rows, length, dtype=torch.long)
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16, enabled=casts))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        calls = stack.enter_context(_WithoutGroups())
        states_at_head(model, ids, torch.ones_like(ids))
        for weight in (*model.parameters(), *model.buffers()):
            kept.pop(weight.untyped_storage()._cdata, None)
    return sum(size for size, _ in kept.values()), calls.calls


def _leave_meta(model: nn.Module) -> None:
    """Gives a model tensors that seem to be on the CPU, where autocast and attention are those."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        every: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for slots in every:
            for name, old in slots.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    trains = old.requires_grad
                    made[id(old)] = nn.Parameter(new, trains) if slots is every[0] else new
                slots[name] = made[id(old)]  # tied ones stay tied
