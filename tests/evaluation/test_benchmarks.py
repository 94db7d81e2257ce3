"""Tasks of lm-evaluation-harness, run by the harness itself."""

import json
import random
import sys

import numpy as np
import pytest
import tiny
import torch

from mollm.cli import main
from mollm.errors import UsageError
from mollm.evaluation import benchmarks
from mollm.evaluation.benchmarks import general_benchmarks
from mollm.models import loading


def test_general_benchmarks_name_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UsageError, match=r"need the package .*: pip install 'mollm\[harness\]'"):
        general_benchmarks(tiny.model(), tiny.tokenizer(), ["mmlu"])


@pytest.fixture
def harness_task(tmp_path):
    """A multiple-choice task of the harness, from files alone."""
    rows = [{"question": f"{i} + {i} =", "choices": ["1", "2", "4"], "at": i} for i in (1, 2)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sums.yaml").write_text(
        f"""
task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path}/sums.jsonl
  cache_dir: {tmp_path}/cache
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{at}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
    )
    return tmp_path, rows


def test_general_benchmarks_are_those_of_the_harness(harness_task):
    folder, rows = harness_task
    model, tokenizer = tiny.model(initializer_range=0.3).train(), tiny.tokenizer()
    tokenizer.pad_token = None
    random.seed(3)
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    found = general_benchmarks(model, tokenizer, ["sums"], folder=folder, batch_size=2)
    after = random.getstate(), np.random.get_state()[1], torch.get_rng_state()  # noqa: NPY002
    assert before[0] == after[0]
    assert (before[1] == after[1]).all()
    assert torch.equal(before[2], after[2])
    assert model.training
    assert tokenizer.pad_token is None

    def log_probability(question, choice):
        start = len(tokenizer(question)["input_ids"])
        ids = torch.tensor([tokenizer(f"{question} {choice}")["input_ids"]])
        with torch.no_grad():
            log_p = model.eval()(input_ids=ids).logits[0].log_softmax(-1)
        return sum(float(log_p[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))

    right = 0
    for row in rows:
        scores = [log_probability(row["question"], choice) for choice in row["choices"]]
        right += scores.index(max(scores)) == row["at"]
    assert set(found) == {"sums"}
    assert set(found["sums"]) <= {"acc", "acc_stderr"}
    assert found["sums"]["acc"] == right / 2
    with pytest.raises(UsageError, match="tasks of lm-evaluation-harness, but got 'differences'"):
        general_benchmarks(model, tokenizer, ["differences"], folder=folder)
    with pytest.raises(UsageError, match="at least one task"):
        general_benchmarks(model, tokenizer, [])


def test_the_command_runs_them_after_the_metrics(tmp_path, monkeypatch, capsys):
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "model")
    lines = [json.dumps({"prompt": f"{i}?", "answer": f"{i}."}) for i in range(2)]
    (tmp_path / "forget.jsonl").write_text("\n".join(lines))
    asked = {}

    def run(model, tokenizer, tasks, **options):
        asked.update(options, tasks=tasks)
        return {"arc_easy": {"acc": 0.25}}

    monkeypatch.setattr(benchmarks, "find_benchmarks", lambda tasks: None)
    monkeypatch.setattr(benchmarks, "general_benchmarks", run)
    out = tmp_path / "out"
    command = ["evaluate", "--model", str(tmp_path / "model"), "--out", str(out), "--limit", "2"]
    command += ["--forget", str(tmp_path / "forget.jsonl"), "--metrics", "forget_probability"]
    assert main([*command, "--benchmarks", "arc_easy", "--batch-size", "3"]) == 0
    assert "arc_easy  acc 0.25" in capsys.readouterr().out
    assert asked == {"tasks": ["arc_easy"], "batch_size": 3, "limit": 2}
    assert json.loads((out / "benchmarks.json").read_text()) == {"arc_easy": {"acc": 0.25}}
    assert "lm_eval" in json.loads((out / "about.json").read_text())["versions"]

    def fail(*arguments, **options):
        raise UsageError("its data cannot be had.")

    monkeypatch.setattr(benchmarks, "general_benchmarks", fail)
    assert main([*command, "--benchmarks", "arc_easy"]) == 2
    assert (out / "metrics.json").exists()
    assert not (out / "benchmarks.json").exists()
