import argparse
import json
import os
import re
import shlex
import shutil
from dataclasses import fields, replace
from pathlib import Path

import launch
import pytest
import tiny
import torch
from reported_runs import step
from transformers import AutoModelForCausalLM

from mollm import MOLLMConfig
from mollm.cli import main
from mollm.commands import unlearn
from mollm.commands.settings_file import OWN_SETTINGS, read_settings
from mollm.data.files import sample_path
from mollm.errors import UsageError
from mollm.models import loading
from mollm.planning import run as planning_run
from mollm.system import machine
from mollm.system.units import GIB

TESTS = Path(__file__).parents[1]
FORGET, RETAIN = (str(sample_path(f"authors-{role}.jsonl")) for role in ("forget", "retain"))


@pytest.fixture
def saved(tmp_path):
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    return tmp_path / "tiny"


def settings_file(folder, **changed):
    settings = {
        "model": str(folder / "tiny"),
        "forget": FORGET,
        "retain": {"path": RETAIN, "schema": "tofu"},
        "out": str(folder / "out"),
        "device": "cpu",
        "max_length": 400,
        "max_steps": 4,
        "learning_rate": "1e-3",
        "per_device_train_batch_size": 2,
        "save_steps": 2,
    } | changed
    path = folder / "run.yaml"
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return str(path)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_llama_3_forgets_resumes_evaluates_and_exports(tmp_path, capsys):
    """The whole way on data in the form of TOFU, with the vocabulary of Llama 3."""
    loading.save(tiny.llama3(), tiny.tokenizer(), tmp_path / "tiny")
    evaluated = {"eval_forget": FORGET, "eval_retain": RETAIN, "eval_strategy": "steps"}
    config = settings_file(tmp_path, eval_steps=2, sample_replies=1, **evaluated)
    out = tmp_path / "out"
    assert main(["unlearn", "--config", config]) == 0
    told = capsys.readouterr().out
    for words in ("4 steps", "eval_kl_loss", "mollm evaluate --model", str(out / "model")):
        assert words in told
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "checkpoint-2",
        "checkpoint-4",
        "history.jsonl",
        "model",
        "report.html",
        "run.json",
    }
    assert len((out / "history.jsonl").read_text().splitlines()) == 4
    (following,) = (line for line in told.splitlines() if line.startswith("Next: mollm "))
    quick = ["--max-new-tokens", "2", "--resamples", "2", "--limit", "2"]
    command = [*shlex.split(following)[2:], *quick, "--out", str(tmp_path / "evaluation")]
    assert main(command) == 0
    assert "forget_probability" in capsys.readouterr().out

    # What a run leaves that was killed after its second step: no model, and a half written save.
    first = weights(out / "model")
    for name in ("model", "checkpoint-4"):
        os.rename(out / name, tmp_path / f"gone-{name}")
    (out / ".unfinished-x" / "checkpoint-3").mkdir(parents=True)
    (out / ".unfinished-history.jsonl").touch()
    assert main(["unlearn", "--config", config, "--resume"]) == 0
    second = weights(out / "model")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list(out.glob(".unfinished-*"))
    before = weights(tmp_path / "tiny")
    assert any(not torch.equal(first[name], before[name]) for name in first)
    assert torch.equal(first["lm_head.weight"], before["lm_head.weight"])
    assert main(["unlearn", "--config", config, "--resume"]) == 2
    assert "has finished" in capsys.readouterr().err


def first_rows(folder, path, count):
    """Of a sample that ships with the package."""
    short = folder / Path(path).name
    short.write_text("\n".join(Path(path).read_text().splitlines()[:count]))
    return str(short)


