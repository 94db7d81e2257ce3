"""Every recipe starts from its file, with a tiny model and rows of the shape that it names."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import launch
import pytest
import tiny
import torch

from mollm.cli import main
from mollm.commands.settings_file import read_settings
from mollm.commands.unlearn import make_arguments
from mollm.data.files import sample_path
from mollm.models import loading
from mollm.system.parsing import parse_yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SAMPLES = {
    "paper": ("safety.jsonl", "safety.jsonl"),
    "tofu": ("authors-forget.jsonl", "authors-retain.jsonl"),
    "muse-news": ("text.jsonl", "text.jsonl"),
    "wmdp": ("text.jsonl", "text.jsonl"),
    "own-data": ("completions.jsonl", "authors-retain.jsonl"),
    "qlora": ("completions.jsonl", "authors-retain.jsonl"),
    "fsdp2": ("completions.jsonl", "authors-retain.jsonl"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    where = tmp_path_factory.mktemp("models") / "tiny"
    made = tiny.model(
        max_position_embeddings=4096,
        num_hidden_layers=8,
        hidden_size=64,
        intermediate_size=128,
        tie_word_embeddings=False,
    )
    loading.save(made, tiny.tokenizer(), where)
    return str(where)


def text_halves(tmp_path):
    """Two sets of running text, as no row may be in both."""
    lines = sample_path("text.jsonl").read_text().splitlines()
    paths = []
    for name, some in (("forget", lines[::2]), ("retain", lines[1::2])):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("\n".join(some))
    return paths


def words(recipe, model, tmp_path, *more):
    pair = SAMPLES[recipe.stem]
    forget, retain = (sample_path(name) for name in pair)
    if pair[0] == pair[1] == "text.jsonl":
        forget, retain = text_halves(tmp_path)
    return [
        *("unlearn", "--config", str(recipe), "--model", model, "--out", str(tmp_path / "out")),
        *("--forget", str(forget), "--retain", str(retain), "--device", "cpu"),
        *("--max-steps", "1", "--per-device-train-batch-size", "1", "--set", "sample_replies=0"),
        *("--gradient-accumulation-steps", "1", "--set", "save_strategy=no", "--quiet"),
        *more,
    ]


def test_there_is_a_recipe_for_each_name_and_a_line_about_it_in_the_docs():
    page = (ROOT / "docs" / "guide" / "recipes.md").read_text()
    assert {recipe.stem for recipe in RECIPES} == set(SAMPLES)
    for recipe in RECIPES:
        assert f"recipes/{recipe.name}" in page


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_settings_of_a_recipe_are_known_and_go_together(recipe, tmp_path):
    settings = read_settings({"config": recipe})
    if settings.get("fsdp"):
        del settings["fsdp"]  # which one process alone refuses
    make_arguments({**settings, "device": "cpu"}, tmp_path)
    assert settings["out"] == f"runs/{recipe.stem}"


@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES if r.stem != "fsdp2"], ids=lambda path: path.stem
)
def test_a_recipe_makes_a_step(recipe, model, tmp_path):
    if "lora" in parse_yaml(recipe.read_text(), recipe.name):
        pytest.importorskip("peft")
    if recipe.stem == "qlora":
        pytest.importorskip("bitsandbytes")
    assert main(words(recipe, model, tmp_path)) == 0
    told = json.loads((tmp_path / "out" / "run.json").read_text())
    assert told["steps"] == 1
    assert told["settings"]["method"] == read_settings({"config": recipe}).get("method", "mollm")


def test_the_recipe_for_parts_of_a_model_runs_in_two_processes(model, tmp_path):
    recipe = ROOT / "recipes" / "fsdp2.yaml"
    command = ("-m", "mollm", *words(recipe, model, tmp_path))
    out, err, _ = launch.script(*command, world=2, seconds=60)
    assert "Next: mollm evaluate" in out, err
    assert (tmp_path / "out" / "model").is_dir()


def judge(folder):
    """A small classifier of replies, taught on the spot to tell the samples' unsafe responses."""
    rows = [json.loads(line) for line in sample_path("safety.jsonl").read_text().splitlines()]
    texts = [row[f"response_{i}"] for row in rows for i in (0, 1)]
    unsafe = [not row[f"is_response_{i}_safe"] for row in rows for i in (0, 1)]
    made = tiny.classifier({0: "safe", 1: "harmful"}, intermediate_size=32)
    tokenizer = tiny.tokenizer()
    batch = tokenizer([t[:60] for t in texts], return_tensors="pt", padding=True)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    for _ in range(60):
        loss = made(**batch, labels=torch.tensor(unsafe).long()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = made.eval()(**batch).logits.argmax(1).bool().tolist()
    assert sum(a == b for a, b in zip(found, unsafe, strict=True)) > 0.8 * len(unsafe)


def test_the_protocol_of_the_paper_from_end_to_end(model, tmp_path, capsys):
    pytest.importorskip("peft")
    judge(tmp_path / "judge")
    recipe = ROOT / "recipes" / "paper.yaml"
    assert main(words(recipe, model, tmp_path)) == 0
    shutil.copy(sample_path("safety.jsonl"), tmp_path / "safety.jsonl")
    command = ["evaluate", "--model", str(tmp_path / "out"), "--suite", "safety"]
    command += ["--data", str(tmp_path / "safety.jsonl"), "--limit", "3", "--device", "cpu"]
    command += ["--judge", f"harmful={tmp_path / 'judge'}:harmful", "--max-new-tokens", "4"]
    assert main([*command, "--resamples", "3", "--quiet"]) == 0
    told = capsys.readouterr().out
    for figure in ("forget_harmful_rate", "forget_perplexity", "retain_probability"):
        assert re.search(rf"{figure} .*\d", told), told
