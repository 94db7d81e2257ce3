"""MOLLMTrainer in two and in four processes against one, with copies and with parts."""

from __future__ import annotations

import json
import os

import launch
import pytest
import tiny
import torch
import training_processes
from torch import nn
from transformers import AutoModelForCausalLM

from mollm import MOLLMConfig
from mollm.data.files import sample_path
from mollm.distributed import processes
from mollm.errors import UsageError
from mollm.models import loading
from mollm.system import precision

pytest.importorskip("peft")

EVERYWHERE = [
    pytest.param(world, case, id=f"{world}-{'-'.join(case)}")
    for world in (2, 4)
    for case in training_processes.cases_for(world)
]


def only(*kinds):
    return pytest.mark.parametrize(
        ("world", "case"), [p for p in EVERYWHERE if p.values[1][0] in kinds]
    )


@pytest.fixture(scope="module", autouse=True)
def in_float32():
    with precision.computing_in("float32"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(folder):
    """The same case in one process, computed once."""
    known = {}

    def of(kind, key, layout="one"):
        case = (kind, layout, key)
        if case not in known:
            known[case] = training_processes.run_case(folder, case)
            assert "failed" not in known[case], known[case]["failed"]
        return known[case]

    return of


@pytest.fixture(scope="module")
def found(folder, alone):
    """What every process found; processes start once for each number of them."""
    runs = {}

    def at(world, case):
        if world not in runs:
            for kind, _, key in training_processes.cases_for(world):
                if kind == "resumed":
                    alone("left", key)
            runs[world] = training_processes.run(world, folder)
        each = [run.get(case, {"failed": "not reached"}) for run in runs[world]]
        for rank, mine in enumerate(each):
            assert "failed" not in mine, f"process {rank}: {mine['failed']}"
        return each

    return at


def close(a, b, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def assert_alike(each, one):
    """The weights, the record of every step and the evaluation, on all processes."""
    close(each[0]["weights"], one["weights"])
    for mine in each:
        assert len(mine["history"]) == len(one["history"])
        for a, b in zip(mine["history"], one["history"], strict=True):
            close(a["losses"], b["losses"])
            close(a["norms"], b["norms"], rtol=1e-7)
            close(a["weights"], b["weights"], rtol=1e-7)
            assert a["status"] == b["status"]
        for a, b in zip(mine["evaluated"], one["evaluated"], strict=True):
            close({k: a[k] for k in b}, b)


@only("train")
def test_a_run_equals_that_of_one_process(world, case, found, alone):
    one = alone("train", case[2])
    assert_alike(found(world, case), one)
    assert one["history"][-1]["losses"]["kl"] > 0  # it has gone somewhere


@only("read")
def test_the_first_process_alone_reads_a_model_in_parts(world, case, found, alone):
    each, one = found(world, case), alone("read", case[2])
    assert [mine["loaded"] for mine in each] == [1, *[0] * (world - 1)]
    close(each[0]["weights"], one["weights"], rtol=1e-4, atol=1e-4)
    for mine in each:
        for a, b in zip(mine["history"], one["history"], strict=True):
            close(a["losses"], b["losses"], rtol=1e-3, atol=1e-5)


@only("read_in_bfloat16")
def test_a_model_in_parts_is_read_where_the_processor_computes_in_bfloat16(
    world, case, found, alone
):
    each, one = found(world, case), alone("read_in_bfloat16", case[2])
    for a, b in zip(each[0]["history"], one["history"], strict=True):
        close(a["losses"], b["losses"], rtol=2e-2, atol=2e-3)


@only("resumed")
def test_a_run_of_one_process_goes_on_with_several(world, case, found, alone):
    assert_alike(found(world, case), alone("left", case[2]))


@only("continued")
def test_a_streamed_run_goes_on_bit_for_bit(world, case, found):
    for mine in found(world, case):
        whole, again = mine["whole"], mine["again"]
        close(again["weights"], whole["weights"], rtol=0, atol=0)
        assert len(again["history"]) == len(whole["history"]) == 3
        for a, b in zip(again["history"], whole["history"], strict=True):
            assert (a["losses"], a["norms"], a["weights"]) == (
                b["losses"],
                b["norms"],
                b["weights"],
            )


@only("left")
def test_a_run_of_several_processes_goes_on_with_one(world, case, found, alone, folder):
    _, layout, key = case
    several = found(world, case)
    made = training_processes.trainer(
        folder / f"again-{layout}-{key}",
        **(training_processes.OPTIONS[key] | training_processes.SAVING),
    )
    made.train(resume_from_checkpoint=str(folder / "-".join(case) / "checkpoint-2"))
    assert_alike(several, training_processes.found(made))


@only("exported")
def test_parts_are_exported_as_one_model(world, case, found, alone):
    first, *others = found(world, case)
    after, exported = first["after"], first["exported"]
    names = [name for name in after if name in exported]
    assert len(names) > 4
    assert all(torch.equal(after[name], exported[name]) for name in names)
    if case[2] == "lora":
        name = "model.layers.0.mlp.up_proj"
        base = after[f"{name}.base_layer.weight"]
        a, b = (after[f"{name}.lora_{x}.default.weight"] for x in "AB")
        close(exported[f"{name}.weight"], base + 8 / 4 * b @ a, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(exported["lm_head.weight"], after["model.embed_tokens.weight"])
    for mine in others:
        assert all(torch.equal(mine["exported"][name], exported[name]) for name in exported)


@only("stopped")
def test_what_one_process_asks_for_is_done_on_all(world, case, found):
    assert [mine["steps"] for mine in found(world, case)] == [2] * world


@only("mistaken")
def test_a_mistake_on_one_process_is_told_on_all(world, case, found):
    for mine in found(world, case):
        assert mine["error"].startswith("the retain data must hold at least one row")


@only("unlike")
def test_a_model_of_ones_own_is_refused_on_all(world, case, found):
    for mine in found(world, case):
        assert mine["error"] == "all processes must be given the same model, but they were not."


@only("in_bfloat16")
def test_parts_compute_in_bfloat16_and_step_in_float32(world, case, found, alone):
    one = alone("in_bfloat16", case[2])
    for mine in found(world, case):
        assert mine["dtypes"] == {"torch.float32"}
        for a, b in zip(mine["history"], one["history"], strict=True):
            close(a["losses"], b["losses"], rtol=2e-2, atol=2e-3)
    changed = {
        n
        for n, w in one["weights"].items()
        if not torch.equal(w, found(world, case)[0]["weights"][n])
    }
    assert changed


# ---- the command


def torchrun(*arguments):
    """Runs `mollm unlearn` in two processes; what they print, or did until they hung at the end."""
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    out, err, _ = launch.python(*command, "-m", "mollm", "unlearn", *arguments, seconds=120)
    return out, err


def in_two(*arguments):
    """The same without torchrun."""
    words = ("-m", "mollm", "unlearn", *arguments)
    out, err, _ = launch.script(*words, world=2, seconds=60)
    return out, err


def test_the_command_in_two_processes(tmp_path):
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    settings = [
        *("--model", str(tmp_path / "tiny"), "--out", str(tmp_path / "out"), "--device", "cpu"),
        *("--forget", str(sample_path("authors-forget.jsonl")), "--lora", "4"),
        *("--retain", str(sample_path("authors-retain.jsonl")), "--max-length", "400"),
        *("--max-steps", "3", "--per-device-train-batch-size", "2", "--learning-rate", "1e-3"),
        *("--reference", "cache", "--set", "fsdp=full_shard", "--set", "save_steps=2"),
    ]
    out, err = torchrun(*settings)
    assert out.count("3 steps") == out.count("Next: mollm evaluate") == 1, err
    assert {path.name for path in (tmp_path / "out").iterdir() if path.name[:9] != "reference"} == {
        "README.md",
        "checkpoint-2",
        "checkpoint-3",
        "history.jsonl",
        "model",
        "report.html",
        "run.json",
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `processes` | `2` |" in card
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    out, err = in_two(*settings)
    assert err.count("mollm: out must be a new or empty folder") == 1
    assert out == ""


def test_copies_ask_and_stop_together(tmp_path):
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    out, err = in_two(
        *("--model", str(tmp_path / "tiny"), "--out", str(tmp_path / "out"), "--device", "cpu"),
        *("--forget", str(sample_path("authors-forget.jsonl"))),
        *("--retain", str(sample_path("authors-retain.jsonl")), "--max-length", "400"),
        *("--max-steps", "6", "--per-device-train-batch-size", "2", "--learning-rate", "1e-3"),
        *("--set", "stop_when={forget_probability: 0.5, steps: 2}", "--set", "sample_replies=1"),
    )
    assert out.count("stop_when: stopped after step 2") == 1, err
    assert out.count("What carries the loss") == 1
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["steps"] == run["processes"] == len(run["replies"]) == 2


# ---- in one process


def test_alone_there_is_nobody_to_ask():
    assert processes.rank() == 0
    assert processes.all_gather("a") == ["a"]
    assert list(processes.shares("ab")) == [("a", True), ("b", True)]
    p = nn.Parameter(torch.ones(2))
    assert processes.placed(p, p) is p
    processes.add_up_gradients([p])
    assert p.grad is None
    tree = {"a": [p, (1, "b")]}
    assert processes.gathered(tree) == tree
    with processes.on_rank_zero(open(os.devnull)) as file:
        assert file is not None
    with pytest.raises(UsageError, match="mine"), processes.raise_on_all_ranks():
        raise UsageError("mine")


def test_what_cannot_be_cut_is_refused(tmp_path, monkeypatch):
    def refused(match, **options):
        with pytest.raises(UsageError, match=match):
            MOLLMConfig(output_dir=str(tmp_path), use_cpu=True, **options)

    refused("fsdp must be left out of a run of one process", fsdp=True)
    refused("fsdp must be one of full_shard, hybrid_shard", fsdp="offload")
    refused("fsdp_config must be left out", fsdp=True, fsdp_config={"version": 1})
    refused("deepspeed must be left out", deepspeed={"zero_optimization": {"stage": 3}})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refused("accelerate must launch processes of type MULTI_GPU")
