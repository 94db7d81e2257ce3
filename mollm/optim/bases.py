"""The bases "adamw" and "sgd": Torch optimizers whose step reads K gradients and their weights.

Their `param_groups` and `state` have the names of Torch's own AdamW and SGD, so that schedulers,
checkpoints and tools find what they expect.
"""

from __future__ import annotations

import difflib
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from mollm.distributed.sharding import common_seed, is_sharded, local, locals_of, sharding_of
from mollm.errors import UsageError
from mollm.models.slices import same_rows, span_of_rows, whole_of
from mollm.optim.constants import EIGHT_BITS
from mollm.optim.eight_bits import count_scales, narrowed, scales_name, widened
from mollm.optim.groups import columns_of, columns_of_means
from mollm.optim.saved_state import (
    check_entry,
    check_narrowing,
    check_same_algorithm,
    check_scales,
    check_step,
)
from mollm_ops.operands import (
    AdamMetric,
    AdamWStep,
    RunningMeans,
    SgdStep,
    Targets,
    largest_moment,
)
from mollm_ops.reference import overflows
from mollm_ops.update import update_

_LEAST_EPS = torch.finfo(torch.float32).smallest_normal
_STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_OF_OTHER_BASES = {
    "amsgrad": False,
    "betas": None,
    "dampening": 0,
    "eps": None,
    "maximize": False,
    "momentum": 0,
    "nesterov": False,
}
"""Options of Torch's AdamW and SGD, with what turns them off."""
_LONG_NAMES = {"learning_rate": "lr", "epsilon": "eps", "adam_epsilon": "eps"}
"""What settings of runs call options of an optimizer."""
_OF_ALL_GROUPS = (
    "base",
    "direction",
    "gradient_memory",
    "length",
    "mean_beta",
    "metric",
    "normalize",
    "objectives",
    "on_nonfinite",
    "preferences",
    "track_conflicts",
)
"""Arguments of `MOLLMOptimizer` that no single group can have."""
_SEEDS_APART = 0x9E3779B97F4A7C15
"""Of rows of a parameter, so that none meets the numbers of another parameter's."""


def _check_number(name: str, value: Any, what: str = "") -> None:
    if isinstance(value, Tensor) and value.is_cuda:
        return  # the host would have to wait for it
    if not isinstance(value, int | float | Tensor):
        raise ValueError(f"{what}{name} must be a number, but got {value!r}.")
    if not float(value) >= 0:
        raise ValueError(f"{what}{name} must not be negative, but got {value}.")
    if float(value) > torch.finfo(torch.float32).max:  # kernels take it as that
        raise ValueError(f"{what}{name} must be finite in float32, but got {value}.")


def _shares_words(name: str, option: str) -> bool:
    """Whether one of the two consists of whole words of the other, as lr_scale has lr."""
    one, other = f"_{name}_", f"_{option}_"
    return one in other or other in one


