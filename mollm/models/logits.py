"""What a model makes of its head's outputs: found by a probe of the model itself.

Losses and scores compute logits from final hidden states h and the head, a chunk of tokens at a
time. Some models do more than that: they scale the head's outputs, or cap those. The probe
replaces the head's outputs by a ramp z₀ from −60 to 60 and fits what the model returns with

    z = c tanh(s z₀ / c)   or   s z₀,

whatever size its own logits happen to have. What that does not describe is refused, and so is a
model whose tokens see later ones. States h are what the head is given, whatever happened to them
before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mollm.errors import UsageError
from mollm.models.dropout import without_rescaling
from mollm.models.forward import head, head_weights, hidden_states, in_evaluation_mode
from mollm.models.four_bits import in_four_bits
from mollm.system.parsing import reason_of
from mollm.system.precision import autocast, compute_dtype
from mollm_ops.operands import LogitTransform

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REACH = 60.0
_SMALLEST = 1e-3
"""The ramp's smallest numbers, where a cap does nothing and the scale shows."""
_TOKENS = 4
_SAME = 3e-5
"""By which states of one batch in float32 may differ, as a share of the largest."""
_CHUNKS = ("chunk_size", "mamba_chunk_size")
"""Where configurations say from how many tokens on a model computes by other operations."""
_LONGEST_CHUNK = 1024


def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """How the logits of `model` follow from its head's outputs, as `check_logits` found it.

    A copy of a model that was checked need not be checked again.

    Raises:
        UsageError: as `check_logits`, which is called if the model was never checked.
    """
    known: LogitTransform | None = getattr(model, "_mollm_logits", None)
    return check_logits(model) if known is None else known


def set_logit_transform(model: PreTrainedModel, transform: LogitTransform) -> None:
    """Takes the transform of a model without weights from one that has them."""
    without_rescaling(model)
    # On the model, so that deep copies have it too; a module's state dict does not hold it.
    vars(model)["_mollm_logits"] = transform


def check_logits(model: PreTrainedModel) -> LogitTransform:
    """Probes a model where it enters: forward passes over a few tokens, or over one chunk of them.

    Raises:
        UsageError: Its logits are no scaled or capped output of a linear head on its final hidden
            states; or it is an encoder-decoder, or not causal.
    """
    transform = _Probe(model).transform()
    set_logit_transform(model, transform)
    return transform


@dataclass(frozen=True)
class _Seen:
    """Of two rows of tokens that differ in the last one."""

    taken: Tensor
    """The head's input, [2, T, H]."""
    given: Tensor
    """The head's output, [2, T, V]."""
    ramp: Tensor
    """What took its place."""
    logits: Tensor
    """What the model returned, [2, T, V]."""


