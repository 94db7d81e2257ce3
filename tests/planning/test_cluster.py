"""A step on several GPUs: memory, FLOPs, time, and the lines that start it."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from mollm import MOLLMConfig
from mollm.cli import main
from mollm.commands.settings_file import read_settings
from mollm.data.chat import Batch
from mollm.errors import UsageError
from mollm.models import forward
from mollm.models.adapters import adapted
from mollm.optim.optimizer import MOLLMOptimizer
from mollm.planning.cluster import plan_cluster, predict
from mollm.planning.flops import step_flops
from mollm.planning.hardware import GPUS, Cluster
from mollm.planning.memory import plan
from mollm.planning.settings import PlanSettings
from mollm.planning.shapes import shape_named, shape_of
from mollm.system import precision
from mollm.system.units import GIB
from mollm.training.objectives import Objectives
from mollm.training.reference_model import AdapterReference, CopyReference
from mollm.training.step import accumulate

ON_CPU = PlanSettings(sequence_length=128, compute_dtype="float32", device="cpu")
SMALL = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "tie_word_embeddings": False,
}
LLAMA = PlanSettings(dtype="bfloat16", freeze_embeddings=True)


# ---- memory


@pytest.mark.parametrize("name", ["llama-3-8b", "llama-3.1-405b"])
def test_shards_hold_their_share_of_what_lasts(name):
    shape = shape_named(name)
    one, eight = plan(shape, LLAMA), plan(shape, replace(LLAMA, shards=8))
    for part in ("parameters", "reference model", "optimizer state", "gradients held"):
        assert eight.component(part) == pytest.approx(one.component(part) / 8, rel=1e-6)
    assert one.component("gathered") == 0
    whole = 2 * (2 * shape.embedding + shape.hidden) + 3 * shape.largest_layer
    assert eight.component("gathered") == 2 * whole


def test_a_cached_head_is_not_cut():
    cached = PlanSettings(reference="cache", shards=8)
    shape = shape_named("llama-3-8b")
    assert plan(shape, cached).component("reference model") == 4 * shape.embedding


def test_more_shards_never_take_more():
    shape = shape_named("llama-3-70b")
    peaks = [plan(shape, replace(LLAMA, shards=n)).peak.total for n in (2, 4, 8, 32, 256)]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient_memory": "streamed"}, "freeze_embeddings must be True .* 'streamed' in shards"),
        ({"lora_rank": 8, "quantization": "nf4"}, "shards must be 1 with nf4"),
    ],
)
def test_what_does_not_go_with_shards_is_refused(options, words):
    with pytest.raises(UsageError, match=words):
        PlanSettings(shards=2, **options)


# ---- shapes


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [
        ("llama-3-70b", 70_553_706_496, 68_451_041_280),
        ("llama-3.1-405b", 405_853_388_800, 401_646_551_040),
        ("mixtral-8x7b", 46_702_792_704, 12_617_515_008),
    ],
)
def test_named_shapes_have_the_published_numbers_of_parameters(name, parameters, active):
    shape = shape_named(name)
    assert (shape.parameters, shape.active) == (parameters, active)


# ---- FLOPs


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(ON_CPU, id="full"),
        pytest.param(replace(ON_CPU, freeze_embeddings=True), id="frozen embeddings"),
        pytest.param(replace(ON_CPU, gradient_checkpointing=True), id="checkpointed"),
        pytest.param(replace(ON_CPU, lora_rank=8, reference="adapter"), id="lora"),
    ],
)
def test_the_flops_are_those_that_torch_counts(settings):
    ids = torch.randint(3, SMALL["vocab_size"], (settings.batch_size, settings.sequence_length))
    batch = Batch(ids, torch.ones_like(ids), ids)
    with precision.computing_in("float32"):
        model = tiny.model(**SMALL).train(settings.gradient_checkpointing)
        model.set_attn_implementation("eager")  # of which Torch counts the products
        if settings.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if settings.lora_rank:
            peft = pytest.importorskip("peft")
            options = {"r": settings.lora_rank, "target_modules": "all-linear"}
            reference = AdapterReference(adapted(model, peft.LoraConfig(**options)))
        else:
            reference = CopyReference(model)
        if settings.freeze_embeddings:
            forward.freeze_embeddings(model)
        optimizer = MOLLMOptimizer([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        with FlopCounterMode(display=False) as counter:
            accumulate(Objectives(model, reference), optimizer, batch, batch)
    predicted = step_flops(shape_of(tiny.model(**SMALL).config, "small"), settings)
    print(f"{predicted / counter.get_total_flops() - 1:+.1%}")
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.1)


# ---- links and time


def test_a_ring_sends_what_it_is_known_to_send():
    shape, cluster = shape_named("llama-3-8b"), Cluster(8, 4)
    copies, shards, hybrid = (predict(shape, LLAMA, cluster, layout) for layout in cluster.layouts)
    gradients = 3 * 2 * copies.memory.trainable
    assert copies.sent == copies.left_node == pytest.approx(2 * 31 / 32 * gradients)
    assert [each.kind for each in hybrid.traffic] == ["all-gather", "reduce-scatter", "all-reduce"]
    across = hybrid.traffic[2]
    assert across.size == pytest.approx(hybrid.traffic[1].size / 8)
    assert hybrid.left_node == pytest.approx(8 * 2 * 3 / 4 * across.size)
    assert shards.left_node == shards.sent
    assert predict(shape, LLAMA, Cluster(1), "copies").traffic == ()


def test_time_follows_the_figures_of_the_hardware():
    shape = shape_named("llama-3-8b")
    slow = Cluster(8, 4, replace(GPUS["h100"], network=5))
    fast = Cluster(8, 4)
    for layout in fast.layouts:
        a, b = (predict(shape, LLAMA, cluster, layout) for cluster in (slow, fast))
        assert a.compute_seconds == b.compute_seconds == a.flops / 989e12
        assert a.link_seconds > 5 * b.link_seconds
        assert a.seconds >= max(a.compute_seconds, a.link_seconds)
    alone = predict(shape, LLAMA, Cluster(8), "copies")
    assert alone.link_seconds == pytest.approx(alone.sent / 450e9)
    assert alone.left_node == 0


def test_the_fastest_of_those_that_fit_is_chosen():
    shape, cluster = shape_named("llama-3-8b"), Cluster(8, 4)
    found = plan_cluster(shape, LLAMA, cluster, memory=79 * GIB)
    fitting = [made for made in found.predictions if made.memory.fits(79 * GIB)]
    assert found.fits
    assert found.chosen.seconds == min(made.seconds for made in fitting)
    assert found.proposals == []
    assert found.nodes_that_fit is None


def test_where_nothing_fits_the_nodes_are_counted():
    shape = shape_named("llama-3.1-405b")
    settings = replace(LLAMA, gradient_checkpointing=True)
    found = plan_cluster(shape, settings, Cluster(8, 2), memory=79 * GIB)
    assert not found.fits
    nodes = found.nodes_that_fit
    assert plan(shape, replace(settings, shards=8 * nodes)).fits(79 * GIB)
    assert not plan(shape, replace(settings, shards=8 * (nodes - 1))).fits(79 * GIB)
    assert found.proposals
    assert all(each.plan.settings.shards == 16 for each in found.proposals)


# ---- the command

PLAN = ["plan", "--gpus", "8", "--nodes", "4", "--shape", "llama-3-70b"]


def test_simulated_relearning_is_planned_without_streamed_gradients(capsys):
    for options in ("--gpus 8", "--device-memory 6"):
        command = f"plan --shape llama-3.2-1b --relearn-steps 2 {options}"
        assert main(command.split()) in (0, 1)
        assert "streamed" not in capsys.readouterr().out


def test_the_command_predicts_a_cluster_and_says_so(capsys):
    assert main(PLAN) == 1
    text = capsys.readouterr().out
    assert "70,553,706,496 parameters" in text
    assert "Predicted, not measured" in text
    for layout in ("copies", "copies, streamed", "full_shard", "hybrid_shard"):
        assert re.search(rf"^{layout} .* no ", text, re.MULTILINE)
    assert "With these it fits" in text
    assert max(map(len, text.splitlines())) <= 80
    assert main([*PLAN, "--gradient-checkpointing", "--dtype", "bfloat16"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^full_shard fits: its peak is ", text, re.MULTILINE)


def test_the_command_gives_json(capsys):
    assert main([*PLAN, "--gpu", "b200", "--network", "100", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["predicted"] is True
    assert told["cluster"]["gpu"]["network"] == 100
    assert len(told["layouts"]) == 4
    chosen = next(each for each in told["layouts"] if each["layout"] == told["chosen"])
    assert chosen["fits"]
    assert chosen["peak"]["bytes"] <= told["memory"] == 178 * GIB
    assert chosen["least_step_seconds"] > 0


@pytest.mark.parametrize(
    "options",
    [
        ["--gradient-checkpointing"],
        ["--fsdp", "hybrid_shard", "--optimizer", "sgd", "--freeze-embeddings"],
        ["--lora", "16", "--reference", "adapter", "--fsdp", "copies"],
        ["--lora", "16", "--reference", "cache", "--metric", "euclidean", "--fsdp", "full_shard"],
    ],
)
def test_what_is_printed_starts_a_run(options, tmp_path, capsys, monkeypatch):
    from torch.distributed.run import get_args_parser

    main([*PLAN, *options, "--json"])
    told = json.loads(capsys.readouterr().out)
    script = tmp_path / "mollm.sbatch"
    script.write_text(told["slurm"])
    subprocess.run(["bash", "-n", script], check=True)
    for text in (told["torchrun"], told["slurm"]):
        line = text[text.index("torchrun") :].replace("\\\n", " ").split()
        parsed = get_args_parser().parse_args(line[1:])
        assert parsed.nnodes == "4"
        assert parsed.nproc_per_node == "8"
        assert parsed.module
        assert parsed.training_script == "mollm"
        assert parsed.training_script_args[:3] == ["unlearn", "--config", "run.yaml"]
    (tmp_path / "run.yaml").write_text(told["run"])
    settings = read_settings({"config": tmp_path / "run.yaml"})
    assert settings.pop("fsdp", "copies") == told["chosen"]
    settings.pop("lora", None)
    MOLLMConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nodes", "2"], "nodes must be left out of a plan for one device, but got 2"),
        (["--gpus", "0"], "gpus must be at least 1, but got 0"),
        (["--gpus", "8", "--nodes", "0"], "nodes must be at least 1, but got 0"),
        (["--gpus", "8", "--network", "0"], "network must be positive, but got 0.0"),
        (["--gpus", "8", "--device", "cpu"], "device must be cuda with --gpus, but got cpu"),
        (
            ["--gpus", "8", "--fsdp", "hybrid_shard"],
            "fsdp must be one of copies, full_shard on 1 x 8 GPUs, but got 'hybrid_shard'",
        ),
        (
            ["--gpus", "8", "--fsdp", "full_shard", "--gradient-memory", "streamed"],
            "freeze_embeddings must be True with gradient_memory 'streamed' in shards",
        ),
    ],
)
def test_mistakes_are_told_in_one_sentence(options, words, capsys):
    assert main(["plan", "--shape", "llama-3-8b", *options]) == 2
    assert words in capsys.readouterr().err


def test_streamed_gradients_say_why_shards_are_left_out(capsys):
    main(["plan", "--shape", "llama-3-8b", "--gpus", "8", "--gradient-memory", "streamed"])
    assert "full_shard: freeze_embeddings must be True with" in capsys.readouterr().out
    main(["plan", "--shape", "llama-3-8b", "--gpus", "8", "--freeze-embeddings"])
    assert re.search(r"^full_shard, streamed .* fits ", capsys.readouterr().out, re.MULTILINE)


def test_one_gpu_has_nothing_to_share(capsys):
    main(["plan", "--shape", "llama-3.2-1b", "--gpus", "1"])
    text = capsys.readouterr().out
    assert "full_shard" not in text
    assert "--standalone --nproc-per-node 1" in text