class FusedBase(Optimizer, ABC):
    """What AdamW and SGD share: state made on first use, and a step along Σ_k w_k g_k.

    Args of both:
        state_dtype: torch.float32 or torch.bfloat16 for the state, or "8bit" for 8 bits an element
            by bitsandbytes, see `mollm.optim.eight_bits`; default that of the parameter.
        stochastic_rounding: round bfloat16 results up or down at random, so that their mean is
            exact; see `mollm_ops.update.update_`.
    """

    first_name: ClassVar[str]
    _own_options: ClassVar[tuple[str, ...]]
    second_name: ClassVar[str | None] = None
    _keep_first = True

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        seed = common_seed() if defaults["stochastic_rounding"] else torch.initial_seed()
        # "fused" makes Torch keep `step` on the parameter's device when a state is loaded.
        defaults = {**defaults, "fused": True, "rounding_seed": seed}
        self.check_group(defaults)
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_keep_first": self._keep_first}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any Torch optimizer; options that are out of range, or would do nothing, are
        refused first."""
        self._refuse_misspelt_options(param_group)
        options = {**self.defaults, **param_group}
        self.check_group(options)
        eight = options["state_dtype"] == EIGHT_BITS
        if eight:
            importlib.import_module("bitsandbytes")  # now rather than in the first step
        super().add_param_group({**param_group, "state_dtype": options["state_dtype"]})
        if eight and any(is_sharded(p) for p in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise UsageError(
                f"state_dtype must not be {EIGHT_BITS!r} for a model in parts, whose scales no "
                "checkpoint could cut: choose bfloat16."
            )

    def _refuse_misspelt_options(self, group: dict[str, Any]) -> None:
        """Torch takes any name in a group; one that is nearly ours is a mistake, but not a longer
        one, such as no_weight_decay, with which programs mark their groups."""
        known = [name for name in self.defaults if name not in ("fused", "rounding_seed")]
        for name, value in group.items():
            if name in self.defaults:
                continue
            near = _LONG_NAMES.get(name) or next(
                iter(difflib.get_close_matches(str(name), known, n=1, cutoff=0.8)), None
            )
            if near in known and not _shares_words(str(name), near):
                raise ValueError(
                    f"a parameter group must not have {name}, which nothing reads, but got "
                    f"{value!r}: did you mean {near}?"
                )

    def _refuse_foreign_options(self, group: dict[str, Any]) -> None:
        for name, value in group.items():
            if name in _OF_ALL_GROUPS:
                raise ValueError(
                    f"{name} must be the same for all parameter groups, but got {value!r} in one: "
                    "give it to MOLLMOptimizer."
                )
            if name in _OF_OTHER_BASES and name not in self._own_options:
                if value is None or value == _OF_OTHER_BASES[name]:
                    continue
                raise ValueError(
                    f"a parameter group must not have {name}, which base {type(self).__name__} "
                    f"does not use, but got {value!r}: leave it out, or pass another base."
                )

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses options that no step can be made with; a dtype given by name becomes one.

        Raises:
            ValueError: it says which option.
        """
        self._refuse_foreign_options(group)
        _check_number("lr", group["lr"], "Invalid learning rate: ")
        _check_number("weight_decay", group["weight_decay"])
        dtype = group["state_dtype"]
        if isinstance(dtype, str):
            dtype = _STATE_DTYPES.get(dtype.removeprefix("torch."), dtype)
        if dtype not in (None, EIGHT_BITS, *_STATE_DTYPES.values()):
            raise ValueError(
                f"state_dtype must be torch.float32, torch.bfloat16, {EIGHT_BITS!r} or None, but "
                f"got {dtype}."
            )
        group["state_dtype"] = dtype
        for name in ("stochastic_rounding", "nesterov"):
            if not isinstance(group.get(name, False), bool | int):
                raise ValueError(f"{name} must be True or False, but got {group[name]!r}.")
        self._check_own_options(group)

    @abstractmethod
    def _check_own_options(self, group: dict[str, Any]) -> None:
        """`check_group`, for the options that not every base has."""

    def drop_first(self) -> None:
        """Keep no momentum of the combined gradient: the caller has its own."""
        self._keep_first = False

    @property
    def keeps_first(self) -> bool:
        """Whether the combined gradient may have a momentum, see `drop_first`."""
        return self._keep_first

    @property
    def keeps_state(self) -> bool:
        """Whether a step leaves anything for the next one, beside the count of steps."""
        return any(self._slots(group) for group in self.param_groups)

    @abstractmethod
    def _slots(self, group: dict[str, Any]) -> list[str]:
        """The names of the state that a parameter of this group keeps, beside `step`."""

    @abstractmethod
    def _method(self, group: dict[str, Any], second_weights: Tensor | None) -> SgdStep | AdamWStep:
        """The group's options as the kernels take them."""

    def _make_state_of(self, p: Tensor, group: dict[str, Any], slots: Sequence[str]) -> None:
        whole = whole_of(p)
        state: dict[str, Any] = self.state[whole]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in slots:
            if state.get(name) is not None:
                continue
            if group["state_dtype"] == EIGHT_BITS:
                state[name] = torch.zeros_like(whole, dtype=torch.uint8)
                scales = count_scales(whole.numel())
                state[scales_name(name)] = whole.new_zeros(scales, dtype=torch.float32)
            else:
                state[name] = torch.zeros_like(whole, dtype=group["state_dtype"] or p.dtype)

    def _entry(self, p: Tensor) -> dict[str, Any]:
        """The state of a parameter, or that of some of its rows, in the same memory."""
        span = span_of_rows(p)
        state: dict[str, Any] = self.state[p if span is None else whole_of(p)]
        if span is None:
            return state
        found = dict(state)
        for name in (self.first_name, self.second_name):
            if name is None or name not in state:
                continue
            found[name] = same_rows(state[name], p)
            scales = scales_name(name)
            if scales in state:
                begin, end = (count_scales(row * p.shape[1]) for row in span)
                found[scales] = state[scales][begin:end]
        return found

    def _read(self, states: Sequence[dict[str, Any]], name: str) -> list[Tensor]:
        """This process's part of the states, in place, but of 8 bits a copy in float32."""
        return [
            widened(kept, state[scales_name(name)], signed=name != self.second_name)
            if kept.dtype == torch.uint8
            else kept
            for state, kept in zip(states, locals_of([s[name] for s in states]), strict=True)
        ]

    def _keep(
        self,
        states: Sequence[dict[str, Any]],
        name: str,
        values: Sequence[Tensor],
        proceed: Tensor | None,
    ) -> None:
        """Rounds to 8 bits what `_read` gave in a copy and a step has changed."""
        for state, wide in zip(states, values, strict=True):
            if state[name].dtype != torch.uint8:
                continue
            rounded = narrowed(wide, signed=name != self.second_name)
            for kept, new in zip((state[name], state[scales_name(name)]), rounded, strict=True):
                kept.copy_(new if proceed is None else torch.where(proceed, new, kept))

    @property
    def widens_state(self) -> bool:
        """Whether a step works on some state in float32 that is in 8 bits, or kept nowhere."""
        return any(
            group["state_dtype"] == EIGHT_BITS
            and (self.second_name is not None or bool(self._slots(group)))
            for group in self.param_groups
        )

    @staticmethod
    def _dtype_of(p: Tensor, group: dict[str, Any]) -> torch.dtype:
        """In which a step reads this parameter's state."""
        dtype = torch.float32 if group["state_dtype"] == EIGHT_BITS else group["state_dtype"]
        return dtype or p.dtype

    def make_state(self, params: Sequence[Tensor] | None = None) -> None:
        """The state of these parameters, or of all, if they have none yet."""
        some = None if params is None else {id(whole_of(p)) for p in params}
        for group in self.param_groups:
            slots = self._slots(group)
            for p in group["params"]:
                if some is None or id(p) in some:
                    self._make_state_of(p, group, slots)

    def metric(
        self, params: Sequence[Tensor], group: dict[str, Any], weights: Tensor
    ) -> AdamMetric:
        """Adam's metric at the coming step, for parameters of one group, or of several that have
        the same β₂ and ε; for bases that keep a second moment."""
        states = [self._entry(p) for p in params]
        return AdamMetric(
            self._second_of(params, states, group),
            [state["step"] for state in states],
            weights,
            group["betas"][1],
            group["eps"],
        )

    def _second_of(
        self, params: Sequence[Tensor], states: Sequence[dict[str, Any]], group: dict[str, Any]
    ) -> list[Tensor]:
        """Second moments; with β₂ = 0 nothing is kept, and a step starts from zeros."""
        name = "exp_avg_sq"
        if name in self._slots(group):
            return self._read(states, name)
        return [torch.zeros_like(local(p), dtype=self._dtype_of(p, group)) for p in params]

    def kept_dtypes(self) -> set[torch.dtype]:
        """Those that state of the combined gradient is kept in."""
        return {
            self._dtype_of(p, group)
            for group in self.param_groups
            if self._slots(group)
            for p in group["params"]
        }

    def largest_direction(self) -> float:
        """The largest |d| of which no number of steps makes any state overflow; infinity where
        none is kept."""
        limits = [math.inf]
        for group in self.param_groups:
            if not self._slots(group):
                continue
            for dtype in {self._dtype_of(p, group) for p in group["params"]}:
                limits.append(self._largest_direction(group, largest_moment(dtype)))
        return min(limits)

    @abstractmethod
    def _largest_direction(self, group: dict[str, Any], largest: float) -> float:
        """`largest_direction` for a group whose state holds numbers up to `largest`."""

    def overflows(
        self,
        params: Sequence[Tensor],
        gradients: Sequence[Sequence[Tensor | None]],
        weights: Tensor,
        moving: RunningMeans | None = None,
    ) -> Tensor:
        """Whether `step_along` would leave a state that its dtype cannot hold; reads everything
        once more. A scalar on the parameters' device."""
        over = torch.zeros((), dtype=torch.bool, device=weights.device)
        for _, group, columns, _, targets in self._targets(params):
            over |= overflows(
                columns_of(gradients, columns),
                weights,
                targets,
                self._method(group, None),
                moving=columns_of_means(moving, columns),
            )
        return over

    def _targets(
        self, params: Sequence[Tensor]
    ) -> list[tuple[int, dict[str, Any], list[int], list[dict[str, Any]], Targets]]:
        """Number, options, columns, states and targets of every group that has some of the
        parameters."""
        at = {id(whole_of(p)): n for n, p in enumerate(params)}
        self.make_state(params)
        found = []
        for number, group in enumerate(self.param_groups):
            columns = [at[i] for i in map(id, group["params"]) if i in at]
            if not columns:
                continue
            mine = [params[n] for n in columns]
            states = [self._entry(p) for p in mine]
            first = None
            if self.first_name in self._slots(group):
                first = self._read(states, self.first_name)
            second = None if self.second_name is None else self._second_of(mine, states, group)
            steps = [state["step"] for state in states]
            targets = Targets(locals_of(mine), first, second, steps)
            found.append((number, group, columns, states, targets))
        return found

    @torch.no_grad()
    def step_along(
        self,
        params: Sequence[Tensor],
        gradients: Sequence[Sequence[Tensor | None]],
        weights: Tensor,
        *,
        moving: RunningMeans | None = None,
        second_weights: Tensor | None = None,
        proceed: Tensor | None = None,
        track: bool = False,
    ) -> Tensor | None:
        """One step of every group along d = Σ_k w_k g_k.

        Args:
            params: the N parameters that have a gradient, all sharded alike.
            gradients: K lists of N tensors or None; of sharded ones, this process's part.
            weights: w, [K].
            moving, second_weights, proceed, track: see `mollm_ops.update.update_` and `AdamWStep`.

        Returns:
            g_k · Δθ over all parameters' parts on this process, [K], or None without `track`.
        """
        changes: Tensor | None = None
        for number, group, columns, states, targets in self._targets(params):
            spans = [span_of_rows(params[n]) for n in columns]
            # Of a parameter that comes some rows at a time, the first ones count the step.
            counted = [
                t for t, span in zip(targets.steps, spans, strict=True) if not span or not span[0]
            ]
            if counted:
                torch._foreach_add_(counted, 1.0 if proceed is None else proceed.float())
            seed = None
            if group["stochastic_rounding"]:  # another one for every group, bucket and shard
                first = whole_of(params[columns[0]])
                column = next(n for n, p in enumerate(group["params"]) if p is first)
                place = (sharding_of(first).part << 48) + (number << 32) + column
                place += (spans[0] or (0, 0))[0] * _SEEDS_APART
                seed = (group["rounding_seed"] + place) % (1 << 63)
            part = update_(
                columns_of(gradients, columns),
                weights,
                targets,
                self._method(group, second_weights),
                moving=columns_of_means(moving, columns),
                rounding_seed=seed,
                proceed=proceed,
                track=track,
            )
            if part is not None:
                changes = part if changes is None else changes + part
            for name in self._slots(group):
                values = targets.first if name == self.first_name else targets.second
                self._keep(states, name, values or (), proceed)
        return changes

    # ---- a saved state

    def fitted(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A saved state as this optimizer can load it; also that of Torch's own AdamW or SGD.

        Options that it lacks are taken from this optimizer's groups, and so is state_dtype, to
        which saved state is rounded or widened. State that is of no use here is left out.

        Raises:
            UsageError: it is of another algorithm or of other parameters.
            ValueError: an option in it is out of range.
        """
        saved_groups = state_dict["param_groups"]
        if [len(g["params"]) for g in saved_groups] != [
            len(g["params"]) for g in self.param_groups
        ]:
            return dict(state_dict)  # Torch refuses it, and names the difference
        groups, entries = [], dict(state_dict["state"])
        numbers = {p: n for n, p in enumerate(q for g in self.param_groups for q in g["params"])}
        for saved, mine in zip(saved_groups, self.param_groups, strict=True):
            self._check_same_kind(saved)
            options = {k: v for k, v in mine.items() if k != "params"}
            kept = {"fused": True, "state_dtype": mine["state_dtype"]}
            group = {**options, **saved, **kept}
            self.check_group(group)
            groups.append(group)
            for key, p in zip(saved["params"], mine["params"], strict=True):
                if entries.get(key):
                    entries[key] = self._fitted_entry(entries[key], numbers[p], p, group)
        return {**state_dict, "state": entries, "param_groups": groups}

    @abstractmethod
    def _check_same_kind(self, group: dict[str, Any]) -> None:
        """Refuses a saved group that is of another algorithm."""

    def _fitted_entry(
        self, entry: dict[str, Any], n: int, p: Tensor, group: dict[str, Any]
    ) -> dict[str, Any]:
        names = (self.first_name, "exp_avg_sq") if self.second_name else (self.first_name,)
        unknown = sorted(map(str, set(entry) - {"step", *names, *map(scales_name, names)}))
        if unknown:
            raise UsageError(
                f"the state to load has {', '.join(unknown)} for parameter {n}, which base "
                f"{type(self).__name__} does not keep: pass the optimizer that made it as base."
            )
        fitted: dict[str, Any] = {}
        for name in self._slots(group):
            value = entry.get(name)
            if value is None:
                if self.second_name:
                    raise UsageError(
                        f"the state to load has no {name} for parameter {n}: it was saved with "
                        "other settings of metric or momentum, so load it with the same."
                    )
                continue
            if group["state_dtype"] == EIGHT_BITS:
                fitted |= self._fitted_eight_bits(entry, name, n, p)
                continue
            if self._is_eight_bits(entry, name, n, p):
                signed = name != self.second_name
                value = widened(value, entry[scales_name(name)], signed=signed)
            check_entry(name, value, n, p)
            check_narrowing(name, value, n, group["state_dtype"] or p.dtype)
            fitted[name] = value
        if "step" in entry or self.second_name:
            steps = check_step(entry.get("step"), n)
            fitted["step"] = torch.tensor(steps, dtype=torch.float32, device=p.device)
        order = [name for name in entry if name in fitted]
        return {name: fitted[name] for name in dict.fromkeys([*order, *fitted])}

    def _fitted_eight_bits(
        self, entry: dict[str, Any], name: str, n: int, p: Tensor
    ) -> dict[str, Any]:
        """A saved state and its scales; one that was saved in another dtype is rounded."""
        value = entry[name]
        if self._is_eight_bits(entry, name, n, p):
            return {name: value, scales_name(name): entry[scales_name(name)]}
        check_entry(name, value, n, p)
        check_narrowing(name, value, n, torch.float32)
        codes, scales = narrowed(value, signed=name != self.second_name)
        return {name: codes, scales_name(name): scales}

    @staticmethod
    def _is_eight_bits(entry: dict[str, Any], name: str, n: int, p: Tensor) -> bool:
        """Whether a saved state is in 8 bits; one that is, but not of p, is refused."""
        value = entry[name]
        if not isinstance(value, Tensor) or value.dtype != torch.uint8:
            return False
        check_scales(name, value, entry.get(scales_name(name)), count_scales(p.numel()), n, p)
        return True

    def restore_dtypes(self, fitted: dict[str, Any]) -> None:
        """Undoes the cast to the parameters' dtype with which Torch loads a state."""
        saved = fitted["state"]
        keys = [key for group in fitted["param_groups"] for key in group["params"]]
        owners = [(p, group) for group in self.param_groups for p in group["params"]]
        for key, (p, group) in zip(keys, owners, strict=True):
            eight = group["state_dtype"] == EIGHT_BITS
            for name, value in saved.get(key, {}).items():
                if isinstance(value, Tensor) and name != "step":
                    dtype = value.dtype if eight else group["state_dtype"] or p.dtype
                    self.state[p][name] = value.detach().to(p.device, dtype, copy=True)


class AdamW(FusedBase):
    """AdamW, see `mollm_ops.update.AdamWStep`; options as `torch.optim.AdamW` where it has them.

    With β₂ = 0 the second moment is that of the step alone, and no state holds it.
    """

    first_name = "exp_avg"
    _own_options = ("betas", "eps")
    second_name = "exp_avg_sq"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "state_dtype": state_dtype,
                "stochastic_rounding": stochastic_rounding,
            },
        )

    def _check_own_options(self, group: dict[str, Any]) -> None:
        if not isinstance(group["betas"], tuple | list) or len(group["betas"]) != 2:
            raise ValueError(f"betas must be two numbers, but got {group['betas']}.")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas must be in [0, 1), but got {group['betas']}.")
        _check_number("eps", group["eps"])
        if float(group["eps"]) < _LEAST_EPS:
            raise ValueError(
                f"eps must be at least {_LEAST_EPS:.2g}, the smallest normal number of float32, "
                f"but got {group['eps']}, with which a weight whose gradients are 0 would become "
                "0 / 0: choose 1e-8."
            )

    def _check_same_kind(self, group: dict[str, Any]) -> None:
        if not {"betas", "eps"} <= set(group):
            raise UsageError(
                "the state to load is not that of an AdamW: its groups have no betas and eps."
            )
        check_same_algorithm(group, "adamw")

    def _largest_direction(self, group: dict[str, Any], largest: float) -> float:
        # v and m are weighted means of d² and d, and d² must not overflow itself.
        return math.sqrt(largest)

    def _slots(self, group: dict[str, Any]) -> list[str]:
        second = ["exp_avg_sq"] if group["betas"][1] else []
        return ["exp_avg", *second] if self._keep_first else second

    def _method(self, group: dict[str, Any], second_weights: Tensor | None) -> AdamWStep:
        return AdamWStep(
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            second_weights=second_weights,
        )


class SGD(FusedBase):
    """SGD, see `mollm_ops.update.SgdStep`. Unlike Torch's, its weight decay is decoupled."""

    first_name = "momentum_buffer"
    _own_options = ("momentum", "nesterov")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "state_dtype": state_dtype,
                "stochastic_rounding": stochastic_rounding,
            },
        )

    def _check_own_options(self, group: dict[str, Any]) -> None:
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum must be in [0, 1), but got {group['momentum']}.")
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("nesterov needs a momentum above 0, but got 0.")

    def _check_same_kind(self, group: dict[str, Any]) -> None:
        if "momentum" not in group:
            raise UsageError(
                "the state to load is not that of an SGD: its groups have no momentum."
            )
        check_same_algorithm(group, "sgd")

    def _largest_direction(self, group: dict[str, Any], largest: float) -> float:
        return (1 - float(group["momentum"])) * largest  # |b| ≤ |d| (1 + μ + μ² + …)

    def _slots(self, group: dict[str, Any]) -> list[str]:
        return ["momentum_buffer"] if self._keep_first and group["momentum"] else []

    def _method(self, group: dict[str, Any], second_weights: Tensor | None) -> SgdStep:
        return SgdStep(
            lr=group["lr"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
        )
