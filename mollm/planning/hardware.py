"""GPUs, nodes of them, and the ways to share a training step."""

from __future__ import annotations

from dataclasses import dataclass

from mollm.errors import UsageError

LAYOUTS = COPIES, FULL_SHARD, HYBRID_SHARD = ("copies", "full_shard", "hybrid_shard")
"""Every GPU holds the model, or a shard of it (FSDP2), or one of those that its node holds (HSDP).
Shards are named as `fsdp` of a run names them."""


@dataclass(frozen=True)
class Gpu:
    """Peak figures of its maker, without sparsity."""

    name: str
    memory: float
    """GiB that a program can take."""
    tflops: float
    """10¹² FLOP/s in bfloat16."""
    tflops_float32: float
    link: float
    """10⁹ bytes per second and direction to the other GPUs of the node."""
    network: float
    """10⁹ bytes per second and direction to other nodes, of one network card for each GPU."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 79, 312, 19.5, 300, 25),
        Gpu("h100", 79, 989, 67, 450, 50),
        Gpu("h200", 139, 989, 67, 450, 50),
        Gpu("b200", 178, 2250, 75, 900, 50),
    )
}
"""With NVLink, and network cards of 200 Gb/s (A100) or 400 Gb/s, as in DGX and HGX machines."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs.

    Raises:
        UsageError: A number is out of range.
    """

    gpus: int
    """Of a node."""
    nodes: int = 1
    gpu: Gpu = GPUS["h100"]

    def __post_init__(self) -> None:
        for name in ("gpus", "nodes"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, but got {getattr(self, name)}.")

    @property
    def world(self) -> int:
        """GPUs of all nodes."""
        return self.gpus * self.nodes

    @property
    def network(self) -> float:
        """10⁹ bytes per second that leave a node."""
        return self.gpu.network * self.gpus

    def shards(self, layout: str) -> int:
        """Over how many GPUs the layout cuts a model."""
        return {COPIES: 1, FULL_SHARD: self.world, HYBRID_SHARD: self.gpus}[layout]

    @property
    def layouts(self) -> tuple[str, ...]:
        """The ways to share a step that differ here."""
        if self.world == 1:
            return (COPIES,)
        return LAYOUTS if self.nodes > 1 and self.gpus > 1 else (COPIES, FULL_SHARD)
