"""`mollm audit` from the command line."""

from __future__ import annotations

import copy
import json
import shutil

import audit_models
import pytest
import reported_runs
import tiny

from mollm.cli import main
from mollm.models import adapters, loading

LoraConfig = pytest.importorskip("peft").LoraConfig
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with models and data."""
    path = tmp_path_factory.mktemp("audit")
    models = {
        "original": audit_models.learnt("forget", "retain"),
        "retain-only": audit_models.learnt("retain"),
        "other-seed": audit_models.learnt("retain", seed=1),
    }
    for name, model in models.items():
        loading.save(model, audit_models.tokenizer(), path / name)
    loading.save(tiny.model(), tiny.tokenizer(), path / "other")
    for name, rows in audit_models.people().items():
        lines = [{"question": row.question, "answer": row.answer} for row in rows]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (path / f"{name}.jsonl").write_text(text)
    return path


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs the command in the folder: the exit status, and what is printed."""
    monkeypatch.chdir(folder)

    def command(model, *more, original="original", forget="forget.jsonl"):
        words = ["audit", "--model", model, "--original", original, "--forget", forget]
        status = main([*words, "--learning-rates", "5e-4", "--resamples", "20", *more])
        return status, *capsys.readouterr()

    return command


def read(folder):
    return json.loads((folder / "audit.json").read_text())


def test_a_model_that_never_saw_the_rows_passes(run, tmp_path):
    more = ("--retain", "retain.jsonl")
    more += ("--retain-only", "retain-only", "--out", str(tmp_path))
    status, said, _ = run("other-seed", *more)
    found = read(tmp_path)
    assert (status, found["verdict"], found["complete"]) == (0, "PASS", True)
    lines = [line for line in said.splitlines() if line.startswith("PASS  ")]
    assert len(lines) == len(found["findings"]) == 12
    assert "Verdict: PASS" in said
    assert "No retain-only model" not in said
    assert "certif" not in said.lower()
    page = (tmp_path / "audit.html").read_text()
    assert "Audit of other-seed" in page
    assert not [row for row in audit_models.people()["forget"] if row.answer in page]


def test_the_original_fails_and_the_command_that_makes_a_retain_only_model_is_printed(
    run, tmp_path
):
    (tmp_path / "audit.html").write_text("of before")
    status, said, _ = run("original", "--out", str(tmp_path))
    assert (status, read(tmp_path)["verdict"]) == (1, "FAIL")
    assert "No retain-only model was given" in said
    assert "mollm unlearn --model BEFORE_IT_LEARNT --forget forget.jsonl --retain RETAIN" in said
    assert "Not in the verdict: membership inference: it needs rows" in said
    assert "of before" not in (tmp_path / "audit.html").read_text()
    (relative,) = (f for f in read(tmp_path)["findings"] if f["name"].startswith("asked as"))
    assert relative["retain_only"] is None


def test_a_short_audit_says_what_it_leaves_out(run, tmp_path):
    status, said, _ = run("original", "--short", "--out", str(tmp_path))
    names = [finding["name"] for finding in read(tmp_path)["findings"]]
    assert status == 1
    assert "taught 9 examples again" in names
    assert not [name for name in names if "sampled" in name or "rounded" in name]
    assert "A short audit: no replies were sampled" in said
    assert "Verdict: FAIL (short)" in said
    assert "FAIL (short)</span>" in (tmp_path / "audit.html").read_text()
    assert read(tmp_path)["settings"]["short"] is True


def test_a_short_audit_takes_the_place_of_no_full_one_and_takes_no_holdout(tmp_path, capsys):
    where = reported_runs.run(tmp_path / "run", finished="2026-01-01T00:00:00+00:00")
    reported_runs.audited(where, verdict="PASS")
    before = (where / "audit" / "audit.json").read_text()
    words = ["audit", "--model", str(where), "--original", "o", "--forget", "no-such.jsonl"]

    def refused(*more):
        assert main([*words, "--short", *more]) == 2
        return capsys.readouterr().err

    for out in ([], ["--out", str(where)]):  # report and card show one of the two
        assert "without a full audit beside --short" in refused(*out)
    assert (where / "audit" / "audit.json").read_text() == before
    error = refused("--holdout", "h.jsonl", "--out", str(tmp_path / "out"))
    assert "holdout must be left out with --short" in error
    assert "no-such.jsonl" in refused("--out", str(tmp_path / "out"))
    # One that is short itself, or that did not end, is in nobody's way.
    for told in ({"settings": {"short": True}}, {"verdict": None}):
        reported_runs.audited(where, **told)
        assert "no-such.jsonl" in refused()


