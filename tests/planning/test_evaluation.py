"""The planned memory of an evaluation against what Torch allocates."""

import json

import pytest
import tiny
from allocated import peak_of

from mollm.cli import main
from mollm.data.chat import ChatFormat, Example
from mollm.evaluation.generation import ask_tokens
from mollm.evaluation.scores import kl_to_original, score_rows
from mollm.planning.evaluation import plan_evaluation
from mollm.planning.memory import OVERHEAD_BYTES
from mollm.planning.settings import PlanSettings
from mollm.planning.shapes import shape_of

LENGTH, BATCH, REPLY = 128, 8, 12
WIDE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 2000}


@pytest.fixture(scope="module")
def models():
    return [tiny.model(seed=seed, num_attention_heads=8, **WIDE) for seed in (0, 1)]


@pytest.fixture(scope="module")
def rows():
    chat = ChatFormat(tiny.tokenizer(), prompt_format="none")
    row = chat.encode(Example("x", "y" * (LENGTH - 2)))
    assert len(row.ids) == LENGTH
    return chat, [row] * BATCH


@pytest.fixture
def planned(models):
    settings = PlanSettings(
        sequence_length=LENGTH, dtype="float32", compute_dtype="float32", device="cpu"
    )
    shape = shape_of(models[0].config, "tiny")
    found = plan_evaluation(shape, settings, batch_size=BATCH, reply=REPLY)
    lasting = 2 * 4 * shape.parameters + OVERHEAD_BYTES["cpu"]
    return {stage.name: stage.total - lasting for stage in found.stages}


def near(planned, measured):
    assert 0.8 * measured < planned < 1.6 * measured, f"{planned:,} planned, {measured:,} measured"


def test_scoring(models, rows, planned):
    chat, batch = rows
    options = {"pad_id": chat.pad_id, "batch_size": BATCH}
    near(planned["scoring answers"], peak_of(lambda: score_rows(models[0], batch, **options)))


def test_the_kl(models, rows, planned):
    chat, batch = rows
    options = {"pad_id": chat.pad_id, "batch_size": BATCH}
    near(planned["KL to the original"], peak_of(lambda: kl_to_original(*models, batch, **options)))


def test_replies(models, rows, planned):
    chat, batch = rows
    options = {"max_new_tokens": REPLY, "batch_size": BATCH}
    ask_tokens(models[0], chat, batch[:2], **options)
    near(planned["replies"], peak_of(lambda: ask_tokens(models[0], chat, batch, **options)))


def test_keys_are_those_of_the_groups(models):
    shape = shape_of(models[0].config, "tiny")
    assert (shape.keys, shape.query) == (2 * 16, 8 * 16)


def test_the_command_says_what_an_evaluation_takes(capsys):
    command = ["plan", "--preset", "smollm2-135m", "--device", "cuda", "--dtype", "bfloat16"]
    main([*command, "--device-memory", "80"])
    out = capsys.readouterr().out
    assert "`mollm evaluate` takes " in out
    assert "does not fit: give it a smaller --batch-size" not in out
    main([*command, "--device-memory", "0.5"])
    assert "does not fit: give it a smaller --batch-size" in capsys.readouterr().out
    main([*command, "--device-memory", "80", "--json"])
    told = json.loads(capsys.readouterr().out)["evaluation"]
    assert told["replies"]["keys and values"] == 2 * 30 * 3 * 64 * 2 * 16 * (512 + 200)
