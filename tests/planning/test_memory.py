import argparse
import json
import shlex
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
import zoo
from allocated import peak_of
from plain_loop import descend

from mollm import find_blocks
from mollm.cli import main
from mollm.commands import plan as plan_command
from mollm.data.chat import Batch
from mollm.errors import UsageError
from mollm.models import forward, loading
from mollm.models.adapters import adapted
from mollm.models.trainable import train_only
from mollm.optim.optimizer import MOLLMOptimizer
from mollm.planning import memory as planning
from mollm.planning.memory import plan
from mollm.planning.proposals import proposals
from mollm.planning.run import plan_line
from mollm.planning.settings import OPTIONS, PlanSettings
from mollm.planning.shapes import shape_named, shape_of
from mollm.system import precision
from mollm.system.units import GIB
from mollm.training.config import MOLLMConfig
from mollm.training.objectives import Objectives
from mollm.training.reference_model import AdapterReference, CopyReference
from mollm.training.step import accumulate
from mollm_ops import _chunks
from mollm_ops._loss_arguments import Head
from mollm_ops.operands import IDENTITY

BATCH, LENGTH = 4, 128
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
ON_CPU = PlanSettings(
    batch_size=BATCH, sequence_length=LENGTH, compute_dtype="float32", device="cpu"
)
NARROW = replace(ON_CPU, dtype="bfloat16", compute_dtype="bfloat16")
STREAMED = replace(ON_CPU, gradient_memory="streamed")
CAST = replace(ON_CPU, compute_dtype="bfloat16")


class Accumulating(MOLLMOptimizer):
    """Goes on after `zero_grad` and `step` as if they had not been called, while `more` is set."""

    more = False

    def zero_grad(self, set_to_none=True):
        pass

    def step(self, closure=None):
        if not self.more:
            super().step()
            super().zero_grad()


def random_batch(rows, vocab):
    ids = torch.randint(3, vocab, (rows, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return Batch(ids, mask, ids.masked_fill(mask == 0, -100))


def made(settings, sizes, kind=None):
    """Model, reference and what trains."""
    model = tiny.model(**sizes) if kind is None else zoo.model(kind, **sizes)
    model = model.to(getattr(torch, settings.dtype))
    if settings.quantization:
        model = in_four_bits(model)
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    if settings.lora_rank:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=settings.lora_rank, target_modules="all-linear")
        wrapped = adapted(model, config).train(settings.gradient_checkpointing)
        return model, AdapterReference(wrapped), [p for p in model.parameters() if p.requires_grad]
    reference = CopyReference(model)
    if settings.freeze_embeddings:
        forward.freeze_embeddings(model)
    if settings.trainable_parameters:
        train_only(model, settings.trainable_parameters)
    return model, reference, [p for p in model.parameters() if p.requires_grad]


def in_four_bits(model):
    pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
    with tempfile.TemporaryDirectory() as folder:
        loading.save(model, tiny.tokenizer(), Path(folder))
        quantized, _ = loading.load(
            loading.find_model(folder), torch.device("cpu"), model.dtype, "nf4"
        )
    return quantized


def scales_of(model):
    """Of matrices in 4 bits."""
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.state2.absmax)


def bytes_of(tensors):
    return sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in tensors}.values())


def measured(settings, sizes, kind=None):
    """Peak bytes of the second step, what lasts included, and the shape of its model."""
    with precision.computing_in(settings.compute_dtype):
        return _measured(settings, sizes, kind)


