"""The bytes that GPUs send each other in a training step.

Per micro-batch of forget and retain rows, with P parameters in layers, E outside of them, P' and E'
of these trainable, and o = 1 where the original is a copy or the model without its adapter, else 0:

    all-gather       (5 + o) P + o (the largest layer) + 5 (E + E of a copied original)
    reduce-scatter   3 (P' + E')
    all-reduce       with hybrid_shard: of each shard of what was reduced, over the nodes

in the dtype of matrix products, and gradients in float32 where that is bfloat16. Five, because
the forget side gathers a layer twice and the retain side, with two backwards, three times. After
the first layer of the KL term's backward, FSDP2 prefetches the layer that ran before it: one of the
original's, for nothing. Simulated relearning gathers twice and reduces once more a step of it, and
so does each further set, which counts as one to forget.

With streamed gradients each forward gathers a layer once and a sweep five times, and what a sweep
goes over it reduces; the second one leaves out one layer. The forget loss and KL prefetch a layer
each, for nothing.

Copies all-reduce K (P' + E') once a step, and with streamed gradients K P' of all layers but one
once more, in the second sweep if there is one, and K E' of embeddings and head in slices. A few
hundred bytes of sums of the step come on top, and in the first two steps what checks that copies
agree.

Collectives are rings: of S bytes over n GPUs each sends (n - 1) / n S, and twice that where it
reduces for all. A ring over nodes leaves each node once, with as many bytes.

Gloo processes were counted, in their sockets and in the calls: tests/planning/test_traffic.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mollm.planning.hardware import COPIES, FULL_SHARD, HYBRID_SHARD, Cluster
from mollm.planning.memory import ends, matrices_in_slices, trainable
from mollm.planning.settings import PlanSettings
from mollm.planning.shapes import Shape


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a step."""

    kind: str
    """all-gather, reduce-scatter or all-reduce."""
    size: int
    """Bytes of the tensors, whole on the side where they are."""
    members: int
    """GPUs that take part in one."""
    across_nodes: bool
    rings: int
    """Of a node, of those that leave it."""

    @property
    def sent(self) -> float:
        """Bytes that a GPU sends."""
        times = 2 if self.kind == "all-reduce" else 1
        return times * self.size * (self.members - 1) / self.members

    @property
    def left_node(self) -> float:
        """Bytes that leave a node."""
        return self.rings * self.sent if self.across_nodes else 0.0


def step_traffic(
    shape: Shape, settings: PlanSettings, cluster: Cluster, layout: str
) -> Iterator[Collective]:
    """What the GPUs of a cluster send each other in a step; the formulas are the module's."""
    if cluster.world == 1:
        return
    if layout == COPIES:
        size = _of_copies(shape, settings)
        yield Collective("all-reduce", size, cluster.world, cluster.nodes > 1, 1)
        return
    shards = cluster.shards(layout)
    across = cluster.nodes > 1 and layout == FULL_SHARD
    reduced = _reduced(shape, settings) * settings.reduced_bytes
    if shards > 1:
        gathered = _gathered(shape, settings) * settings.gathered.weight_bytes
        yield Collective("all-gather", gathered, shards, across, 1)
        yield Collective("reduce-scatter", reduced, shards, across, 1)
    if layout == HYBRID_SHARD and cluster.nodes > 1:
        yield Collective("all-reduce", -(-reduced // shards), cluster.nodes, True, cluster.gpus)


def _gathered(shape: Shape, settings: PlanSettings) -> int:
    """Parameters that are gathered in a step."""
    adapter = settings.lora_rank * shape.sides
    layers = shape.layers + adapter
    further = settings.further_sets + settings.relearning_passes
    first, copied = settings.reference != "cache", settings.reference == "copy"
    passes = 5 + 2 * further
    original = first * (shape.layers + (0 if copied else adapter))
    prefetched = first * (shape.largest_layer + adapter // shape.num_layers)
    outside = passes * ends(shape) * (1 + copied)
    inside = passes * layers
    if settings.streams:
        inside = (2 + further) * layers + passes * _swept(shape, settings)
        prefetched = (2 + further) * shape.largest_layer
    return settings.accumulation * (inside + original + prefetched + outside)


def _swept(shape: Shape, settings: PlanSettings) -> int:
    """Parameters of the layers that the sweeps of a streamed step go over."""
    return settings.sweeps * shape.layers - (settings.sweeps - 1) * shape.largest_layer


def _reduced(shape: Shape, settings: PlanSettings) -> int:
    """Parameters whose gradients are added up in a step of shards."""
    backwards = settings.objectives + settings.relearning_passes
    reduced = trainable(shape, settings)
    if settings.streams:
        reduced += _swept(shape, settings) - shape.layers
    return settings.accumulation * backwards * reduced


def _of_copies(shape: Shape, settings: PlanSettings) -> int:
    """Bytes of the gradients that copies add up."""
    everything = trainable(shape, settings)
    again = matrices_in_slices(shape, settings)
    if settings.streams:
        again += _swept(shape, settings) - shape.layers
    sums = settings.objectives * (everything + again)
    return (sums + settings.relearn_steps * everything) * settings.gradient_bytes