@pytest.mark.model
def test_smollm2_forgets_resumes_evaluates_and_exports(tmp_path, capsys):
    """The real model, the same two rows in every step: all but the quality of a full run."""
    loading.save(*loading.load(loading.find_model(None), torch.device("cpu")), tmp_path / "tiny")
    forget, retain = (first_rows(tmp_path, path, 2) for path in (FORGET, RETAIN))
    evaluated = {"eval_forget": forget, "eval_retain": retain, "eval_strategy": "steps"}
    config = settings_file(
        tmp_path,
        forget=forget,
        retain=retain,
        **evaluated,
        eval_steps=2,
        max_steps=2,
        save_steps=1,
        max_length=128,
        learning_rate=2e-5,
        per_device_train_batch_size=2,
        sample_replies=0,
    )
    out = tmp_path / "out"
    assert main(["unlearn", "--config", config]) == 0
    os.rename(out / "model", tmp_path / "whole")  # as if it had been killed in its second step
    shutil.rmtree(out / "checkpoint-2")
    assert (out / "checkpoint-1").is_dir()
    assert main(["unlearn", "--config", config, "--resume"]) == 0
    whole, resumed = (
        folder / "model.safetensors" for folder in (tmp_path / "whole", out / "model")
    )
    assert whole.read_bytes() == resumed.read_bytes()

    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    found = re.search(r"eval_forget_loss (\S+)", capsys.readouterr().out.rpartition("2 steps")[2])
    forget = [*(step["losses"]["forget"] for step in history), float(found[1])]
    assert len(history) == 2
    assert forget == sorted(forget, reverse=True)
    assert forget[-1] < 0.9 * forget[0]
    before, after = weights(tmp_path / "tiny"), weights(out / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".layers." in name or name == "model.norm.weight"}


def test_an_adapter_is_merged_into_the_exported_model(tmp_path, saved):
    config = settings_file(tmp_path, lora={"r": 2, "target_modules": ["q_proj"]})
    assert main(["unlearn", "--config", config]) == 0
    before, after = weights(saved), weights(tmp_path / "out" / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name}
    assert (tmp_path / "out" / "checkpoint-4" / "adapter_model.safetensors").is_file()


def test_flags_go_before_the_file_and_texts_become_numbers(tmp_path):
    config = settings_file(tmp_path)
    given = {"config": Path(config), "max_steps": 9, "set": ["save_steps=3", "max_loss_rise=1e-1"]}
    settings = read_settings(given)
    assert settings["max_steps"] == 9
    assert settings["save_steps"] == 3
    assert settings["learning_rate"] == 1e-3
    assert read_settings({"set": ["max_steps=1e2"]})["max_steps"] == 100
    assert settings["max_loss_rise"] == 0.1
    assert settings["retain"] == {"path": RETAIN, "schema": "tofu"}
    with pytest.raises(UsageError, match="learning_rate must be a number, but got 'fast'"):
        read_settings({"set": ["learning_rate=fast"]})


def test_yaml_that_reads_no_as_false_and_a_path_with_a_home(tmp_path, monkeypatch):
    settings = read_settings(
        {"set": ["save_strategy=no", "eval_strategy=off", "quantization=no", "report_to=none"]}
    )
    assert settings["save_strategy"] == settings["eval_strategy"] == "no"
    assert settings["quantization"] is None
    assert settings["report_to"] == "none"
    assert read_settings({"set": ["freeze_embeddings=no"]})["freeze_embeddings"] is False
    for said, meant in ((".mlp.", ".mlp."), ("[.mlp., norm]", [".mlp.", "norm"])):
        assert read_settings({"set": [f"trainable_parameters={said}"]}) == {
            "trainable_parameters": meant
        }
    assert read_settings({"set": ["run_name=7"]})["run_name"] == "7"
    with pytest.raises(UsageError, match="must have texts as keys, but got False"):
        (tmp_path / "run.yaml").write_text("no: 3\n")
        read_settings({"config": tmp_path / "run.yaml"})