def _measured(settings, sizes, kind):
    model, reference, params = made(settings, sizes, kind)
    if settings.state_dtype == "8bit":
        pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
    options = {"state_dtype": settings.state_dtype, "gram": settings.gram}
    if settings.optimizer == "adamw":
        options["betas"] = 0.9, settings.adam_beta2
    optimizer = Accumulating(
        params,
        lr=1e-5,
        base=settings.optimizer,
        gradient_memory=settings.gradient_memory,
        momentum=settings.momentum,
        metric=settings.metric,
        **options,
    )
    rows = settings.batch_size, settings.of_retain_batch.batch_size
    batches = [random_batch(count, sizes["vocab_size"]) for count in rows]
    blocks = find_blocks(model) if settings.streams else ()

    def streamed():
        for _ in range(settings.accumulation):
            accumulate(Objectives(model, reference), optimizer, *batches, blocks=blocks)
        MOLLMOptimizer.step(optimizer)

    def step():
        if settings.streams:
            return streamed()
        for n in range(settings.accumulation):
            optimizer.more = n + 1 < settings.accumulation
            descend(model, reference, optimizer, *batches)

    step()
    lasting = [
        *model.parameters(),
        *scales_of(model),
        *(t for s in optimizer.state.values() for t in s.values()),
    ]
    if not settings.lora_rank:
        lasting += reference.model.parameters()
    if optimizer._means is not None:
        lasting += [t for held in optimizer._means._held.values() for t in held.values()]
    return bytes_of(lasting), peak_of(step), shape_of(model.config, "tiny")


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        pytest.param(ON_CPU, {}, id="float32"),
        pytest.param(ON_CPU, {"tie_word_embeddings": True}, id="tied"),
        pytest.param(replace(ON_CPU, retain_batch_size=8), {}, id="more-to-retain"),
        pytest.param(replace(ON_CPU, batch_size=8, retain_batch_size=1), {}, id="more-to-forget"),
        pytest.param(replace(ON_CPU, freeze_embeddings=True), {}, id="frozen-embeddings"),
        pytest.param(replace(ON_CPU, gradient_checkpointing=True), {}, id="checkpointing"),
        pytest.param(CAST, {}, id="autocast"),
        pytest.param(replace(CAST, gradient_checkpointing=True), {}, id="autocast-checkpointing"),
        pytest.param(NARROW, {}, id="bfloat16"),
        pytest.param(replace(NARROW, gradient_checkpointing=True), {}, id="bfloat16-checkpointing"),
        pytest.param(NARROW, {"vocab_size": 16384}, id="bfloat16-large-vocabulary"),
        pytest.param(replace(ON_CPU, gradient_memory="bfloat16"), {}, id="bfloat16-gradients"),
        pytest.param(
            replace(ON_CPU, momentum="per-objective", state_dtype="bfloat16"), {}, id="means"
        ),
        pytest.param(replace(ON_CPU, optimizer="sgd", accumulation=2), {}, id="accumulation"),
        pytest.param(STREAMED, {}, id="streamed"),
        pytest.param(STREAMED, {"tie_word_embeddings": True}, id="streamed-tied"),
        pytest.param(
            replace(STREAMED, freeze_embeddings=True),
            {"num_hidden_layers": 8},
            id="streamed-frozen-embeddings",
        ),
        pytest.param(replace(STREAMED, accumulation=2), {}, id="streamed-accumulation"),
        pytest.param(replace(STREAMED, adam_beta2=0.0), {}, id="streamed-no-second-moment"),
        pytest.param(replace(STREAMED, state_dtype="8bit"), {}, id="streamed-eight-bits"),
        pytest.param(replace(STREAMED, gram="blocks"), {}, id="streamed-blocks"),
        pytest.param(replace(ON_CPU, state_dtype="8bit"), {}, id="eight-bits"),
        pytest.param(
            replace(NARROW, state_dtype="8bit", metric="euclidean"), {}, id="eight-bits-euclidean"
        ),
        pytest.param(replace(NARROW, gradient_memory="streamed"), {}, id="streamed-bfloat16"),
        pytest.param(replace(CAST, gradient_memory="streamed"), {}, id="streamed-autocast"),
        pytest.param(replace(ON_CPU, adam_beta2=0.0), {}, id="no-second-moment"),
        pytest.param(replace(ON_CPU, lora_rank=8, reference="adapter"), {}, id="lora"),
        pytest.param(replace(NARROW, lora_rank=8, reference="adapter"), {}, id="lora-bfloat16"),
        pytest.param(
            replace(CAST, lora_rank=8, reference="adapter", gradient_checkpointing=True),
            {"num_hidden_layers": 8},
            id="lora-autocast-checkpointing",
        ),
        pytest.param(
            replace(NARROW, lora_rank=8, reference="adapter", quantization="nf4"), {}, id="qlora"
        ),
        pytest.param(
            replace(
                CAST,
                lora_rank=8,
                reference="adapter",
                quantization="nf4",
                gradient_checkpointing=True,
            ),
            {"num_hidden_layers": 8},
            id="qlora-autocast-checkpointing",
        ),
    ],
)
def test_the_prediction_is_within_a_tenth_of_what_a_step_allocates(settings, sizes):
    compare(settings, *measured(settings, SIZES | sizes))


