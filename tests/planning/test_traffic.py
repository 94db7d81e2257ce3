"""The bytes of a step against those that gloo processes send, in calls and on the wire."""

from __future__ import annotations

import sys

import counted_traffic
import pytest

from mollm.planning.cluster import predict
from mollm.planning.hardware import Cluster
from mollm.planning.shapes import shape_of

pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's tcp_info")

LAYOUTS = {"copies": "copies", "fsdp": "full_shard", "hsdp": "hybrid_shard"}
CASES = {
    2: [
        ("copies", "adamw", "float32"),
        ("copies", "streamed", "float32"),
        ("copies", "streamed by blocks", "float32"),
        ("copies", "relearning", "float32"),
        ("fsdp", "adamw", "float32"),
        ("fsdp", "adamw", "bfloat16"),
        ("fsdp", "head trains", "float32"),
        ("fsdp", "tied head", "float32"),
        ("fsdp", "checkpointed", "float32"),
        ("fsdp", "in micro-batches", "float32"),
        ("fsdp", "relearning", "float32"),
        ("fsdp", "lora", "float32"),
        ("fsdp", "streamed body", "float32"),
        ("fsdp", "streamed by blocks", "float32"),
        ("fsdp", "streamed body", "bfloat16"),
    ],
    4: [
        ("copies", "adamw", "float32"),
        ("fsdp", "adamw", "float32"),
        ("hsdp", "adamw", "float32"),
        ("hsdp", "relearning", "bfloat16"),
        ("hsdp", "streamed body", "float32"),
    ],
    8: [("copies", "adamw", "float32"), ("fsdp", "adamw", "float32")],
}
EVERY = [
    pytest.param(world, case, id=f"{world}-{'-'.join(case)}", marks=marks)
    for world, marks in ((2, ()), (4, ()), (8, pytest.mark.soak))
    for case in CASES[world]
]


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    known = {}

    def of(world, case):
        if world not in known:
            known[world] = counted_traffic.run(world, tmp_path_factory.mktemp("n"), CASES[world])
        each = [run.get(case, {"failed": "not reached"}) for run in known[world]]
        for mine in each:
            assert "failed" not in mine, mine["failed"]
        return each

    return of


def prediction(world, case, settings):
    layout, key, _ = case
    tied = counted_traffic.training_processes.OPTIONS[key].get("tied", False)
    shape = shape_of(counted_traffic.config(tied), "small")
    cluster = Cluster(2, 2) if world == 4 else Cluster(world)
    return predict(shape, settings, cluster, LAYOUTS[layout])


@pytest.mark.parametrize(("world", "case"), EVERY)
def test_the_bytes_of_every_kind_are_those_of_the_calls(world, case, counted):
    for mine in counted(world, case):
        predicted = {c.kind: c.size for c in prediction(world, case, mine["settings"]).traffic}
        calls = {kind: size for kind, size in mine["calls"].items() if size > 10_000}
        assert predicted == pytest.approx(calls, rel=0.02)


@pytest.mark.parametrize(("world", "case"), EVERY)
def test_the_bytes_that_a_process_sends_are_those_of_its_sockets(world, case, counted):
    each = counted(world, case)
    traffic = prediction(world, case, each[0]["settings"]).traffic
    # Gloo scatters what it has reduced for all.
    expected = sum(c.sent * (2 if c.kind == "reduce-scatter" else 1) for c in traffic)
    mean = sum(mine["sent"] for mine in each) / world
    print(f"predicted {expected:,.0f}, sent {mean:,.0f}: {expected / mean - 1:+.2%}")
    assert expected == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize(("world", "case"), EVERY)
def test_what_a_process_holds_throughout_is_what_is_planned(world, case, counted):
    for mine in counted(world, case):
        memory = prediction(world, case, mine["settings"]).memory
        planned = {name: memory.component(name) for name in mine["held"]}
        assert planned == pytest.approx(mine["held"], rel=0.01)