def test_a_folder_may_be_in_the_home(tmp_path, saved, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(saved)
    config = settings_file(
        tmp_path, model="~/tiny", out="~/runs/x", max_steps=1, save_strategy="no"
    )
    assert main(["unlearn", "--config", config]) == 0
    assert (tmp_path / "runs/x/model/config.json").is_file()
    assert not (saved / "~").exists()


def test_skipped_steps_stand_in_the_summary_the_card_and_the_last_line(
    tmp_path, saved, capsys, monkeypatch
):
    from mollm.training import trainer

    record_of = trainer.record_of

    def without_the_last(step, *rest):
        record = record_of(step, *rest)
        return record if step % 4 else replace(record, status="NON_FINITE")

    monkeypatch.setattr(trainer, "record_of", without_the_last)
    assert main(["unlearn", "--config", settings_file(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = "1 of 4 steps were skipped, because a gradient was not finite"
    assert any(line.startswith("4 steps; ") and words in line for line in lines)
    assert words in lines[-1]
    assert words in (tmp_path / "out" / "README.md").read_text()


def test_a_run_that_leaves_weights_that_are_not_finite_fails(tmp_path, saved, capsys, monkeypatch):
    from mollm.training.trainer import MOLLMTrainer

    monkeypatch.setattr(MOLLMTrainer, "_broken", lambda self: ["model.norm.weight"])
    assert main(["unlearn", "--config", settings_file(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "Failed: weights must be finite" in out
    assert "wrote no model; there is no checkpoint" in out
    assert not (tmp_path / "out" / "model").exists()


def without_field(folder):
    (folder / "bad.jsonl").write_text('{"question": "Who?", "answer": "Ada"}\n{"question": "?"}\n')
    return str(folder / "bad.jsonl")


def one_row(folder, answer):
    row = {"question": "Who?", "answer": answer}
    (folder / "one.jsonl").write_text(json.dumps(row) + "\n")
    return str(folder / "one.jsonl")


def empty(folder):
    (folder / "empty.jsonl").touch()
    return str(folder / "empty.jsonl")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda _: {"model": None}, "model must be given"),
        (lambda _: {"model": "/no/model"}, "not on this machine"),
        (lambda _: {"forget": "none.jsonl"}, "none.jsonl, which is not on this machine"),
        (lambda f: {"forget": without_field(f)}, "line 2 must have the field answer"),
        (lambda f: {"retain": empty(f)}, "must hold at least one row"),
        (lambda f: {"forget": one_row(f, "long " * 200)}, "shorten the answer"),
        (lambda _: {"forget": RETAIN}, "24 of 24 are"),
        (lambda _: {"method": "magic"}, "method must be one of"),
        (lambda _: {"lora": "wide"}, "lora must be a rank or options"),
        (lambda _: {"lora": True}, "lora must be a rank or options"),
        (lambda _: {"quantization": "nf4"}, "quantization must go with an adapter"),
        (lambda _: {"freeze_embeddings": "no"}, "freeze_embeddings must be true or false"),
        (lambda _: {"max_steps": 2.5}, "max_steps must be a whole number, but got 2.5"),
        (lambda _: {"save_total_limit": "few"}, "save_total_limit must be a whole number"),
        (lambda _: {"preferences": [1, 2]}, "one entry per objective"),
        (lambda _: {"fp16": True}, "fp16 must be left out"),
        (lambda _: {"speed": 3}, "a field of MOLLMConfig, but got 'speed'"),
        (lambda _: {"device": "abacus"}, "device must be cpu or cuda"),
        (lambda _: {"load_best_model_at_end": True}, "save_strategy must be that of evaluations"),
        (lambda _: {"lerning_rate": 3}, "'lerning_rate'; did you mean learning_rate?"),
        (lambda _: {"method": "molm"}, "but got 'molm'; did you mean mollm?"),
        (lambda _: {"report_to": "tensorbord"}, "did you mean tensorboard?"),
        (lambda _: {"lora": {"r": 4, "target_modules": ["q_projj"]}}, "did you mean q_proj?"),
        (lambda _: {"lora": {"r": 4, "modules_to_save": ["nope"]}}, "has none called 'nope'"),
        (lambda _: {"lora": {"rank": 4}}, "it has no 'rank'"),
        (lambda _: {"weight_decay": float("nan")}, "weight_decay must be a finite number"),
        (lambda _: {"weight_decay": -1}, "weight_decay must not be negative"),
        (lambda _: {"weight_decay": 1e30}, "weight_decay must be less than 1 / learning_rate"),
        (lambda _: {"max_grad_norm": float("nan")}, "max_grad_norm must be a finite number"),
        (lambda _: {"optimizer_options": {"weight_decay": float("inf")}}, "must be a finite"),
        (
            lambda _: {"max_grad_norm": 1, "optimizer_options": {"momentum": "per-objective"}},
            "max_grad_norm must be 0 with momentum='per-objective'",
        ),
        (
            lambda _: {"lora": 4, "optimizer_options": {"gradient_memory": "streamed"}},
            "gradient_memory must be another one than 'streamed' with an adapter",
        ),
        (lambda _: {"dataloader_num_workers": 4}, "dataloader_num_workers must be left out"),
        (lambda _: {"method": "npo", "uce_eps": 0.1}, "uce_eps must be left out with the method"),
        (lambda _: {"model": "m" * 300}, "model must be a name that a file can have"),
        (lambda _: {"out": "o" * 300}, "out must be a name that a file can have"),
        (lambda _: {"retain": {"path": "r" * 300}}, "retain must be a name that a file can have"),
        (lambda _: {"out": "/proc/x/y"}, "out must be a folder that can be written"),
        (lambda _: {"model": False}, "model must be a text, but got False"),
        (lambda _: {"method": True}, "method must be a text, but got True"),
        (lambda _: {"optimizer_options": 3}, "optimizer_options must be options by name"),
    ],
)
def test_mistakes_are_one_sentence_before_a_model_is_loaded(
    tmp_path, saved, capsys, monkeypatch, changed, words
):
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("too late"))
    assert main(["unlearn", "--config", settings_file(tmp_path, **changed(tmp_path))]) == 2
    captured = capsys.readouterr()
    sentence = [line for line in captured.err.splitlines() if line.startswith("mollm: ")]
    assert len(sentence) == 1
    assert words in sentence[0]
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"lora": 4, "gradient_checkpointing": True},
        {
            "reference": "cache",
            "freeze_embeddings": False,
            "gradient_accumulation_steps": 3,
            "optimizer_options": {"base": "sgd", "gradient_memory": "bfloat16"},
        },
        {"optimizer_options": {"gradient_memory": "streamed"}, "adam_beta2": 0},
    ],
    ids=["full", "lora", "sgd", "streamed"],
)
def test_a_run_is_held_against_the_memory_before_its_model_is_loaded(
    tmp_path, saved, capsys, caplog, monkeypatch, changed
):
    def available(gib):
        monkeypatch.setattr(machine, "available_memory", lambda device: gib * GIB)
        monkeypatch.setattr(loading, "load", loaded)
        capsys.readouterr()

    def loaded(*_, **__):
        raise UsageError("loaded")

    def planned(text):
        line = re.search(r"`(mollm plan .*)`", text)[1]
        status = main([*shlex.split(line)[1:], "--device-memory", "0.001"])
        peak = float(re.search(r"The peak is (\S+) GiB", capsys.readouterr().out)[1])
        return status, peak

    config = settings_file(tmp_path, **changed)
    available(1e-5)
    assert main(["unlearn", "--config", config]) == 2
    told = capsys.readouterr().err
    assert "mollm: the model tiny must fit into memory, but" in told
    assert not (tmp_path / "out").exists()
    assert ("--gradient-checkpointing" in told) is ("lora" in changed)
    status, peak = planned(told)
    assert status == 1

    available(0.97 * peak)  # the allowance for Torch alone is most of it
    assert main(["unlearn", "--config", config]) == 2
    assert capsys.readouterr().err.endswith("mollm: loaded\n")
    assert re.search(r"rows of \d+ tokens, the longest of the data", caplog.text)
    assert planned(caplog.text)[1] == peak
    caplog.clear()

    available(1.03 * peak)
    assert main(["unlearn", "--config", config]) == 2
    assert capsys.readouterr().err.endswith("mollm: loaded\n")
    assert "mollm plan" not in caplog.text