def compare(settings, lasting, peak, shape):
    predicted = plan(shape, settings)
    lasts = sum(planning._lasting(shape, settings).values()) - planning.OVERHEAD_BYTES["cpu"]
    step = predicted.peak.total - planning.OVERHEAD_BYTES["cpu"] - lasts
    print(f"lasting {lasts / lasting - 1:+.2%}, step {step / peak - 1:+.1%} of {peak / 1e6:.1f} MB")
    assert lasts == pytest.approx(lasting, rel=0.001)
    assert step == pytest.approx(peak, rel=0.1)


LAYERED = {"vocab_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}
WIDE = LAYERED | {"hidden_size": 256, "intermediate_size": 768}
GROUPED = WIDE | {"num_key_value_heads": 2, "head_dim": 32}
OTHERS = {
    "gpt2": {"vocab_size": 2048, "n_layer": 4, "n_embd": 256, "n_head": 8, "n_inner": 1024},
    "gpt_neox": WIDE,
    "phi": WIDE | {"num_key_value_heads": 8},
    "opt": LAYERED | {"hidden_size": 256, "ffn_dim": 1024, "word_embed_proj_dim": 256},
    "falcon": LAYERED | {"hidden_size": 256},
    "bloom": {"vocab_size": 2048, "n_layer": 4, "hidden_size": 256, "n_head": 8},
    "glm4": GROUPED,
    "gpt_oss": GROUPED | {"layer_types": ["full_attention"] * 4},
    "mixtral": GROUPED | {"num_hidden_layers": 2},
    "qwen2_moe": GROUPED
    | {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "layer_types": ...},
    "olmoe": WIDE | {"num_key_value_heads": 2},
    "deepseek_v3": WIDE | {"num_key_value_heads": 8, "moe_intermediate_size": 256},
    "mamba": {"vocab_size": 2048, "num_hidden_layers": 4, "hidden_size": 256},
}


FEW = ("gpt2", "mixtral")
"""For an ordinary run of the tests."""


@pytest.mark.parametrize("settings", [ON_CPU, CAST], ids=["float32", "autocast"])
def test_a_layer_of_mamba_that_is_computed_again_scans_once_more(settings):
    settings = replace(settings, gradient_checkpointing=True, lora_rank=8, reference="adapter")
    sizes = OTHERS["mamba"] | {"num_hidden_layers": 2}
    compare(settings, *measured(settings, sizes, "mamba"))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(ON_CPU, id="float32"),
        pytest.param(replace(ON_CPU, lora_rank=8, reference="adapter"), id="lora"),
        pytest.param(CAST, id="autocast"),
        pytest.param(replace(CAST, lora_rank=8, reference="adapter"), id="autocast-lora"),
        pytest.param(replace(NARROW, lora_rank=8, reference="adapter"), id="bfloat16-lora"),
        pytest.param(replace(CAST, gradient_checkpointing=True), id="autocast-checkpointing"),
    ],
)
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in FEW else pytest.mark.soak) for kind in OTHERS],
)
def test_the_prediction_holds_for_other_kinds(kind, settings):
    if kind == "gpt2" and settings.dtype == "bfloat16":
        pytest.xfail("of GPT-2 in bfloat16 with LoRA the plan is a sixth above what a step takes")
    compare(settings, *measured(settings, OTHERS[kind], kind))


# ---- shapes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_named_shapes_have_the_published_number_of_parameters(name, parameters):
    assert shape_named(name).parameters == parameters


def test_a_model_is_found_as_a_folder_and_as_a_config(tmp_path):
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    folder = shape_of(*loading.load_config(str(tmp_path / "tiny")))
    file = shape_of(*loading.load_config(str(tmp_path / "tiny" / "config.json")))
    assert folder == file
    assert folder.parameters == sum(p.numel() for p in tiny.model().parameters())
    assert folder.tied


def test_another_kind_of_model_is_refused(tmp_path):
    from transformers import T5Config

    with pytest.raises(UsageError, match=r"none can be built from it|of type 't5'"):
        shape_of(T5Config(num_layers=1), "other")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    with pytest.raises(UsageError, match="cannot be loaded as a causal language model"):
        loading.load_config(str(tmp_path / "config.json"))


