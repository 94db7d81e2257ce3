"""Gradients of a head's weight that wait until some of its rows are asked for.

    dW_k[a:b] = Σ_n u_kn (∂L_n/∂z_n)[a:b] h_n'

u_k is what objective k's backward hands to the losses [N], or to their mean. Of every token three
numbers are kept, see `row_sums`, so that of its logits a … b alone are projected once more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mollm_ops._chunks import (
    GradientSums,
    Kept,
    Loss,
    RowScales,
    losses_in_chunks,
    project_rows,
)
from mollm_ops._dtypes import wide_dtype
from mollm_ops._loss_arguments import Head
from mollm_ops.row_slices import RowSlice

WORKSPACE_BYTES = {"cuda": 256 << 20, "cpu": 32 << 20}
"""What the logits a … b of some tokens may take, with their probabilities and gradients."""

ROWS_ALIVE = 4
"""Rows of logits, or the like, that each token has at a time: p, p_ref and two gradients."""

MIN_ROWS = 64
"""Tokens below which the GEMMs lose more speed than the smaller workspace is worth."""


@dataclass(frozen=True)
class _Term:
    """One of the losses of a call."""

    probe: Tensor
    """A leaf of zeros that was added to the loss: its gradient is what backward hands to that."""
    scale: Tensor
    """What the sum of the rows' losses was multiplied by; [] ones where they are not reduced."""
    kl: bool