def test_a_model_that_cannot_be_planned_passes(tmp_path, capsys, monkeypatch):
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    monkeypatch.setattr(machine, "available_memory", lambda device: 1e4)

    def unknown(config, label):
        raise UsageError(f"the memory of the model {label} cannot be planned.")

    monkeypatch.setattr(planning_run, "shape_of", unknown)
    assert main(["unlearn", "--config", settings_file(tmp_path, max_steps=1)]) == 0


def test_a_folder_that_holds_something_is_left_alone(tmp_path, saved, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert main(["unlearn", "--config", settings_file(tmp_path)]) == 2
    assert "out must be a new or empty folder, but" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_what_a_killed_run_left_before_its_first_save_is_in_nobodys_way(tmp_path, saved):
    (tmp_path / "out" / ".unfinished-x" / "checkpoint-2").mkdir(parents=True)
    assert main(["unlearn", "--config", settings_file(tmp_path)]) == 0
    assert not list((tmp_path / "out").glob(".unfinished-*"))


def test_a_checkpoint_of_another_model_is_refused(tmp_path, saved, capsys):
    assert main(["unlearn", "--config", settings_file(tmp_path)]) == 0
    os.rename(tmp_path / "out" / "model", tmp_path / "gone")
    loading.save(tiny.model(seed=3), tiny.tokenizer(), saved)
    before = sorted(str(path) for path in (tmp_path / "out").rglob("*"))
    assert main(["unlearn", "--config", settings_file(tmp_path), "--resume"]) == 2
    assert "cannot resume from" in capsys.readouterr().err
    assert before == sorted(str(path) for path in (tmp_path / "out").rglob("*"))


def test_a_run_that_diverges_writes_no_model(tmp_path, saved, capsys):
    config = settings_file(tmp_path, max_loss_rise=1e-9, learning_rate=0.1)
    assert main(["unlearn", "--config", config]) == 1
    assert "Stopped early, and wrote no model" in capsys.readouterr().out
    assert not (tmp_path / "out" / "model").exists()


def killed(folder, kills, timeout):
    told = launch.succeeds(TESTS / "killed_runs.py", folder, kills, seconds=timeout)
    assert f"killed {kills}" in told
    return told


def test_a_killed_run_resumes_to_the_same_model(tmp_path):
    killed(tmp_path, 3, timeout=120)


@pytest.mark.soak
def test_a_run_killed_at_a_hundred_moments_resumes_to_the_same_model(tmp_path):
    print(killed(tmp_path, 100, timeout=3600))


@pytest.mark.soak
def test_full_disks_lose_nothing_and_jumping_clocks_change_nothing(tmp_path):
    told = launch.succeeds(TESTS / "faulty_machines.py", tmp_path, seconds=1800)
    assert told.count(": True") >= 7


def test_a_setting_that_was_renamed_is_refused_with_its_new_name(tmp_path, saved, capsys):
    assert main(["unlearn", "--config", settings_file(tmp_path, divergence=3.0)]) == 2
    assert "divergence is now max_loss_rise, but got it with 3.0" in capsys.readouterr().err


def test_every_option_is_a_setting_with_the_type_that_it_has_in_a_file():
    own = {"config", "set", "method_option", "resume", "help", "quiet", "json", *OWN_SETTINGS}
    known = {f.name: f for f in fields(MOLLMConfig)}
    commands = argparse.ArgumentParser().add_subparsers()
    unlearn.add_parser(commands)
    actions = {a.dest: a for a in commands.choices["unlearn"]._actions}
    assert set(actions) - own <= set(known)
    for name in set(actions) - own:
        default, kind = known[name].default, actions[name].type or str
        kind = bool if actions[name].const is True else kind
        assert default is None or isinstance(default, kind | int), name


def test_the_end_as_json_and_nothing_else(tmp_path, saved, capfd):
    config = settings_file(tmp_path, max_steps=2, stop_when={"forget_probability": 0.5})
    assert main(["unlearn", "--config", config, "--json"]) == 0
    found, told = capfd.readouterr()
    end = json.loads(found)
    assert end["model"] == str(tmp_path / "out/model")
    assert end["steps"] == 2
    assert "the target is reached" in end["stop_when"]
    assert "What carries the loss" in told
    assert "step 1 of 2, forget" in told  # in place of a bar, for there is no terminal
    facts = json.loads((tmp_path / "out/run.json").read_text())
    assert facts["planned_gib"] > 0.1
    assert facts["given"]["forget"] == FORGET
    assert len(facts["replies"]) == 8


def test_a_quiet_run_prints_its_end(tmp_path, saved, capfd):
    config = settings_file(tmp_path, max_steps=2)
    assert main(["unlearn", "--config", config, "--quiet"]) == 0
    found, told = capfd.readouterr()
    assert found.startswith("\n2 steps")
    assert "step 1 of 2" not in told
    assert "%" not in told


def test_what_was_given_is_found_from_any_folder(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, path in (("ada", FORGET), ("bob", FORGET), ("kept", RETAIN)):
        lines = Path(path).read_text().splitlines()
        Path(f"{name}.jsonl").write_text("\n".join(lines[6:] if name == "bob" else lines[:6]))
    (tmp_path / "train").mkdir()  # a folder that is called as a split is
    forget = {"ada": "ada.jsonl", "bob": {"path": "bob.jsonl", "schema": "tofu"}}
    config = settings_file(tmp_path, forget=forget, retain={"path": "kept.jsonl", "schema": "tofu"})
    more = ["--max-steps", "1", "--set", "save_strategy=no", "--set", "sample_replies=0"]
    assert main(["unlearn", "--config", config, *more]) == 0
    given = json.loads((tmp_path / "out/run.json").read_text())["given"]
    assert json.loads(given["forget"]) == {
        "ada": str(tmp_path / "ada.jsonl"),
        "bob": {"path": str(tmp_path / "bob.jsonl"), "schema": "tofu"},
    }
    assert json.loads(given["retain"]) == {"path": str(tmp_path / "kept.jsonl"), "schema": "tofu"}


def test_steps_that_were_skipped_are_in_no_conflict_rate():
    skipped = replace(step(1), changes={}, conflicts={}, status="NON_FINITE")
    state = argparse.Namespace(log_history=[])
    history = [step(0, conflict="kl"), skipped, step(2)]
    text = unlearn.summary(argparse.Namespace(history=history, state=state))
    assert "1 of 3 steps were skipped" in text
    assert [line.split()[-1] for line in text.splitlines()[-3:]] == ["0%", "50%", "0%"]
    text = unlearn.summary(argparse.Namespace(history=[skipped], state=state))
    assert [line.split()[-1] for line in text.splitlines()[-3:]] == ["-", "-", "-"]


def test_hyperparameters_of_a_method_are_given_one_by_one(tmp_path):
    from mollm.commands.settings_file import read_settings

    config = settings_file(tmp_path, method="simnpo", method_options={"beta": 2.0, "delta": 1.0})
    found = read_settings({"config": config, "method_option": ["beta=3.5"]})
    assert found["method_options"] == {"beta": 3.5, "delta": 1.0}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method-option", "beta"], "method-option must be NAME=VALUE, but got 'beta'."),
        (["--method-option", "bet=1"], "must be of beta, but got 'bet'; did you mean beta?"),
        (["--method-option", "beta=no"], "beta of npo must be a number from 0, but got False."),
    ],
)
def test_a_hyperparameter_that_the_method_has_not_is_refused(flags, message, tmp_path, capsys):
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    config = settings_file(tmp_path, method="npo")
    assert main(["unlearn", "--config", config, *flags]) == 2
    assert message in capsys.readouterr().err