# ---- components


@pytest.fixture(scope="module")
def llama():
    return shape_named("llama-3-8b")


def test_what_lasts_is_counted_in_bytes(llama):
    everything, embedding = llama.parameters, llama.embedding
    full = plan(llama, PlanSettings(dtype="bfloat16"))
    assert full.component("parameters") == 2 * everything
    assert full.component("reference model") == 2 * everything
    assert full.component("optimizer state") == 2 * everything
    assert full.component("gradients held") == 3 * 2 * everything

    def component(name, **options):
        return plan(llama, PlanSettings(**options)).component(name)

    assert component("optimizer state", metric="euclidean") == 2 * 4 * everything
    assert component("optimizer state", state_dtype="bfloat16") == 2 * everything
    assert component("optimizer state", optimizer="sgd") == 0
    assert component("optimizer state", momentum="per-objective") == 4 * everything
    assert component("running means", momentum="per-objective") == 3 * 4 * everything
    assert component("gradients held", gradient_memory="bfloat16") == 3 * 2 * everything
    assert component("gradients held", gradient_memory="host") == 0
    frozen = 4 * 3 * (everything - 2 * embedding)
    assert component("gradients held", freeze_embeddings=True) == frozen
    assert component("reference model", lora_rank=8, reference="adapter") == 0
    assert component("reference model", reference="cache", freeze_embeddings=True) == 0
    assert component("reference model", reference="cache") == 4 * embedding  # the original's head


def test_waiting_elsewhere_is_told():
    shape = shape_named("smollm2-135m")
    assert plan(shape, PlanSettings(reference="cache")).cache_bytes_per_token == 4 * 576
    kib, mib = 2**10, 2**20
    layer = 2 * 2 * mib + 2 * 512 * kib + 3 * 4 * mib + 2 * 4 * kib  # each a power of two
    rounded = 30 * layer + 4 * kib
    host = plan(shape, PlanSettings(gradient_memory="host"))
    assert host.host_bytes == 3 * (128 * mib + rounded)
    frozen = plan(shape, PlanSettings(gradient_memory="host", freeze_embeddings=True))
    assert frozen.host_bytes == 3 * rounded
    on_cpu = plan(shape, PlanSettings(gradient_memory="host", device="cpu"))
    assert on_cpu.host_bytes == 0
    assert on_cpu.component("gradients held") == 3 * 4 * shape.parameters


def test_lora_trains_rank_times_the_sides_of_every_layer():
    shape = shape_named("smollm2-135m")
    sides = 2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)
    settings = PlanSettings(lora_rank=8, reference="adapter")
    assert plan(shape, settings).trainable == 8 * 30 * sides


@pytest.mark.parametrize("rows", [1, 300, 1363, 5000])
@pytest.mark.parametrize("projections", [1, 2])
def test_chunks_are_those_of_the_losses(rows, projections):
    shape = shape_named("smollm2-135m")
    settings = replace(ON_CPU, batch_size=1, sequence_length=rows + 1)
    hidden, weight = torch.empty(rows, 1), torch.empty(shape.vocab, 1)
    expected = _chunks.chunk_rows_for(
        Head(hidden, weight, None, hidden.shape, IDENTITY), projections, rows, None, torch.float32
    )
    assert planning.chunk_rows(shape, settings, projections) == expected


def test_more_to_hold_never_takes_less(llama):
    def peak(**options):
        return plan(llama, PlanSettings(**options)).peak.total

    for options in ({}, {"gradient_checkpointing": True}, {"lora_rank": 8}, {"accumulation": 2}):
        sizes = [peak(batch_size=n, **options) for n in (1, 2, 4, 8)]
        assert sizes == sorted(sizes)
        lengths = [peak(sequence_length=n, **options) for n in (64, 512, 4096)]
        assert lengths == sorted(lengths)
        assert peak(dtype="bfloat16", **options) < peak(**options)


# ---- what would make it fit