class _Probe:
    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def transform(self) -> LogitTransform:
        if getattr(self.model.config, "is_encoder_decoder", False):
            self._refuse("is an encoder-decoder")
        layer: Any = self.model.get_output_embeddings()
        inner = getattr(layer, "original_module", getattr(layer, "base_layer", layer))
        if not isinstance(inner, nn.Linear):
            self._refuse("has no linear head")
        seen = self._run()
        # Of a model that has diverged nothing can be said but this; its losses show what it is.
        finite = bool(seen.taken.isfinite().all())
        if finite:
            self._check_causality(seen.taken)
            self._check_head(seen)
        fitted = fit(seen.ramp, seen.logits) if seen.logits.shape == seen.ramp.shape else None
        if fitted is None:
            self._refuse("transforms its logits after the head by more than a scale and a cap")
        return fitted

    def _refuse(self, what: str) -> NoReturn:
        raise UsageError(
            f"the model {self._name} {what}, which the losses do not support: choose another model."
        )

    @property
    def _name(self) -> str:
        return self.model.name_or_path or type(self.model).__name__

    def _runs_in_float32(self, ids: Tensor, mask: Tensor) -> bool:
        """Whether it is autocast, which was on, that a model cannot bear."""
        if compute_dtype(ids.device).dtype == torch.float32:
            return False
        try:
            with in_evaluation_mode(self.model):
                self.model(input_ids=ids, attention_mask=mask)
                self._run_a_whole_chunk()
        except Exception:  # then autocast is not what is wrong
            return False
        return True

    @torch.no_grad()
    def _run(self) -> _Seen:
        model, layer = self.model, head(self.model)
        without_rescaling(model)
        ids = self._tokens()
        mask = torch.ones_like(ids)
        calls: list[tuple[Tensor, Tensor, Tensor]] = []
        hidden = None

        def replace(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            values = ramp(output.numel()).reshape(output.shape[-1], -1).t().reshape(output.shape)
            calls.append((arguments[0], output, values))
            return values.to(output.device)

        handle = layer.register_forward_hook(replace)
        try:
            with in_evaluation_mode(model), autocast(model.device):
                output = model(input_ids=ids, attention_mask=mask)
                logits = output[0] if isinstance(output, tuple) else output.logits
                handle.remove()
                if len(calls) == 1:
                    hidden = hidden_states(model, ids, mask)
                    self._run_a_whole_chunk()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model raises that wants other inputs
            reason = reason_of(error, 200)
            if self._runs_in_float32(ids, mask):
                raise UsageError(
                    f"the model {self._name} cannot compute its matrix products in bfloat16 "
                    f"({type(error).__name__}: {reason}): set compute_dtype to float32."
                ) from error
            failed = f"gives no logits for token ids alone ({type(error).__name__}: {reason})"
            narrow = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
            if narrow and getattr(model, "hf_quantizer", None) is None:
                raise UsageError(
                    f"the model {self._name} {failed}: load it in float32, or choose another model."
                ) from error
            self._refuse(failed)
        finally:
            handle.remove()
        if hidden is None or calls[0][0].shape != hidden.shape:
            self._refuse("does not compute its logits by one pass of its head over all tokens")
        taken, given, values = calls[0]
        if taken.isfinite().all() and _apart(hidden, taken) > _tolerance(taken):
            self._refuse("gives its head other states when it runs again")
        return _Seen(*(t.detach() for t in (taken, given, values, logits)))

    def _run_a_whole_chunk(self) -> None:
        """Raises what the model raises only for inputs that are longer than the probe's."""
        config = self.model.config.get_text_config()
        sizes = (getattr(config, name, None) for name in _CHUNKS)
        chunk = next((size for size in sizes if isinstance(size, int)), 0)
        if _TOKENS <= chunk <= _LONGEST_CHUNK:
            vocabulary = self.model.get_input_embeddings().weight.shape[0]
            ids = torch.arange(chunk + 1, device=self.model.device)[None] % vocabulary
            hidden_states(self.model, ids, torch.ones_like(ids))

    def _check_causality(self, taken: Tensor) -> None:
        """Tokens that see later ones may see little of them. Rows of a causal model differ by
        rounding alone, where experts get other numbers of tokens: by 2e-7 in float32."""
        if _leak(taken) <= _SAME:
            return
        wide = self._taken_in_float32()
        tolerance = _tolerance(taken) if wide is None else _SAME
        if _leak(taken if wide is None else wide) > tolerance:
            self._refuse("lets tokens see later ones, so that it is no causal language model")

    @torch.no_grad()
    def _taken_in_float32(self) -> Tensor | None:
        """None where weights are narrower, products too, or the model cannot."""
        if any(p.dtype not in (torch.float32, torch.float64) for p in self.model.parameters()):
            return None
        if torch.get_float32_matmul_precision() != "highest":
            return None
        ids = self._tokens()
        without = torch.autocast(ids.device.type, enabled=False)
        try:
            with in_evaluation_mode(self.model), without:
                return hidden_states(self.model, ids, torch.ones_like(ids))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # of a model that autocast alone makes run
            return None

    def _tokens(self) -> Tensor:
        """Two rows that differ in the last token, [2, T]."""
        vocabulary: int = self.model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(1, _TOKENS + 1, device=self.model.device).repeat(2, 1)
        ids[1, -1] += 1
        return ids.remainder(vocabulary)

    @torch.no_grad()
    def _check_head(self, seen: _Seen) -> None:
        weight, bias = head_weights(self.model)
        if in_four_bits(weight):
            return
        plain = linear(seen.taken.to(weight.dtype), weight, bias).double()
        if _apart(seen.given, plain) > _tolerance(seen.given):
            self._refuse("has a head that is more than a matrix and a bias")


def _apart(one: Tensor, other: Tensor) -> float:
    """Their largest difference, as a share of the largest number."""
    largest = float(other.double().abs().max())
    return float((one.double() - other.double()).abs().max()) / max(largest, 1e-30)


def _leak(taken: Tensor) -> float:
    """How far the states before the last token of two rows are apart."""
    first, second = taken[:, :-1].double()
    return _apart(second, first)


def _tolerance(computed: Tensor) -> float:
    """By which two ways to compute the same may differ, as a share of the largest."""
    return 1e-3 if computed.dtype in (torch.float32, torch.float64) else 3e-2


def ramp(count: int) -> Tensor:
    """[count] numbers from −60 to 60 in float32: one half evenly spaced, one by their logarithm."""
    even = torch.linspace(-_REACH, _REACH, count - count // 2)
    exponents = torch.linspace(1, 0, count // 2)
    signs = 1 - 2 * (torch.arange(count // 2) % 2)
    return torch.cat([even, signs * _REACH * (_SMALLEST / _REACH) ** exponents])


def fit(outputs: Tensor, logits: Tensor) -> LogitTransform | None:
    """The transform that makes `logits` of a head's `outputs`, None where none does."""
    r, z = outputs.flatten().double().cpu(), logits.flatten().double().cpu()
    if not z.isfinite().all():
        return None
    limit = 8 * torch.finfo(logits.dtype).eps * max(float(z.abs().max()), _SMALLEST)
    scale = _rounded(float((r * z).sum() / (r * r).sum()))
    for candidate in (1.0, scale):
        if candidate > 0 and float((candidate * r - z).abs().max()) <= limit:
            return LogitTransform(candidate)
    capped = _fit_cap(r, z)
    if capped is None or float((capped(r) - z).abs().max()) > limit:
        return None
    return capped


def _fit_cap(r: Tensor, z: Tensor) -> LogitTransform | None:
    """By Gauss and Newton, from the slope at 0 and the cap that leads to the largest logit."""
    small = r.abs() <= 2 * _SMALLEST
    scale = float((z[small] / r[small]).median()) if small.any() else 0.0
    largest, reach = float(z.abs().max()), float(r.abs().max())
    if not scale > 0 or not largest > 0:
        return None
    low, high = largest, 1e6 * max(largest, scale * reach)
    for _ in range(100):
        middle = (low * high) ** 0.5
        reached = middle * float(torch.tanh(torch.tensor(scale * reach / middle).double()))
        low, high = (middle, high) if reached < largest else (low, middle)
    cap = high
    for _ in range(20):
        t = torch.tanh(scale * r / cap)
        slope = 1 - t * t
        by_scale, by_cap = r * slope, t - scale * r / cap * slope
        jacobian = torch.stack([by_scale * scale, by_cap * cap], 1)
        step = torch.linalg.lstsq(jacobian, (z - cap * t)[:, None]).solution[:, 0]
        change = step.clamp(-1, 1).exp()
        if not change.isfinite().all():
            return None
        scale, cap = scale * float(change[0]), cap * float(change[1])
    return LogitTransform(_rounded(scale), _rounded(cap))


def _rounded(value: float) -> float:
    """To the seven digits that float32 outputs determine."""
    return float(f"{value:.7g}")