class DeferredWeight:
    """The gradients of the weight of one call of a linear loss.

    Args:
        weight: As the call was given it.
        head: The call's.
        found: Where it is added once the losses are there.
    """

    def __init__(self, weight: Tensor, head: Head, found: list[DeferredWeight]) -> None:
        self.weight = weight
        self._found = found
        self._head = _lasting(head, weight)
        self._reference: Head | None = None
        self._kept = Kept()
        self._eps: float | None = None
        self._dtype = head.hidden.dtype
        self._terms: list[_Term] = []
        self._versions: list[tuple[str, Tensor, int]] = []

    def compute(
        self,
        head: Head,
        reference: Head | None,
        ref_weight: Tensor | None,
        target: Tensor,  # [N], as `mollm_ops.rows` takes it
        ce: Loss | None,
        kl: Loss | None,
        eps: float | None,
        chunk_rows: int | None,
    ) -> list[Tensor]:
        """Losses [N] and gradients of ce and kl, those that are given, one after the other.

        Args:
            head: The call's, with a constant for its weight.
            reference: The same of the reference.
            ref_weight: As the call was given it.
        """
        self._eps = eps
        if reference is not None:
            self._reference = _lasting(reference, self.weight if ref_weight is None else ref_weight)
            self._dtype = wide_dtype(self._dtype)
        losses, gradients = losses_in_chunks(
            head,
            reference,
            target,
            ce=ce,
            kl=kl,
            eps=eps,
            chunk_rows=chunk_rows,
            wide_logits=reference is not None,
            kept=self._kept,
        )
        kept = {"hidden": self._kept.hidden, "ref_hidden": self._kept.ref_hidden}
        self._versions = [(name, t, version_of(t)) for name, t in kept.items() if t is not None]
        found, self._found = self._found, []  # a cycle would hold memory until it is collected
        found.append(self)
        return [t for loss, each in zip(losses, gradients, strict=True) for t in (loss, *each)]

    def watched(self, loss: Tensor, scale: Tensor, *, kl: bool = False) -> Tensor:
        """The same loss, reduced or [N], whose upstream gradient is noticed."""
        probe = torch.zeros_like(loss).requires_grad_()
        self._terms.append(_Term(probe, scale, kl))
        return loss + probe

    @property
    def probes(self) -> list[Tensor]:
        """Leaves whose gradients `rows` takes."""
        return [term.probe for term in self._terms]

    @torch.no_grad()
    def rows(
        self, arrived: Sequence[Sequence[Tensor | None]], begin: int, end: int
    ) -> list[Tensor | None]:
        """Rows begin … end of the weight's gradients of K objectives.

        Args:
            arrived: For each objective the gradients of `probes`, None where it reads none.
            begin: The first row.
            end: The row after the last.

        Raises:
            RuntimeError: The call's hidden states were changed since.
        """
        for name, t, version in self._versions:
            if version_of(t) != version:
                raise RuntimeError(
                    f"{name} was changed in place after a loss had read it, so that the gradient "
                    "of the loss's weight can no longer be made: change a copy of it."
                )
        kept = self._kept
        head = _part(replace(self._head, hidden=kept.hidden), begin, end)
        reference = None
        if self._reference is not None and kept.ref_hidden is not None:
            reference = _part(replace(self._reference, hidden=kept.ref_hidden), begin, end)
        size = rows_at_a_time(self.weight.device.type, self._dtype, end - begin)
        chunks = -(-len(kept.hidden) // size)
        parts: list[tuple[int, _Term, RowScales, GradientSums]] = []
        for k, upstreams in enumerate(arrived):
            for term, upstream in zip(self._terms, upstreams, strict=True):
                if upstream is not None:
                    scales = self._scales(term, upstream)
                    sums = GradientSums(
                        head, (False, True, False), len(kept.hidden), chunks, scales.rest
                    )
                    parts.append((k, term, scales, sums))
        found: list[Tensor | None] = [None] * len(arrived)
        if not parts:
            return found
        for start in range(0, len(kept.hidden), size):
            some = slice(start, start + size)
            gradients = self._gradients(head, reference, some, begin)
            for _, term, scales, sums in parts:
                dz = gradients[term.kl] * scales.rows[some, None]
                sums.add(dz.to(head.hidden.dtype), kept.hidden[some], start)
        for k, _, _, sums in parts:
            g, before = sums.finish(None).weight.to(self.weight.dtype), found[k]
            found[k] = g if before is None else before.add_(g)
        return found

    def _scales(self, term: _Term, upstream: Tensor) -> RowScales:
        """What the gradients of the rows that count are multiplied by."""
        count = len(self._head.hidden)
        scale = (upstream.reshape(-1) * term.scale.to(upstream.device)).expand(count)
        if self._kept.index is not None:
            scale = scale[self._kept.index]
        return RowScales.of(scale, self._head.transform.scale, self._head.hidden.dtype)

    def _gradients(
        self, head: Head, reference: Head | None, rows: slice, begin: int
    ) -> dict[bool, Tensor]:
        """∂L_n/∂z_n at columns `begin` … of some rows, in a wide dtype; of KL under True."""
        kept = self._kept
        own = RowSlice.of(
            _projected(head, head.hidden[rows], self._dtype), kept.sums[rows], head.transform
        )
        target, found = kept.target[rows], {}
        if reference is not None:
            theirs = RowSlice.of(
                _projected(reference, reference.hidden[rows], self._dtype),
                kept.ref_sums[rows],
                reference.transform,
            )
            found[True] = (own.p - theirs.p).mul_(own.slope)
        if any(not term.kl for term in self._terms):
            found[False] = own.log_loss(target - begin, self._eps).mul_(own.slope)
        if target.device.type == "cpu":
            return found  # every row counts, or was left out
        counted = ((target >= 0) & (target < len(self.weight)))[:, None]
        return {kl: torch.where(counted, g, 0) for kl, g in found.items()}


def rows_at_a_time(device: str, dtype: torch.dtype, width: int) -> int:
    """Tokens of which so many columns of logits are worked on at a time.

    Args:
        device: Its type.
        dtype: Of the logits.
        width: How many columns.
    """
    size = ROWS_ALIVE * wide_dtype(dtype).itemsize * width
    return max(MIN_ROWS, WORKSPACE_BYTES.get(device, WORKSPACE_BYTES["cuda"]) // size)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; one of inference mode never is outside of it."""
    return 0 if tensor.is_inference() else tensor._version


def _lasting(head: Head, weight: Tensor) -> Head:
    """A head for later: with the weight that the call was given, of which some rows at a time are
    cast, and a bias that does not change with the parameter."""
    bias = None if head.bias is None else head.bias.detach().clone()
    return replace(head.detach(), weight=weight.detach(), bias=bias)


def _part(head: Head, begin: int, end: int) -> Head:
    bias = None if head.bias is None else head.bias[begin:end]
    weight = head.weight[begin:end].to(head.hidden.dtype)
    return replace(head, weight=weight, bias=bias)


def _projected(head: Head, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    z = hidden.new_empty(len(hidden), len(head.weight), dtype=dtype)
    project_rows(head, hidden, out=z)
    return z


@dataclass(frozen=True)
class _Request:
    weights: Collection[Tensor]
    found: list[DeferredWeight]


_REQUEST: ContextVar[_Request | None] = ContextVar("mollm_ops.deferred", default=None)


@contextmanager
def deferring(weights: Collection[Tensor], found: list[DeferredWeight]) -> Iterator[None]:
    """Inside, linear losses of these very weights take no gradient of them: each call is added to
    `found`, and whoever asks its rows for a gradient must not have changed these rows since.

    Args:
        weights: Found by identity.
        found: Calls are appended.

    Example:
        >>> import torch
        >>> from mollm_ops import linear_cross_entropy
        >>> hidden, head = torch.eye(2, 4, requires_grad=True), torch.ones(6, 4, requires_grad=True)
        >>> found = []
        >>> with deferring({head}, found):
        ...     loss = linear_cross_entropy(hidden, head, torch.tensor([5, 0]))
        >>> upstream = torch.autograd.grad(loss, found[0].probes)
        >>> rows = found[0].rows([upstream], 4, 6)[0]
        >>> plain = linear_cross_entropy(hidden, head, torch.tensor([5, 0]))
        >>> torch.allclose(rows, torch.autograd.grad(plain, head)[0][4:6])
        True
    """
    token = _REQUEST.set(_Request(weights, found))
    try:
        yield
    finally:
        _REQUEST.reset(token)


def deferred(weight: Tensor, head: Head, ref_weight: Tensor | None = None) -> DeferredWeight | None:
    """For a call of a linear loss: where its weight's gradients go, if they are to wait. They are
    not where the reference reads another such weight, whose rows change at another time."""
    if torch.compiler.is_compiling():  # Dynamo does not trace what reads a context variable
        return None
    request = _REQUEST.get()
    if (
        request is None
        or not torch.is_grad_enabled()
        or not head.hidden.requires_grad
        or not any(weight is each for each in request.weights)
        or (ref_weight is not None and _is_another(ref_weight, weight, request.weights))
    ):
        return None
    return DeferredWeight(weight, head, request.found)


def _is_another(ref_weight: Tensor, weight: Tensor, weights: Collection[Tensor]) -> bool:
    own = ref_weight.untyped_storage().data_ptr()
    others = (each for each in weights if each is not weight)
    return any(each.untyped_storage().data_ptr() == own for each in others)