def test_proposals_end_with_the_first_that_fits(llama):
    first = plan(llama, PlanSettings(batch_size=8))
    for memory in (40 * GIB, 80 * GIB, 150 * GIB, 180 * GIB):
        found = proposals(first, memory)
        peaks = [first.peak.total, *(p.plan.peak.total for p in found)]
        assert [p.saves for p in found] == [a - b for a, b in pairwise(peaks)]
        assert all(p.saves > 0 for p in found)
        assert [p.plan.fits(memory) for p in found] == [False] * (len(found) - 1) + [True]
    assert proposals(first, first.peak.total) == []


def test_a_batch_is_split_into_the_largest_part_that_fits():
    shape = shape_named("smollm2-135m")
    settings = PlanSettings(
        batch_size=64, sequence_length=2048, gradient_checkpointing=True, optimizer="sgd"
    )
    first = plan(shape, settings)
    split = plan(shape, replace(settings, batch_size=16, accumulation=4))
    (proposal,) = proposals(first, split.peak.total)
    assert proposal.words == "--per-device-train-batch-size 16 --gradient-accumulation-steps 4"
    assert proposal.plan == split


def test_two_batches_are_split_into_as_many_parts():
    shape = shape_named("smollm2-135m")
    settings = PlanSettings(
        batch_size=6,
        retain_batch_size=12,
        sequence_length=2048,
        gradient_checkpointing=True,
        optimizer="sgd",
    )
    split = plan(shape, replace(settings, batch_size=2, retain_batch_size=4, accumulation=3))
    (proposal,) = proposals(plan(shape, settings), split.peak.total)
    assert proposal.words == (
        "--per-device-train-batch-size 2 --per-device-retain-batch-size 4 "
        "--gradient-accumulation-steps 3"
    )
    without_a_divisor = proposals(plan(shape, replace(settings, retain_batch_size=13)), 1)
    assert not any("accumulation" in proposal.words for proposal in without_a_divisor)


def config_of(settings, folder):
    """The settings of the optimizer of a plan as those of a run."""
    names = ("gradient_memory", "gram", "metric", "momentum", "state_dtype")
    options = {n: getattr(settings, n) for n in names if getattr(settings, n) is not None}
    return MOLLMConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        adam_beta2=settings.adam_beta2,
        optimizer_options=options,
        gradient_checkpointing=settings.gradient_checkpointing,
        max_grad_norm=0.0,
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adam_beta2": 0.0},
        {"metric": "euclidean"},
        {"metric": "euclidean", "adam_beta2": 0.0},
        {"momentum": "per-objective", "metric": "euclidean"},
    ],
)
@pytest.mark.parametrize("memory", [8, 16, 24, 40])
def test_a_run_takes_the_settings_of_every_proposal(llama, options, memory, tmp_path):
    found = proposals(plan(llama, PlanSettings(device="cuda", **options)), memory * GIB)
    assert found
    for proposal in found:
        config_of(proposal.plan.settings, tmp_path)


def test_no_second_moment_is_proposed_once_and_without_a_state_dtype(llama):
    first = plan(llama, PlanSettings(device="cuda"))
    words = [proposal.words for proposal in proposals(first, 16 * GIB)]
    assert words.count("--adam-beta2 0, no state dtype") == 1
    without = plan(llama, PlanSettings(device="cuda", adam_beta2=0.0))
    assert not [p for p in proposals(without, 16 * GIB) if "adam-beta2" in p.words]


def test_the_largest_tensor_of_an_adapter_is_one_of_its_two(llama):
    settings = PlanSettings(lora_rank=16, reference="adapter")
    assert planning._largest(llama, settings) == 16 * 14336


def test_where_nothing_fits_the_last_proposal_does_not(llama):
    found = proposals(plan(llama, PlanSettings()), GIB)
    assert [p.words for p in found[-2:]] == [
        "--lora 16 --reference adapter --gradient-memory as-produced --gradient-checkpointing",
        "--quantization nf4",
    ]
    assert not found[-1].plan.fits(GIB)


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (24, ["--reference cache", "--adam-beta2 0"]),
        (28, ["--reference cache", "--state-dtype 8bit"]),
        (32, ["--reference cache"]),
        (48, []),
        (80, []),
    ],
)
def test_llama_3_8b_trains_in_full_on_one_card(llama, memory, words):
    settings = PlanSettings(dtype="bfloat16", freeze_embeddings=True)
    found = proposals(plan(llama, settings), memory * GIB)
    streamed = "--gradient-memory streamed, no checkpointing"
    assert [p.words for p in found] == ["--gradient-checkpointing", streamed, *words]
    assert found[-1].plan.fits(memory * GIB)
    assert found[-1].plan.settings.lora_rank == 0


