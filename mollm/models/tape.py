"""A forward pass that keeps the inputs of its blocks alone, and its backward block by block.

    forward    h_b = block_b(h_{b−1}); of all that autograd would keep, only h_{b−1} stays
    losses     for each objective k its cotangent ∂L_k/∂h_L, and its gradients outside of the blocks
    sweep      from the last block to the first: compute the block once more, and for each k
                   ∂L_k/∂θ_b,  ∂L_k/∂h_{b−1}  from  ∂L_k/∂h_b

So K gradients of one block are alive at a time. A sweep can be repeated, and whoever reads it may
change a block's parameters as soon as the sweep has come past it: nothing reads them any more. The
gradients of the lowest block, to which a sweep comes last, stay for the next sweep, which begins
with them and has a block less to compute.

Outside of the blocks, gradients of small parameters stay as well, and those of embeddings and head
are made a few rows at a time, see `mollm.models.matrices`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import backward, grad
from torch.autograd.graph import saved_tensors_hooks

from mollm.distributed.sharding import is_sharded, local_gradients
from mollm.errors import UsageError
from mollm.models.matrices import SLICES_OF_A_BLOCK, Matrices
from mollm.models.slices import rows_of

Rows = list[list[Tensor | None]]
"""Of K objectives, a gradient or None for each parameter."""

Complete = Callable[[list[Tensor], Rows], None]


def _drop(_: Tensor) -> None:
    """In place of what autograd would save inside a block."""


def _refuse_inside(_: Any) -> Tensor:
    raise UsageError(
        "a loss must read what a block returns, but one reads what a block computes inside, such "
        "as a router's logits: leave that loss out, or choose another gradient_memory."
    )


def _as_it_is(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that is not compiled with a block: what it does to autograd would be lost."""
    if "torch._dynamo" not in sys.modules:  # so nothing is compiled, and loading it takes a second
        return hook
    found: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return found


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Arguments or results of a block with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return type(tree)((key, _mapped(value, change)) for key, value in tree.items())
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_mapped(value, change) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(value, change) for value in tree)
    return tree


def _tensors(tree: Any) -> list[Tensor]:
    """Its tensors, each once."""
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        return found.setdefault(id(tensor), tensor)

    _mapped(tree, note)
    return list(found.values())


def _refuse_caches(tree: Any) -> None:
    """A cache of keys would get those of a block once more whenever the block is computed."""
    from transformers import Cache

    values = [*tree.values()] if isinstance(tree, dict) else [*tree]
    if any(isinstance(value, Cache) for value in values):
        raise UsageError(
            "a model whose gradients are streamed must run with use_cache=False, but it hands its "
            "blocks a cache: pass use_cache=False."
        )


@dataclass(eq=False)
class _Call:
    """One pass of a block, and what it takes to make it again."""

    block: nn.Module
    number: int
    """Of the block."""
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    inputs: list[Tensor]
    """Tensors among the arguments that gradients go back to."""
    outputs: list[Tensor] = field(default_factory=list)
    """Leaves in place of what the block returned, as the losses and later blocks saw them."""
    glued: bool = False
    """Whether an input follows from an earlier block's output by way of something else."""

    def __post_init__(self) -> None:
        self._versions = [(t, t._version) for t in _tensors(self.arguments)]
        self._modes = [module.training for module in self.block.modules()]
        # A block may lie elsewhere than its inputs, which are then moved inside of it.
        tensors = (*_tensors(self.arguments), *self.block.parameters())
        devices = dict.fromkeys(t.device for t in tensors)
        kinds = (device.type for device in devices if device.type not in ("cpu", "meta"))
        self._kind = next(kinds, "cpu")
        self._autocast = (
            torch.get_autocast_dtype(self._kind),
            torch.is_autocast_enabled(self._kind),
        )
        # In evaluation mode as well: a block may draw numbers whatever its mode.
        self._random = torch.get_rng_state()
        self._random_on = {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}

    def again(self) -> tuple[list[Tensor], list[Tensor]]:
        """Computes the block once more, on inputs of its own; these and its outputs."""
        if any(t._version != version for t, version in self._versions):
            raise RuntimeError(
                f"an input of block {self.number} was changed in place after the block had read "
                "it, so that it cannot be computed again: choose another gradient_memory."
            )
        if self._modes != [module.training for module in self.block.modules()]:
            raise RuntimeError(
                f"block {self.number} was switched between train() and eval() after its forward: "
                "switch before the forward or after step()."
            )
        own = {id(t): t.detach().requires_grad_() for t in self.inputs}
        args, kwargs = _mapped(self.arguments, lambda t: own.get(id(t), t))
        dtype, enabled = self._autocast
        casting = torch.autocast(self._kind, dtype, enabled, cache_enabled=False)
        with self._same_random_numbers(), torch.enable_grad(), casting:
            outputs = _live(self.block(*args, **kwargs))
        return list(own.values()), outputs

    @contextlib.contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        with torch.random.fork_rng(list(self._random_on)):
            torch.set_rng_state(self._random)
            for device, state in self._random_on.items():
                torch.cuda.set_rng_state(state, device)
            yield


