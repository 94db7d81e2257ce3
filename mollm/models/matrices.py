"""Matrices outside of the blocks, embeddings and head, with gradients that are never whole.

    embedding      dW[a:b] = Σ over tokens t with a ≤ id_t < b of ∂L/∂x_t
    projection     dW[a:b] = Σ_n (∂L/∂z_n)[a:b] h_n'
    linear loss    the same, with the logits a … b projected once more, see `mollm_ops.deferred`

While a tape records, lookups and projections by such a matrix are made with a constant in its place
and noted; a tied one is in both. Any other way to read the matrix has a gradient as ever, held as a
whole: a projection of so many tokens that its logits' gradients would take more than the matrix's,
a lookup with `max_norm` or `scale_grad_by_freq`, a penalty on the matrix itself, whatever is read
inside of a compiled function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mollm_ops.deferred import deferring, version_of

SLICES_OF_A_BLOCK = 4
"""A slice has as many elements as the largest block has parameters, divided by this."""

ALIGNED_ELEMENTS = 256
"""A slice begins at a multiple of these, for a state in 8 bits shares a scale among them."""


class _Use(Protocol):
    """One reading of a matrix."""

    @property
    def weight(self) -> Tensor:
        """The matrix."""

    @property
    def probes(self) -> Sequence[Tensor]:
        """Leaves whose gradients are asked for."""

    def rows(
        self, arrived: Sequence[Sequence[Tensor | None]], begin: int, end: int
    ) -> list[Tensor | None]:
        """Rows of the K gradients of the matrix, from those of the probes."""


@dataclass(frozen=True)
class _Lookup:
    weight: Tensor
    ids: Tensor
    padding: int | None
    probe: Tensor
    node: Any
    """Where autograd goes from what was looked up to the probe."""

    @property
    def probes(self) -> Sequence[Tensor]:
        return [self.probe]

    def rows(
        self, arrived: Sequence[Sequence[Tensor | None]], begin: int, end: int
    ) -> list[Tensor | None]:
        ids, count = self.ids, end - begin
        inside = (ids >= begin) & (ids < end)
        if self.padding is not None:
            inside &= ids != self.padding
        at = torch.where(inside, ids - begin, count)  # one row more, for all others

        def of(g: Tensor | None) -> Tensor | None:
            if g is None:
                return None
            # Autograd's own, which adds up in the same order each time, on a GPU too.
            found: Tensor = torch.ops.aten.embedding_dense_backward(g, at, count + 1, count, False)
            return found[:count].to(self.weight.dtype)

        return [of(g) for (g,) in arrived]


@dataclass(frozen=True)
class _Projection:
    weight: Tensor
    hidden: Tensor
    version: int
    """Of `hidden` when it was read."""
    probe: Tensor

    @property
    def probes(self) -> Sequence[Tensor]:
        return [self.probe]

    def rows(
        self, arrived: Sequence[Sequence[Tensor | None]], begin: int, end: int
    ) -> list[Tensor | None]:
        if version_of(self.hidden) != self.version:
            raise RuntimeError(
                "what the head reads was changed in place after the head had read it, so that the "
                "gradient of its weight can no longer be made: change a copy of it."
            )
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])

        def of(g: Tensor | None) -> Tensor | None:
            if g is None:
                return None
            part = g.reshape(-1, g.shape[-1])[:, begin:end]
            return (part.t() @ hidden.to(g.dtype)).to(self.weight.dtype)

        return [of(g) for (g,) in arrived]


class Matrices:
    """The gradients of some matrices in one step.

    Args:
        matrices: Parameters [V, H].
        elements: How many of a matrix to work on at a time.
        objectives: K.
    """

    def __init__(self, matrices: Sequence[Tensor], elements: int, objectives: int) -> None:
        self.matrices = tuple(matrices)
        self._elements = elements
        self._uses: list[_Use] = []
        self._arrived: list[dict[int, Tensor]] = [{} for _ in range(objectives)]
        """∂L_k/∂ every probe, by its id."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, the uses of the matrices are noted."""
        if not self.matrices:
            yield
            return
        # Losses add themselves to the same list.
        with deferring(self.matrices, self._uses), _Watch(self):  # type: ignore[arg-type]
            yield

    def embedding(self, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        """`F.embedding`, noted."""
        output = F.embedding(ids, weight.detach(), padding)
        if padding is not None:
            padding %= len(weight)
        probe = _probe(output)
        output.add_(probe)  # no leaf, so that it may be changed in place
        # Whoever gave the ids may use their memory for the next batch.
        self._uses.append(_Lookup(weight, ids.clone(), padding, probe, output.grad_fn))
        return output

    def linear(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`F.linear`, noted, unless what has to be kept of it, [N, V] for an objective, is more
        than the gradient."""
        known = [u.hidden for u in self._uses if isinstance(u, _Projection) and u.weight is weight]
        if sum(h.numel() for h in [*known, hidden]) > weight.shape[1] ** 2:
            return F.linear(hidden, weight, bias)
        output = F.linear(hidden, weight.detach(), bias)
        probe, hidden = _probe(output), hidden.detach()
        self._uses.append(_Projection(weight, hidden, version_of(hidden), probe))
        return output + probe

    def gave(self, tensor: Tensor) -> bool:
        """Whether a lookup gave this tensor, which then follows from nothing else."""
        nodes = (use.node for use in self._uses if isinstance(use, _Lookup))
        return any(node is tensor.grad_fn for node in nodes)

    @property
    def probes(self) -> list[Tensor]:
        """Leaves whose gradients `arrive`."""
        return [probe for use in self._uses for probe in use.probes]

    def arrive(self, objective: int, gradients: Sequence[Tensor | None]) -> None:
        """Takes, and adds, an objective's gradients at the probes."""
        known = self._arrived[objective]
        for probe, g in zip(self.probes, gradients, strict=True):
            if g is not None:
                before = known.get(id(probe))
                known[id(probe)] = g if before is None else before + g

    @property
    def arrived(self) -> list[list[Tensor]]:
        """The gradients at the probes, by objective."""
        return [list(known.values()) for known in self._arrived]

    def slices(self, matrix: Tensor) -> Iterator[tuple[int, int]]:
        """The rows to work on at a time, first and one after the last."""
        count, width = matrix.shape
        aligned = ALIGNED_ELEMENTS // math.gcd(ALIGNED_ELEMENTS, width)
        size = max(1, self._elements // width // aligned) * aligned
        for begin in range(0, count, size):
            yield begin, min(begin + size, count)

    @torch.no_grad()
    def rows(self, matrix: Tensor, begin: int, end: int) -> list[Tensor | None]:
        """These rows of the matrix's K gradients; None of an objective that does not reach it."""
        total: list[Tensor | None] = [None] * len(self._arrived)
        for use in self._uses:
            if use.weight is not matrix:
                continue
            arrived = [[known.get(id(p)) for p in use.probes] for known in self._arrived]
            for k, g in enumerate(use.rows(arrived, begin, end)):
                before = total[k]
                total[k] = before if g is None else g if before is None else before.add_(g)
        return total


def _probe(output: Tensor) -> Tensor:
    """A leaf of zeros without memory: its gradient is the output's, and it holds no graph."""
    return output.new_zeros(()).expand(output.shape).requires_grad_()


class _Watch(TorchFunctionMode):
    """Hands lookups and projections over, whoever makes them."""

    def __init__(self, matrices: Matrices) -> None:
        super().__init__()
        self._matrices = matrices

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        compiling = torch.compiler.is_compiling()
        if func in (F.linear, F.embedding) and torch.is_grad_enabled() and not compiling:
            found = (self._linear if func is F.linear else self._embedding)(*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)

    def _mine(self, weight: Tensor) -> bool:
        return any(weight is matrix for matrix in self._matrices.matrices)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        return self._matrices.linear(input, weight, bias) if self._mine(weight) else None

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor | None:
        if not self._mine(weight) or max_norm is not None or scale_grad_by_freq or sparse:
            return None
        return self._matrices.embedding(input, weight, padding_idx)