def test_streamed_gradients_are_those_of_one_block(llama):
    settings = PlanSettings(dtype="bfloat16", freeze_embeddings=True, gradient_memory="streamed")
    streamed = plan(llama, settings)
    # Two sides of 33 hidden states, and one more set of these for each micro-batch.
    inputs = 2 * 33 * 2048 * 4096 * 2
    assert streamed.component("block inputs") == inputs
    assert plan(llama, replace(settings, accumulation=3)).component("block inputs") == 3 * inputs
    assert streamed.component("gradients of a block") < 3 * 2 * llama.largest_layer + 1
    assert streamed.component("gradients held") == 0
    whole = plan(llama, replace(settings, freeze_embeddings=False))
    assert whole.component("embeddings, head and norm") == 3 * 2 * 4096  # the norm's
    assert whole.component("gradients of a slice") == 5 * 2 * (llama.largest_layer // 4)


def test_what_is_not_chosen_to_train_takes_no_gradient(llama):
    mlps = 32 * 3 * 4096 * 14336
    settings = PlanSettings(trainable_parameters=(".mlp.",), gradient_checkpointing=True)
    found = plan(llama, settings)
    assert found.trainable == mlps
    assert found.component("optimizer state") == 4 * mlps
    assert found.component("gradients held") == 3 * 4 * mlps
    assert plan(llama, replace(settings, shards=4)).component("optimizer state") == mlps
    (adapter,) = [p for p in proposals(found, GIB) if "--lora" in p.words]
    assert adapter.words.endswith(", without --trainable-parameters")
    assert adapter.plan.settings.trainable_parameters == ()
    with pytest.raises(UsageError, match="no name holds 'mpl': take parts of lm_head"):
        plan(llama, replace(settings, trainable_parameters=("mlp", "mpl")))
    both = replace(settings, trainable_parameters="[embed_tokens, .mlp.]")
    assert plan(llama, both).trainable == mlps + 128256 * 4096
    assert proposals(plan(llama, both), GIB)  # none of them freezes what was chosen
    with pytest.raises(UsageError, match=r"'embed_tokens' names model\.embed_tokens"):
        plan(llama, replace(both, freeze_embeddings=True))


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        pytest.param(ON_CPU, (".mlp.",), id="mlps"),
        pytest.param(ON_CPU, ("layers.6.", "layers.7."), id="layers"),
        pytest.param(replace(ON_CPU, gradient_checkpointing=True), ("layers.6.",), id="checkpoint"),
        pytest.param(STREAMED, (".mlp.",), id="streamed"),
        pytest.param(replace(ON_CPU, accumulation=2), ("o_proj", "norm"), id="accumulation"),
    ],
)
def test_a_plan_of_some_parameters_is_never_too_low(settings, parts):
    settings = replace(settings, trainable_parameters=parts)
    lasting, peak, shape = measured(settings, SIZES | {"num_hidden_layers": 8})
    predicted = plan(shape, settings)
    lasts = sum(planning._lasting(shape, settings).values()) - planning.OVERHEAD_BYTES["cpu"]
    assert lasts == pytest.approx(lasting, rel=0.001)
    step = predicted.peak.total - planning.OVERHEAD_BYTES["cpu"] - lasts
    print(f"step {step / peak - 1:+.1%} of {peak / 1e6:.1f} MB")
    assert step > 0.97 * peak