def _live(result: Any) -> list[Tensor]:
    return [t for t in _tensors(result) if t.requires_grad]


class Tape:
    """The passes of one step, of any number of micro-batches.

    Args:
        blocks: Modules that run one after the other, first to last. They share no parameters, and
            each is given what it needs as arguments. What happens before, between and after them
            is up to the model: its graph is kept as it is.
        params: What trains, inside the blocks and outside of them; frozen ones are left out.
        objectives: K.

    Raises:
        UsageError: A module is listed twice, contains another one or shares a parameter with it;
            or it checkpoints its own activations; or parameters are DTensors and a module is no
            group of FSDP2.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], params: Sequence[Tensor], objectives: int
    ) -> None:
        train = dict.fromkeys(p for p in params if p.requires_grad)
        self.blocks = tuple(blocks)
        self.inside: list[list[Tensor]] = [
            [p for p in block.parameters() if p in train] for block in self.blocks
        ]
        own = [p for block in self.blocks for p in block.parameters()]
        if not self.blocks or len(set(own)) < len(own):
            raise UsageError(
                "blocks must be modules that run one after the other and share no parameters, but "
                f"got {len(self.blocks) or 'none'}{' that do' if self.blocks else ''}: use those "
                "of mollm.find_blocks(model)."
            )
        within = set(own)
        slices = max((sum(p.numel() for p in params) for params in self.inside), default=0)
        slices //= SLICES_OF_A_BLOCK
        large = [
            p
            for p in train
            if p not in within and p.ndim == 2 and p.numel() > slices > 0 and not is_sharded(p)
        ]
        self._matrices = Matrices(large, slices, objectives)
        matrices = set(large)
        self.outside = [p for p in train if p not in within and p not in matrices]
        self._ends: Rows = [[None] * (len(self.outside) + len(large)) for _ in range(objectives)]
        """Gradients outside of the blocks, of `outside` and, as far as they are whole, of matrices:
        those of the losses, after a sweep all of them."""
        self._cotangents: list[dict[int, Tensor]] = [{} for _ in range(objectives)]
        """∂L_k/∂ every output of a block that a loss reads, by the output's id."""
        self._calls: list[_Call] = []
        self._of: dict[int, _Call] = {}  # by the ids of outputs
        self._running: list[tuple[_Call, saved_tensors_hooks] | None] = []
        self._sharded = any(is_sharded(p) for p in train)
        if self._sharded:
            self._refuse_ungathered()
        self._begun = self._complete = False
        some = [n for n, params in enumerate(self.inside) if params]
        self._lowest = min(some, default=len(self.blocks))
        """The number of the first block that trains, which a sweep comes to last."""
        self._held: Rows | None = None
        """Its gradients from the last sweep: the next one begins with them, and ends above."""

    def _refuse_ungathered(self) -> None:
        """A block that is computed again must gather its parameters by itself."""
        from torch.distributed.fsdp import FSDPModule

        if not all(isinstance(block, FSDPModule) for block in self.blocks):
            raise UsageError(
                "every block must be a group of its own where gradients are streamed through a "
                "model in parts, but some are not: call fully_shard() on each block first."
            )

    # ---- forward

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, what the blocks compute with gradients is recorded."""
        self._refuse_checkpointing()
        handles = []
        try:
            for number, block in enumerate(self.blocks):
                handles += self._watched(number, block)
            with self._matrices.recording():
                yield
        finally:
            for handle in handles:
                handle.remove()
            for running in reversed(self._running):  # where a block was interrupted
                if running is not None:
                    running[1].__exit__()
            self._running.clear()

    def _refuse_checkpointing(self) -> None:
        # Reached by its own flag: what a block checkpoints inside of it is its own affair.
        if any(getattr(block, "gradient_checkpointing", False) for block in self.blocks):
            raise UsageError(
                "gradient_checkpointing must be off where gradients are streamed, which computes "
                "every block again anyway, but it is on: call gradient_checkpointing_disable()."
            )

    def _watched(self, number: int, block: nn.Module) -> list[Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._running.append(None)
            if not torch.is_grad_enabled():
                return
            _refuse_caches(args)
            _refuse_caches(kwargs)
            inputs = [t for t in _tensors((args, kwargs)) if t.requires_grad]
            call = _Call(module, number, (args, kwargs), inputs)
            # In place of no_grad, so that a loss that reads a block's inside is noticed.
            without_memory = saved_tensors_hooks(_drop, _refuse_inside)
            without_memory.__enter__()
            self._running[-1] = call, without_memory

        def after(module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
            running = self._running.pop()
            if running is None:
                return None
            call, without_memory = running
            without_memory.__exit__()
            if result is None:
                return None  # the block raised
            return self._recorded(call, result)

        return [
            block.register_forward_pre_hook(_as_it_is(before), with_kwargs=True, prepend=True),
            block.register_forward_hook(_as_it_is(after), with_kwargs=True, always_call=True),
        ]

    def _recorded(self, call: _Call, result: Any) -> Any:
        """The block's result, cut off from what made it."""
        leaves = {id(t): t.detach().requires_grad_() for t in _live(result)}
        if leaves:
            call.outputs = list(leaves.values())
            self._calls.append(call)
            self._of |= {id(leaf): call for leaf in call.outputs}
        torch.clear_autocast_cache()
        return _mapped(result, lambda t: leaves.get(id(t), t))

    # ---- losses

    def record(self, objective: int, loss: Tensor, *, keep_graph: bool) -> bool:
        """Takes the gradients of a loss with respect to what blocks returned, and outside of them.

        Args:
            objective: Its number.
            loss: A scalar.
            keep_graph: Whether another loss shares the graph.

        Returns:
            Whether there were any.
        """
        # What leads to a block's input may lead to the loss as well, and is needed in a sweep.
        before = [t for call in self._calls for t in call.inputs if id(t) not in self._of]
        glue = any(t.grad_fn is not None and not self._matrices.gave(t) for t in before)
        if before and self._sharded:
            raise UsageError(
                "what comes before the blocks must be frozen where gradients are streamed through "
                "a model in parts, but embeddings train: freeze them, or choose another "
                "gradient_memory."
            )
        cotangents, ends = self._reached([loss], None, keep_graph or glue, outside=True)
        for leaf, g in cotangents:
            self._add(self._cotangents[objective], leaf, g)
        self._end(objective, ends)
        return bool(cotangents) or any(g is not None for g in ends)

    def _reached(
        self,
        roots: Sequence[Tensor],
        grads: Sequence[Tensor] | None,
        keep_graph: bool,
        *,
        outside: bool,
    ) -> tuple[list[tuple[Tensor, Tensor]], Sequence[Tensor | None]]:
        """Gradients of `roots` at blocks' outputs and, on demand, outside of blocks: of parameters,
        and at the probes of matrices."""
        leaves = [leaf for call in self._calls for leaf in call.outputs]
        matrices = self._matrices
        ends = [*self.outside, *matrices.matrices, *matrices.probes] if outside else []
        inside = [p for params in self.inside for p in params]
        found = self._gradients(roots, [*leaves, *ends, *inside], grads, keep_graph)
        if any(g is not None for g in found[len(leaves) + len(ends) :]):
            raise UsageError(
                "the parameters of blocks must be read by the blocks alone, but a loss or another "
                "part of the model reads one too: choose another gradient_memory."
            )
        reached = [(leaf, g) for leaf, g in zip(leaves, found, strict=False) if g is not None]
        return reached, found[len(leaves) : len(leaves) + len(ends)]

    def _gradients(
        self,
        roots: Sequence[Tensor],
        tensors: Sequence[Tensor],
        grads: Sequence[Tensor] | None,
        keep_graph: bool,
    ) -> Sequence[Tensor | None]:
        """Gradients of `roots` at `tensors`; of a parameter in parts, this process's part."""
        if not self._sharded:
            return grad(roots, tensors, grads, retain_graph=keep_graph, allow_unused=True)
        # FSDP2 adds gradients up and cuts them in hooks of a backward that writes them.
        backward(roots, grads, retain_graph=keep_graph)
        found = local_gradients(tensors)
        for t in tensors:
            t.grad = None
        return found

    @staticmethod
    def _add(known: dict[int, Tensor], leaf: Tensor, g: Tensor) -> None:
        before = known.get(id(leaf))
        known[id(leaf)] = g if before is None else before + g

    def _end(self, objective: int, found: Sequence[Tensor | None]) -> None:
        row = self._ends[objective]
        self._matrices.arrive(objective, found[len(row) :])
        for n, g in enumerate(found[: len(row)]):
            if g is None:
                continue
            if g.is_sparse:
                raise TypeError(
                    f"the gradient of an embedding of shape {tuple(g.shape)} is sparse, but only "
                    "dense ones can be combined: make the embedding with sparse=False."
                )
            known = row[n]
            row[n] = self._own(g) if known is None else known.add_(g)

    def _own(self, g: Tensor) -> Tensor:
        """A gradient that nothing else reads."""
        kept = [t for row in self._ends for t in row if t is not None]
        kept += [t for known in self._cotangents for t in known.values()]
        kept += [t for arrived in self._matrices.arrived for t in arrived]
        shared = any(t.data_ptr() == g.data_ptr() for t in kept)
        return g if g.is_contiguous() and not shared else g.clone()

    def non_finite_elements(self) -> Tensor:
        """Of each objective, how many the losses have left in their gradients, [K]."""
        counts = []
        everything = zip(self._cotangents, self._ends, self._matrices.arrived, strict=True)
        for known, ends, arrived in everything:
            tensors = [*known.values(), *arrived, *(g for g in ends if g is not None)]
            each = [(~t.isfinite()).sum() for t in tensors]
            counts.append(torch.stack([n.to(each[0].device) for n in each]).sum())
        return torch.stack(counts).double()

    # ---- backward

    def sweep(self, complete: Complete | None = None) -> Iterator[tuple[list[Tensor], Rows]]:
        """Parameters that some objective reaches with their K lists of gradients, block by block:
        those of the last block first. The first block to train comes before all others where the
        sweep before has left its gradients.

        Args:
            complete: Adds to the K lists of these parameters what others have found.

        Raises:
            UsageError: The model is none whose blocks run one after the other.
            RuntimeError: What a block read was changed since, or an earlier sweep was broken off.
        """
        if self._begun and not self._complete:
            raise RuntimeError(
                "the gradients of this step were lost where an earlier sweep over the blocks was "
                "broken off: call zero_grad() and run forward and backward again."
            )
        first, self._begun = not self._complete, True
        down_to = self._lowest
        if self._held is not None:
            down_to += 1
            held, self._held = self._held, None
            yield from self._touched(self.inside[self._lowest], held)
            del held  # before the next ones are made
        pending = [dict(cotangents) for cotangents in self._cotangents]
        for number in reversed(range(0 if first else down_to, len(self.blocks))):
            params = self.inside[number]
            rows: Rows = [[None] * len(params) for _ in pending]
            for call in self._calls:
                if call.number == number:
                    self._back(call, params, pending, rows, first, last=number == down_to)
            if complete is not None:
                complete(params, rows)
            yield from self._touched(params, rows)
            if number == self._lowest:
                self._held = rows
        if first and any(pending):
            self._refuse_order()
        if first and complete is not None:
            small = [row[: len(self.outside)] for row in self._ends]
            complete(self.outside, small)
            for row, own in zip(self._ends, small, strict=True):
                row[: len(own)] = own
        self._complete = True

    def ends(self, complete: Complete | None = None) -> Iterator[tuple[list[Tensor], Rows]]:
        """The same for what is outside of all blocks, after a sweep and as often as is asked for:
        of a large matrix some rows at a time, see `mollm.models.slices`.

        Args:
            complete: As for `sweep`.
        """
        yield from self._touched(self.outside, self._ends)
        for n, matrix in enumerate(self._matrices.matrices, len(self.outside)):
            for begin, end in self._matrices.slices(matrix):
                made = self._matrices.rows(matrix, begin, end)
                for k, row in enumerate(self._ends):
                    g, whole = made[k], row[n]
                    if whole is not None:
                        mine = whole[begin:end]
                        made[k] = mine.clone() if g is None else g.add_(mine)
                part, rows = rows_of(matrix, begin, end), [[g] for g in made]
                del made, g
                if complete is not None:
                    complete([part], rows)
                yield from self._touched([part], rows)
                del rows  # before the next ones are made

    def _back(
        self,
        call: _Call,
        params: list[Tensor],
        pending: list[dict[int, Tensor]],
        rows: Rows,
        first: bool,
        last: bool,
    ) -> None:
        """Backward of one pass of a block for every objective that reaches it.

        Args:
            first: Whether gradients outside of the blocks are still to be found.
            last: Whether no block below has parameters, so that they alone are asked for more.
        """
        arrived = [[known.pop(id(leaf), None) for leaf in call.outputs] for known in pending]
        reaching = [k for k, some in enumerate(arrived) if any(g is not None for g in some)]
        down = first or not last
        if not reaching or not (params or (down and call.inputs)):
            return
        inputs, outputs = call.again()
        if not down:
            inputs = []
        for k in reaching:
            pairs = [(o, g) for o, g in zip(outputs, arrived[k], strict=True) if g is not None]
            roots, grads = zip(*pairs, strict=True)
            keep_graph = k != reaching[-1]
            found = self._gradients(roots, [*inputs, *params], grads, keep_graph)
            arrived[k] = []
            for n, g in enumerate(found[len(inputs) :]):
                if g is not None:
                    known = rows[k][n]
                    rows[k][n] = g if known is None else known + g
            if down:
                self._hand_down(call, k, found[: len(inputs)], pending[k], first)

    def _hand_down(
        self,
        call: _Call,
        objective: int,
        found: Sequence[Tensor | None],
        pending: dict[int, Tensor],
        first: bool,
    ) -> None:
        """Gradients at a block's inputs become those of what the inputs came from."""
        glued = []
        for tensor, g in zip(call.inputs, found, strict=True):
            if g is None:
                continue
            if id(tensor) in self._of:
                self._refuse_unless_earlier(tensor, call)
                self._add(pending, tensor, g)
            else:
                glued.append((tensor, g))
        if not glued or not (first or call.glued):
            return
        roots, grads = zip(*glued, strict=True)
        reached, ends = self._reached(roots, grads, True, outside=first)
        call.glued = call.glued or bool(reached)
        for leaf, g in reached:
            self._refuse_unless_earlier(leaf, call)
            self._add(pending, leaf, g)
        if first:
            self._end(objective, ends)

    def _refuse_unless_earlier(self, leaf: Tensor, call: _Call) -> None:
        if self._of[id(leaf)].number >= call.number:
            self._refuse_order()

    def _refuse_order(self) -> None:
        raise UsageError(
            "blocks must run once each and in their order, but in this model one is run again or "
            "out of order: choose another gradient_memory."
        )

    def _touched(self, params: list[Tensor], rows: Rows) -> Iterator[tuple[list[Tensor], Rows]]:
        some = [n for n in range(len(params)) if any(row[n] is not None for row in rows)]
        if some:
            found = [[row[n] for n in some] for row in rows]
            yield [params[n] for n in some], found
            for row in found:
                row.clear()  # before the next ones are made
