"""The model that a run leaves, in the usual lines of other packages."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mollm import MOLLMConfig, MOLLMTrainer, Record

ROWS = {
    role: [(f"{word} {n}?", f"{word} {n + 1}.") for n in range(4)]
    for role, word in (("forget", "Who"), ("retain", "When"))
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The folder that was exported, and the logits of the model that was trained."""
    folder = tmp_path_factory.mktemp("result")
    trainer = MOLLMTrainer(
        tiny.model(hidden_size=64, intermediate_size=128),
        MOLLMConfig(output_dir=str(folder), max_steps=2, use_cpu=True, save_strategy="no"),
        forget_dataset=[Record(*row) for row in ROWS["forget"]],
        retain_dataset=[Record(*row) for row in ROWS["retain"]],
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    trainer.export(folder / "model")
    with torch.no_grad():
        return str(folder / "model"), trainer.model.eval()(tokens()).logits


def tokens():
    return torch.arange(3, 35)[None]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=tokens()).logits


def test_transformers_loads_it(result):
    folder, expected = result
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)
    text = "Who 1?"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_accelerate_prepares_and_dispatches_it(result):
    from accelerate import Accelerator, init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig

    folder, expected = result
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    torch.testing.assert_close(logits(model), expected)
    accelerator.backward(model(input_ids=tokens(), labels=tokens()).loss)
    optimizer.step()
    assert not torch.equal(logits(model), expected)
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    empty.tie_weights()
    dispatched = load_checkpoint_and_dispatch(empty, folder, device_map={"": "cpu"})
    torch.testing.assert_close(logits(dispatched), expected)


def test_trl_trains_it(result, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    folder, _ = result
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in ROWS["retain"]]
    trainer = trl.SFTTrainer(
        folder,
        args=trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none", bf16=False
        ),
        train_dataset=datasets.Dataset.from_list(rows),
    )
    assert trainer.train().global_step == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"load_in_8bit": True}, 0.05),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 0.3),
    ],
)
def test_it_loads_in_8_and_4_bits(result, options, error):
    pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
    from transformers import BitsAndBytesConfig

    folder, expected = result
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}
    )
    kinds = {type(module).__name__ for module in model.modules()}
    assert kinds & {"Linear8bitLt", "Linear4bit"}
    away = (logits(model).float() - expected).norm() / expected.norm()
    assert 0 < away < error