@pytest.mark.parametrize(
    "settings",
    [
        PlanSettings(),
        PlanSettings(trainable_parameters=(".mlp.", "norm"), freeze_embeddings=True),
        PlanSettings(lora_rank=8, reference="adapter", quantization="nf4", state_dtype="bfloat16"),
    ],
)
def test_the_line_that_plans_a_run_plans_it(settings):
    parser = argparse.ArgumentParser()
    plan_command.add_parser(parser.add_subparsers())
    given = vars(parser.parse_args(shlex.split(plan_line("m", settings))[1:]))
    assert PlanSettings(**{name: given[name] for name in OPTIONS if name in given}) == settings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adam_beta2": 1.0}, r"adam_beta2 must be in \[0, 1\), but got 1.0"),
        (
            {"gradient_memory": "streamed", "gradient_checkpointing": True},
            "gradient_checkpointing must be left out with gradient_memory 'streamed'",
        ),
        (
            {"gradient_memory": "streamed", "lora_rank": 8},
            "gradient_memory must be another one than 'streamed' with LoRA",
        ),
        ({"gram": "blocks"}, "gram must be model without gradient_memory 'streamed'"),
        (
            {"gram": "blocks", "gradient_memory": "streamed", "momentum": "per-objective"},
            "momentum must be left out with gram 'blocks'",
        ),
        ({"state_dtype": "8bit", "shards": 2}, "state_dtype must not be 8bit in shards"),
        (
            {"state_dtype": "8bit", "adam_beta2": 0.0},
            "state_dtype must be left out with adam_beta2 0 and no first moment",
        ),
        ({"batch_size": 0}, "batch_size must be at least 1, but got 0"),
        ({"lora_rank": -1}, "lora_rank must not be negative, but got -1"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, but got 'int8'"),
        ({"momentum": "heavy"}, "momentum must be one of per-objective, but got 'heavy'"),
        ({"reference": "adapter"}, "give a lora_rank"),
        ({"quantization": "nf4"}, "quantization must be left out without LoRA"),
        ({"quantization": "int3", "lora_rank": 8}, "quantization must be one of nf4"),
        (
            {"trainable_parameters": [".mlp."], "lora_rank": 8},
            r"trainable_parameters must be left out with LoRA, .* but got \['.mlp.'\]",
        ),
        ({"trainable_parameters": [""]}, r"parts of names of parameters.* but got \[''\]"),
    ],
)
def test_settings_out_of_range_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        PlanSettings(**options)


# ---- the command


def test_the_command_says_what_is_the_peak_and_what_would_fit(capsys):
    arguments = ["plan", "--preset", "llama-3-8b", "--device", "cuda", "--reference", "cache"]
    assert main([*arguments, "--device-memory", "1000"]) == 0
    text = capsys.readouterr().out
    assert "8,030,261,248 parameters" in text
    assert text.count("<- peak") == 1
    assert "It fits into 1000.0 GiB" in text
    assert "16,384 bytes for each token" in text
    assert main([*arguments, "--dtype", "bfloat16", "--device-memory", "1000"]) == 0
    assert "8,192 bytes for each token" in capsys.readouterr().out
    assert main([*arguments, "--device-memory", "140"]) == 1
    text = capsys.readouterr().out
    assert "does not fit into 140.0 GiB" in text
    assert "--gradient-checkpointing  " in text
    assert "With these it fits" in text
    assert main([*arguments, "--device-memory", "1"]) == 1
    assert "GiB short" in capsys.readouterr().out


def test_without_a_known_memory_there_is_no_verdict(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["plan", "--preset", "smollm2-135m", "--device", "cuda"]) == 0
    assert "with --device-memory" in capsys.readouterr().out
    assert main(["plan", "--preset", "smollm2-135m", "--max-length", "64"]) == 0
    assert "tokens on cpu" in capsys.readouterr().out


@pytest.mark.parametrize("gradient_memory", ["as-produced", "streamed"])
def test_further_sets_take_their_gradients(gradient_memory):
    llama = shape_named("llama-3.2-1b")
    three, five = (
        plan(llama, PlanSettings(objectives=count, gradient_memory=gradient_memory))
        for count in (3, 5)
    )
    held = 0 if gradient_memory == "streamed" else 2 * three.trainable * 4
    assert five.peak.total > three.peak.total + held / 2


def test_simulated_relearning_takes_a_copy_and_a_state():
    llama = shape_named("llama-3.2-1b")
    without, with_it = (plan(llama, PlanSettings(relearn_steps=steps)) for steps in (0, 3))
    assert with_it.component("weights to put back") == with_it.trainable * 4
    assert with_it.component("attacker's state") == 2 * with_it.trainable * 4
    assert with_it.peak.total >= without.peak.total
    with pytest.raises(UsageError, match="relearn_steps must be 0 with gradient_memory"):
        PlanSettings(relearn_steps=3, gradient_memory="streamed")
    with pytest.raises(UsageError, match="objectives must be at least 3, but got 2"):
        PlanSettings(objectives=2)