def test_an_adapter_folder_is_put_on_the_original(run, folder, tmp_path):
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
    wrapped = adapters.adapted(copy.deepcopy(audit_models.learnt("forget", "retain")), config)
    wrapped.save_pretrained(tmp_path / "adapter")
    status, said, _ = run(str(tmp_path / "adapter"), "--out", str(tmp_path / "out"))
    assert status == 1
    assert "adapter merged in bfloat16" in said
    assert "take it off" in said
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    status, _, error = run(str(tmp_path / "adapter"), "--out", str(tmp_path / "out"))
    assert status == 2
    assert "must have its weights in adapter_model.safetensors" in error


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (
            ["other"],
            {},
            "the original model must be of the architecture of the one under audit, but vocab_size",
        ),
        (
            ["original", "--retain-only", "other"],
            {},
            "the retain-only model must be of the architecture",
        ),
        (["nowhere/x/y"], {}, "model must be a model folder"),
        (["original"], {"original": "nowhere/x/y"}, "model must be a model folder"),
        (["original"], {"forget": "few.jsonl"}, "at least 4 forget rows"),
        (["original"], {"forget": "nothing.jsonl"}, "nothing.jsonl"),
        (["original", "--learning-rates", "fast"], {}, "learning-rates must be numbers"),
        (["original", "--learning-rates", "7"], {}, "learning_rates must be one or more numbers"),
        (["original", "--batch-size", "0"], {}, "batch_size must be at least 1"),
        (["original", "--device", "abacus"], {}, "device must be one"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_loaded(
    arguments, options, words, run, folder, monkeypatch, tmp_path
):
    def load(*_, **__):
        raise AssertionError("nothing is to be loaded")

    monkeypatch.setattr(loading, "load", load)
    rows = [{"question": f"Who is {n}?", "answer": "Ann"} for n in range(3)]
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, error = run(*arguments, "--out", str(tmp_path / "out"), **options)
    assert status == 2
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused(run, folder, tmp_path):
    tokenizer = copy.deepcopy(audit_models.tokenizer())
    tokenizer.add_tokens(["<other>"])
    loading.save(audit_models.learnt("retain"), tokenizer, tmp_path / "model")
    status, _, error = run(str(tmp_path / "model"), "--out", str(tmp_path / "out"))
    assert status == 2
    assert "must have the tokenizer of the one under audit, but the token '<other>'" in error


def test_as_json_it_prints_the_file_and_all_else_to_stderr(run, tmp_path):
    status, said, told = run("original", "--json", "--out", str(tmp_path))
    assert status == 1
    assert json.loads(said) == read(tmp_path)
    assert "Verdict: FAIL" in told


def test_the_audit_of_a_runs_model_lies_in_its_folder_and_is_in_its_report_and_card(run, folder):
    form = "Question: {question}\nAnswer: {answer}"  # as it would be without
    settings = {"method": "mollm", "learning_rate": 1e-5, "seed": 42, "steps": 12}
    settings |= {"prompt_format": form, "long_rows": "skip"}
    where = reported_runs.run(
        folder / "a-run", finished="2026-01-01T00:00:00+00:00", settings=settings
    )
    shutil.copytree(folder / "original", where / "model")
    (where / "README.md").write_text("# A model\n\n## Data\n")
    status, said, _ = run("a-run")
    assert status == 1
    assert read(where / "audit")["verdict"] == "FAIL"
    assert read(where / "audit")["about"]["model"] == "a-run"
    assert "Report: a-run/audit/audit.html" in said
    assert read(where / "audit")["settings"]["chat"]["prompt_format"] == form
    assert f"--prompt-format '{form}'" in said
    assert "FAIL</b>" in (where / "report.html").read_text()
    assert "Verdict: **FAIL**" in (where / "README.md").read_text()
