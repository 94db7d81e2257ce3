"""What a model keeps for backward, counted in a forward pass of tensors without memory."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

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
    scan: int = 0
    """Of a model that goes from token to token: the largest tensor that backward takes a slice's
    gradient into at each of them, for each row of the batch."""


def counter(config: Any, label: str) -> Callable[[PlanSettings], Kept]:
    """A function from settings to what the layers keep; each answer is counted once.

    Args:
        config: Of the model.
        label: The model, for errors.
    """

    @cache
    def counted(dtype: str, casts: bool, lora: bool, length: int) -> Kept:
        try:
            one, two = (_bytes_of_rows(config, dtype, casts, lora, rows, length) for rows in (1, 2))
            scan = _bytes_of_scan(config, dtype, casts, lora, length)
        except Exception as error:  # whatever the code of an architecture makes of such tensors
            raise UsageError(
                f"the memory of the model {label} cannot be planned, for a forward pass without "
                f"weights fails: {reason_of(error, 200)}."
            ) from error
        return Kept(fixed=2 * one - two, row=two - one, scan=scan)

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


def _bytes_of_rows(config: Any, dtype: str, casts: bool, lora: bool, rows: int, length: int) -> int:
    """What is kept of rows of that length, over all layers.

    Of each kind of layer one is followed, and then one more: so many layers are as many times what
    the second one adds. All of them are followed where the model does not run with fewer.
    """
    kinds = _kinds_of_layers(config)
    first = [kind[0] for kind in kinds]
    if sum(map(len, kinds)) > len(kinds) + 1:
        with contextlib.suppress(Exception):  # whatever the code of an architecture makes of it
            one = _bytes_of_length(config, dtype, casts, lora, rows, length, first)
            total = one
            for kind in kinds:
                if len(kind) > 1:
                    some = sorted([*first, kind[1]])
                    two = _bytes_of_length(config, dtype, casts, lora, rows, length, some)
                    total += (len(kind) - 1) * (two - one)
            return total
    return _bytes_of_length(config, dtype, casts, lora, rows, length, None)


def _bytes_of_length(
    config: Any,
    dtype: str,
    casts: bool,
    lora: bool,
    rows: int,
    length: int,
    layers: Sequence[int] | None,
) -> int:
    """What these layers, or all, keep of rows of that length.

    A model that goes from token to token is followed over a few of them: a pass of more takes
    minutes, and what it keeps is a polynomial of their number.
    """

    def counted(tokens: int) -> _Counted:
        return _counted(config, dtype, casts, lora, rows, tokens, layers)

    if length > 2 * _FEW:
        few, more = counted(_FEW), counted(2 * _FEW)
        if _goes_from_token_to_token(few, more):
            a, b, c = few.kept, more.kept, counted(3 * _FEW).kept
            n = length / _FEW - 1
            return int(a + n * (b - a) + n * (n - 1) / 2 * (c - 2 * b + a))
    return counted(length).kept


def _goes_from_token_to_token(few: _Counted, more: _Counted) -> bool:
    """Whether _FEW tokens more take one call of Torch or more for each."""
    return more.calls - few.calls >= _FEW


def _bytes_of_scan(config: Any, dtype: str, casts: bool, lora: bool, length: int) -> int:
    """See `Kept.scan`; 0 for other models."""
    if length <= 2 * _FEW:
        return 0
    first = [kind[0] for kind in _kinds_of_layers(config)]
    for layers in (first, None):
        with contextlib.suppress(Exception):  # whatever the code makes of fewer layers
            few, more = (
                _counted(config, dtype, casts, lora, 1, tokens, layers)
                for tokens in (_FEW, 2 * _FEW)
            )
            if not _goes_from_token_to_token(few, more):
                return 0
            return int(few.largest + (length / _FEW - 1) * (more.largest - few.largest))
    return 0


def _kinds_of_layers(config: Any) -> list[list[int]]:
    """The numbers of the layers that are alike, kind by kind."""
    lists = _of_each_layer(config, len(layers := list_of_layers(_without_weights(config, None))))
    kinds: dict[Any, list[int]] = {}
    for n, layer in enumerate(layers):
        modules = tuple((name, type(module)) for name, module in layer.named_modules())
        sizes = tuple((name, p.shape) for name, p in layer.named_parameters())
        told = tuple(repr(values[n]) for values in lists.values())
        kinds.setdefault((modules, sizes, told), []).append(n)
    return list(kinds.values())


def _of_each_layer(config: Any, count: int) -> dict[str, Any]:
    """What a configuration lists layer by layer, by name."""
    return {
        name: value
        for name, value in vars(config.get_text_config()).items()
        if isinstance(value, list | tuple) and len(value) == count
    }


def _with_few(model: PreTrainedModel, some: Sequence[int]) -> None:
    """Takes all layers but some out of a model, and of its configuration."""
    layers, config = list_of_layers(model), model.config.get_text_config()
    for name, values in _of_each_layer(config, len(layers)).items():
        setattr(config, name, [values[n] for n in some])
    config.num_hidden_layers = len(some)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if child is layers:
                setattr(module, name, nn.ModuleList([layers[n] for n in some]))


def list_of_layers(model: nn.Module) -> nn.ModuleList:
    """The list that holds most of the model; one with the model alone where it has none."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    size = {id(some): sum(p.numel() for p in some.parameters()) for some in lists}
    return max(lists, key=lambda some: size[id(some)]) if lists else nn.ModuleList([model])


def _without_weights(config: Any, dtype: str | None) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    options = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), trust_remote_code=False, **options
        )
    return made


class _Counted(NamedTuple):
    """A forward pass of tensors without memory."""

    kept: int
    """Bytes that wait for backward."""
    calls: int
    """Of Torch."""
    largest: int
    """Bytes of the largest tensor that waits."""


class _WithoutGroups(TorchFunctionMode):
    """Products of experts with their tokens as one product: they keep the same; counts calls.

    Autocast leaves these products in the dtype of the weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls += 1
        if "grouped_mm" in getattr(function, "__name__", str(function)):
            with torch.autocast("cpu", enabled=False):
                return torch.matmul(args[0], args[1][0])
        return function(*args, **(kwargs or {}))


def _counted(
    config: Any,
    dtype: str,
    casts: bool,
    lora: bool,
    rows: int,
    length: int,
    layers: Sequence[int] | None,
) -> _Counted:
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes(), tensor  # which keeps the number its own
        return tensor

    model = _without_weights(config, dtype)
    if layers is not None:
        _with_few(model, layers)
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
    sizes = [size for size, _ in kept.values()]
    return _Counted(sum(sizes), calls.calls, max(sizes, default=0))


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
