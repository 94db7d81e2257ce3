"""Two and four processes against one, with copies, with shards and with both."""

from __future__ import annotations

import processes
import pytest
import torch
from torch import nn

from mollm import MOLLMOptimizer
from mollm.distributed.sharding import (
    Sharding,
    answer_tokens,
    by_sharding,
    expect_backward,
    local,
    sharding_of,
)

EVERYWHERE = [
    pytest.param(world, case, layout, id=f"{world}-{layout}-{case}")
    for world in (2, 4)
    for case, layout in processes.cases_for(world)
]


def only(*cases):
    return pytest.mark.parametrize(
        ("world", "case", "layout"), [p for p in EVERYWHERE if p.values[1] in cases]
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every process found; processes start once for each number of them."""
    runs = {}

    def at(world, case, layout):
        if world not in runs:
            runs[world] = processes.run(world, tmp_path_factory.mktemp(f"processes{world}"))
        each = [run.get((case, layout), {"failed": "not reached"}) for run in runs[world]]
        for rank, mine in enumerate(each):
            assert "failed" not in mine, f"process {rank}: {mine['failed']}"
        return each

    return at


@pytest.fixture(scope="module")
def alone():
    """The same case in one process, computed once."""
    known = {}

    def of(case):
        if case not in known:
            known[case] = processes.result(case, "one")
            assert "failed" not in known[case], known[case]["failed"]
        return known[case]

    return of


def close(a, b, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@only(*processes.OPTIONS)
def test_processes_equal_one(world, case, layout, found, alone):
    each, one = found(world, case, layout), alone(case)
    for mine in each:
        close(mine["weights"], one["weights"])
        close(mine["gram"], one["gram"])
        close(mine["changes"], one["changes"], rtol=1e-7)
        assert torch.equal(mine["gram"], each[0]["gram"])


@only("in_single_precision")
def test_processes_equal_one_in_single_precision(world, case, layout, found, alone):
    for mine in found(world, case, layout):
        close(mine["weights"], alone(case)["weights"], rtol=1e-4, atol=1e-5)


@only("clipped")
def test_the_direction_is_clipped_as_in_one_process(world, case, layout, found, alone):
    for mine in found(world, case, layout):
        assert float(mine["norm"]) > 0.1
        close(mine["norm"], alone(case)["norm"])
        close(mine["weights"], alone(case)["weights"])
        close(mine["changes"], alone(case)["changes"], rtol=1e-7)


@only("accumulated", "accumulated_unsharded", "unused_parameters")
def test_other_ways_to_run_the_backwards_equal_one_process(world, case, layout, found, alone):
    for mine in found(world, case, layout):
        close(mine["weights"], alone(case)["weights"])


@only("not_finite_here")
def test_nobody_steps_where_one_gradient_is_not_finite(world, case, layout, found):
    for mine in found(world, case, layout):
        assert all(map(torch.equal, mine["before"], mine["after"]))
        assert mine["skipped"] == 1
        assert mine["status"] == "SOLVED"
        assert all(w.isfinite().all() for w in mine["weights"])
        assert not torch.equal(mine["weights"][0], mine["after"][0])


@only("resumed", "resumed_means")
def test_a_run_goes_on_from_a_distributed_checkpoint(world, case, layout, found):
    for mine in found(world, case, layout):
        # A new DistributedDataParallel adds the processes' gradients up in another order at first.
        close(mine["resumed"], mine["weights"], rtol=1e-13, atol=1e-14)


@only("traffic")
def test_a_step_sums_the_upper_triangle_and_the_changes(world, case, layout, found):
    once = [(6, torch.float64), (3, torch.float64)]  # K = 3
    # On the mesh of HSDP, once over the parts and once over their copies.
    expected = {"ddp": [], "fsdp": once, "hsdp": [once[0], once[0], once[1], once[1]]}[layout]
    for mine in found(world, case, layout):
        assert mine["sent"] == expected


@only("not_averaged")
def test_gradients_that_were_not_averaged_are_refused(world, case, layout, found):
    for mine in found(world, case, layout):
        assert mine["error"].startswith(
            f"the gradient of kl, retain must be the same on all {world} processes"
        )


@only("views_of_buckets")
def test_gradients_that_overwrite_each_other_are_refused(world, case, layout, found):
    for mine in found(world, case, layout):
        assert "gradient_as_bucket_view=False" in mine["error"]


@only("rounded_at_random")
def test_copies_round_alike_at_random(world, case, layout, found):
    each = found(world, case, layout)
    for mine in each:
        assert all(map(torch.equal, mine["weights"], each[0]["weights"]))


@only("tokens")
def test_the_mean_over_tokens_that_lie_unevenly(world, case, layout, found, alone):
    for mine in found(world, case, layout):
        assert mine["normalizer"] == 6 / world
        close(mine["weights"], alone(case)["weights"])


# ---- in one process


@pytest.mark.parametrize("mark", ["ds_id", "ds_tensor", "_is_flat_param"])
def test_partitioned_parameters_are_refused(mark):
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    setattr(q, mark, True)
    holder = "FullyShardedDataParallel" if mark == "_is_flat_param" else "DeepSpeed ZeRO"
    with pytest.raises(TypeError, match=f"parameter 1 is partitioned by {holder}: shard"):
        MOLLMOptimizer([p, q])
    opt = MOLLMOptimizer([p])
    with pytest.raises(TypeError, match=f"parameter 1 is partitioned by {holder}"):
        opt.add_param_group({"params": [q]})


def test_without_processes_nothing_changes():
    model, loss = nn.Linear(2, 2), torch.ones(())
    assert expect_backward(model, loss) is loss
    assert local(model.weight) is model.weight
    assert sharding_of(model.weight) == Sharding()
    assert answer_tokens(torch.tensor([[-100, 3], [4, -100]])) == 2
    params, gram = list(model.parameters()), torch.eye(2)
    ((sharding, some, lists),) = by_sharding(params, [[None, params[1]], params])
    assert (some, lists) == (params, [[None, params[1]], params])
    assert sharding.part == 0
    assert sharding.total_gram(gram) is gram


def test_a_step_at_learning_rate_0_makes_the_state_alone():
    p = nn.Parameter(torch.ones(2))
    opt = MOLLMOptimizer([p], lr=0.0, weight_decay=0.1)
    opt.step()
    assert set(opt.state[p]) == {"step", "exp_avg_sq"}
    assert opt.state[p]["step"] == 0
    assert torch.equal(p.detach(), torch.ones(2))
    opt.param_groups[0]["lr"] = 0.1
    with pytest.raises(RuntimeError, match="'forget' has no gradient"):
        opt.step()
