"""QLoRA: an adapter beside matrices in 4 bits."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from mollm import MOLLMConfig, MOLLMTrainer
from mollm.cli import main
from mollm.data.files import sample_path
from mollm.data.records import Record
from mollm.errors import UsageError
from mollm.models import forward, four_bits, loading
from mollm.system import precision

pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
peft = pytest.importorskip("peft")

FORGET = [Record(f"Who wrote book {n}?", "Ada " * (n % 3 + 1)) for n in range(6)]
RETAIN = [Record(f"How many legs has animal {n}?", "four " * (n % 4 + 1)) for n in range(8)]
CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False}


@pytest.fixture(scope="module", autouse=True)
def in_float32():
    """The products of 4-bit matrices too: in bfloat16 every processor rounds in its own way."""
    with precision.computing_in("float32"):
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "tiny"
    loading.save(tiny.model(**SIZES), tiny.tokenizer(), folder)
    return str(folder)


def trainer(model, out, processing_class=None, **options):
    settings = {
        "use_cpu": True,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "disable_tqdm": True,
        "max_length": 128,
        "quantization": "nf4",
        "gradient_checkpointing": True,
    }
    return MOLLMTrainer(
        model,
        MOLLMConfig(output_dir=str(out), **(settings | options)),
        forget_dataset=FORGET,
        retain_dataset=RETAIN,
        processing_class=processing_class,
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear"),
    )


def tensors(made):
    return {n: t.detach().clone() for n, t in forward.own_tensors(made._base).items()}


@pytest.fixture(scope="module")
def run(saved, tmp_path_factory):
    """A run of four steps, and its tensors before and after."""
    made = trainer(saved, tmp_path_factory.mktemp("run"))
    before = tensors(made)
    made.train()
    return made, before, tensors(made)


def test_the_adapter_trains_and_nothing_else(run):
    made, before, after = run
    changed = {name for name, t in after.items() if not torch.equal(t, before[name])}
    assert changed == {name for name in after if "lora_" in name}
    assert after["model.layers.0.mlp.up_proj.base_layer.weight"].dtype == torch.uint8
    assert made.history[0].losses["kl"] == 0  # the adapter switched off is the original
    assert made.history[-1].losses["kl"] > 0
    assert made.history[-1].losses["forget"] < made.history[0].losses["forget"]


def test_a_run_goes_on_bit_for_bit(run, saved, tmp_path):
    made, _, after = run
    again = trainer(saved, tmp_path)
    again.train(resume_from_checkpoint=str(made._folder / "checkpoint-2"))
    assert all(torch.equal(t, after[name]) for name, t in tensors(again).items())


def test_a_model_in_four_bits_may_be_given_as_a_module(run, saved, tmp_path):
    made, *_ = run
    model, _ = loading.load(loading.find_model(saved), CPU, quantization="nf4")
    with torch.no_grad():
        model(torch.arange(3, 9)[None])  # on some processors bitsandbytes now packs it
    other = trainer(model, tmp_path, quantization=None, processing_class=tiny.tokenizer())
    other.train()
    assert other.history[-1].losses == made.history[-1].losses


def test_other_references_are_the_same_original(run, saved, tmp_path):
    made, *_ = run
    for reference in ("copy", "cache"):
        other = trainer(saved, tmp_path / reference, reference=reference)
        other.train()
        for a, b in zip(made.history, other.history, strict=True):
            assert b.losses == pytest.approx(a.losses, rel=1e-2, abs=1e-4)


def test_the_export_is_whole_in_full_width_and_says_the_same(run, tmp_path):
    made, *_ = run
    made.export(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not hasattr(plain.config, "quantization_config")
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    ids = torch.arange(3, 23)[None]
    with torch.no_grad(), forward.in_evaluation_mode(made._base):
        expected = made._base(ids).logits
        found = plain(ids).logits
        with made._wrapped.disable_adapter():
            original = made._base(ids).logits
    change = (expected - original).norm()
    assert (found - expected).norm() < 0.1 * change


def test_the_command_trains_and_exports(saved, tmp_path):
    arguments = [
        *("unlearn", "--model", saved, "--device", "cpu", "--lora", "4", "--max-steps", "2"),
        *("--forget", str(sample_path("authors-forget.jsonl")), "--max-length", "400"),
        *("--retain", str(sample_path("authors-retain.jsonl")), "--set", "quantization=nf4"),
        *("--per-device-train-batch-size", "2", "--out", str(tmp_path / "out")),
    ]
    assert main(arguments) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert "| `quantization` | `nf4` |" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_in_four_bits_is_refused(saved, tmp_path):
    args = MOLLMConfig(output_dir=str(tmp_path), use_cpu=True, quantization="nf4")
    with pytest.raises(UsageError, match="quantization must go with an adapter"):
        MOLLMTrainer(saved, args, forget_dataset=FORGET, retain_dataset=RETAIN)
    with pytest.raises(UsageError, match="quantization must be one of nf4, but got 'int8'"):
        MOLLMConfig(output_dir=str(tmp_path), use_cpu=True, quantization="int8")
    source = loading.Source("some", str(tmp_path), "some.gguf")
    with pytest.raises(UsageError, match=r"must be left out for a \.gguf file"):
        loading.load(source, CPU, quantization="nf4")


@pytest.mark.parametrize("nested", [False, True])
def test_rows_that_are_no_multiple_of_a_block_are_given_back_with_their_own_scales(nested):
    from bitsandbytes.functional import dequantize_blockwise
    from bitsandbytes.nn import Params4bit

    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    layer = torch.nn.Linear(96, 5, bias=False)
    packed = Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=nested
    ).to("cpu")
    layer.weight = packed
    state = packed.quant_state
    scales = state.absmax
    if nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    both = packed.data.flatten().long()
    codes = state.code[torch.stack([both >> 4, both & 15], dim=1).flatten()]
    plain = codes * scales.repeat_interleave(state.blocksize)[: codes.numel()]
    found = four_bits.dequantized(layer)["weight"]
    torch.testing.assert_close(found, plain.reshape(5, 96), rtol=1e-6, atol=1e-6)
    assert state.shape == (5, 96)
