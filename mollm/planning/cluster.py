"""A training step on several GPUs and nodes, predicted: memory, FLOPs, bytes on links, time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mollm.errors import UsageError
from mollm.planning.flops import step_flops
from mollm.planning.hardware import COPIES, Cluster
from mollm.planning.memory import MemoryPlan, plan
from mollm.planning.proposals import Proposal, proposals
from mollm.planning.settings import PlanSettings
from mollm.planning.shapes import Shape
from mollm.planning.traffic import Collective, step_traffic

_MOST_NODES = 256


@dataclass(frozen=True)
class Prediction:
    """A step on a cluster, of one layout."""

    layout: str
    cluster: Cluster
    memory: MemoryPlan
    """Of one GPU."""
    flops: float
    """Of one GPU."""
    traffic: tuple[Collective, ...]

    @property
    def label(self) -> str:
        """The layout, and whether gradients are streamed."""
        return f"{self.layout}, streamed" if self.memory.settings.streams else self.layout

    @property
    def sent(self) -> float:
        """Bytes that a GPU sends."""
        return sum(each.sent for each in self.traffic)

    @property
    def left_node(self) -> float:
        """Bytes that leave a node."""
        return sum(each.left_node for each in self.traffic)

    @property
    def compute_seconds(self) -> float:
        """At the GPU's peak."""
        gpu, narrow = self.cluster.gpu, self.memory.settings.compute_dtype == "bfloat16"
        return self.flops / (1e12 * (gpu.tflops if narrow else gpu.tflops_float32))

    @property
    def link_seconds(self) -> float:
        """At the peak of the slower link of each collective."""
        link, network = 1e9 * self.cluster.gpu.link, 1e9 * self.cluster.network
        return sum(max(each.sent / link, each.left_node / network) for each in self.traffic)

    @property
    def seconds(self) -> float:
        """The least that a step takes: shards travel while others are computed, copies' sums when
        all is."""
        if self.layout == COPIES:
            return self.compute_seconds + self.link_seconds
        return max(self.compute_seconds, self.link_seconds)


def predict(shape: Shape, settings: PlanSettings, cluster: Cluster, layout: str) -> Prediction:
    """A step on a cluster.

    Args:
        shape: The model.
        settings: How each GPU trains: rows are those of one.
        cluster: Where.
        layout: One of LAYOUTS.

    Raises:
        UsageError: The settings do not go with shards.
    """
    own = replace(settings, shards=cluster.shards(layout))
    return Prediction(
        layout,
        cluster,
        plan(shape, own),
        step_flops(shape, own),
        tuple(step_traffic(shape, own, cluster, layout)),
    )


@dataclass(frozen=True)
class ClusterPlan:
    """The ways to share a step, and the one to take."""

    settings: PlanSettings
    cluster: Cluster
    memory: float
    """Bytes of a GPU."""
    predictions: Sequence[Prediction]
    refused: Sequence[str]
    """Of what does not go with the settings, why."""

    @cached_property
    def fits(self) -> bool:
        """Whether one of them does."""
        return any(made.memory.fits(self.memory) for made in self.predictions)

    @cached_property
    def chosen(self) -> Prediction:
        """The fastest that fits, else the one that takes least memory."""
        fitting = [made for made in self.predictions if made.memory.fits(self.memory)]
        if fitting:
            return min(fitting, key=lambda made: made.seconds)
        return min(self.predictions, key=lambda made: made.memory.peak.total)

    @cached_property
    def proposals(self) -> Sequence[Proposal]:
        """What would make the chosen one fit."""
        return [] if self.fits else proposals(self.chosen.memory, self.memory)

    @property
    def planned(self) -> MemoryPlan:
        """The chosen one with all that is proposed."""
        return self.proposals[-1].plan if self.proposals else self.chosen.memory

    @cached_property
    def nodes_that_fit(self) -> int | None:
        """How many of these nodes have room for the shards as they are; None where too many do
        not, one has, or the settings do not go with shards."""
        streams = self.settings.streams and not self.settings.freeze_embeddings
        if self.fits or streams or self.settings.quantization:
            return None
        shape, gpus = self.chosen.memory.shape, self.cluster.gpus
        return next(
            (
                nodes
                for nodes in range(self.cluster.nodes, _MOST_NODES + 1)
                if plan(shape, replace(self.settings, shards=gpus * nodes)).fits(self.memory)
            ),
            None,
        )


def plan_cluster(
    shape: Shape,
    settings: PlanSettings,
    cluster: Cluster,
    *,
    memory: float,
    layout: str | None = None,
) -> ClusterPlan:
    """Predicts a step of every layout, or of one.

    Args:
        shape: The model.
        settings: How each GPU trains.
        cluster: Where.
        memory: Bytes of a GPU.
        layout: One of `cluster.layouts`; None for all of them, with gradients as they are and,
            where that goes with the layout, streamed.

    Raises:
        UsageError: The layout is none of the cluster's, or does not go with the settings.
    """
    if layout is not None:
        if layout not in cluster.layouts:
            raise UsageError(
                f"fsdp must be one of {', '.join(cluster.layouts)} on {cluster.nodes} x "
                f"{cluster.gpus} GPUs, but got {layout!r}."
            )
        made = predict(shape, settings, cluster, layout)
        return ClusterPlan(settings, cluster, memory, [made], [])
    found, refused = [], []
    for each in cluster.layouts:
        try:
            found.append(predict(shape, settings, cluster, each))
        except UsageError as error:
            refused.append(f"{each}: {error}")
            continue
        streamed = found[-1].memory.settings.streamed
        if not settings.streams and streamed is not None:
            found.append(predict(shape, streamed, cluster, each))
    return ClusterPlan(settings, cluster, memory, found, refused)
