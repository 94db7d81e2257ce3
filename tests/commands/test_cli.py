import json
import os
import subprocess
import sys
import tempfile

import pytest
import tiny
import torch

import mollm
from mollm.cli import main
from mollm.commands import demo
from mollm.demo import quiz as quiz_module
from mollm.evaluation.generation import Reply
from mollm.models import loading
from mollm.system import machine


@pytest.fixture
def saved(tmp_path):
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    return str(tmp_path / "tiny")


def refused(capsys, *arguments):
    """The one sentence with which the command line refuses `arguments`."""
    assert main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    sentence = captured.err.strip()
    assert sentence.startswith("mollm: ")
    assert len(sentence.splitlines()) == 1
    assert "Traceback" not in sentence
    return sentence


def test_mistakes_are_told_in_one_sentence(capsys, tmp_path):
    out = str(tmp_path / "out")
    assert "did you mean Japan" in refused(capsys, "--forget", "Japn", "--out", out)
    assert "at least one country" in refused(capsys, "--forget", ",", "--out", out)
    assert "steps must be at least 1" in refused(capsys, "--steps", "0", "--out", out)
    assert "not on this machine" in refused(capsys, "--model", "/no/model", "--out", out)
    assert "device must be" in refused(capsys, "--device", "abacus", "--out", out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "llama-9"], "preset must be one of llama-3-8b"),
        (["--model", "/no/config.json"], "not on this machine"),
        (["--preset", "smollm2-135m", "--device-memory", "0"], "device_memory must be positive"),
        (["--preset", "smollm2-135m", "--reference", "adapter"], "give a lora_rank"),
        (
            ["--preset", "smollm2-135m", "--per-device-train-batch-size", "0"],
            "batch_size must be at least 1",
        ),
    ],
)
def test_mistakes_of_a_plan_are_told_in_one_sentence(capsys, arguments, words):
    assert main(["plan", *arguments]) == 2
    sentence = capsys.readouterr().err.strip()
    assert sentence.startswith("mollm: ")
    assert words in sentence
    assert len(sentence.splitlines()) == 1


def test_a_name_cannot_act_on_the_terminal_that_shows_it(capsys, saved, tmp_path):
    path = tmp_path / "new\nline \x1b[31mred.jsonl"
    path.write_text("{")
    given = ["--model", saved, "--forget", str(path), "--retain", str(path)]
    assert main(["preview", *given]) == 2
    sentence = capsys.readouterr().err.strip()
    assert len(sentence.splitlines()) == 1
    assert "\x1b" not in sentence
    assert "new\\nline \\x1b[31mred.jsonl" in sentence


def test_an_unwritable_folder_is_found_out_before_the_model_loads(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *arguments: pytest.fail("too late"))
    (tmp_path / "file").touch()
    assert "out must be a folder" in refused(capsys, "--out", str(tmp_path / "file"))


def test_too_little_memory_is_found_out_before_the_model_loads(
    capsys, tmp_path, saved, monkeypatch
):
    monkeypatch.setattr(loading, "load", lambda *arguments: pytest.fail("too late"))
    monkeypatch.setattr(machine, "available_memory", lambda device: 1e5)
    sentence = refused(capsys, "--model", saved, "--out", str(tmp_path / "out"))
    assert "the model tiny must fit into memory, but" in sentence
    assert f"`mollm plan --model {saved} " in sentence


def test_a_missing_extra_is_named(capsys, monkeypatch):
    def missing(arguments):
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf")

    monkeypatch.setattr(demo, "_demo", missing)
    assert "pip install 'mollm[train,eval]'" in refused(capsys)


def test_an_interrupt_is_no_traceback(capsys, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_demo", interrupted)
    assert main(["demo"]) == 130
    assert "existing results are unchanged" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("a\ndefect"), ModuleNotFoundError("x", name="x")])
def test_a_defect_is_told_in_one_sentence_with_its_log(capsys, monkeypatch, tmp_path, error):
    def broken(arguments):
        raise error

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(demo, "_demo", broken)
    assert main(["demo"]) == 70
    captured = capsys.readouterr()
    (log,) = tmp_path.glob("mollm-*.log")
    assert captured.err.startswith("mollm: this is a defect")
    assert captured.err.endswith(f"please report it with {log}.\n")
    assert len(captured.err.splitlines()) == 1
    assert "in broken" in log.read_text()
    monkeypatch.setenv("MOLLM_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["demo"])


def test_a_run_ends_with_a_table(capsys, saved, tmp_path, monkeypatch):
    def ask(model, chat, texts, **options):
        return [Reply(text, complete=True) for text in tiny.knowing_replies(texts)]

    monkeypatch.setattr(quiz_module, "ask", ask)
    out = tmp_path / "out"
    status = main(
        ["demo", "--model", saved, "--steps", "1", "--forget", "Peru,France", "--out", str(out)]
    )
    assert status == 0
    text = capsys.readouterr().out
    assert "To forget: Peru, France." in text
    assert [line.split()[0] for line in text.splitlines() if "100%" in line][:4] == [
        "Forget", "Retain", "Held-out", "General",
    ]  # fmt: skip
    assert str(out / "report.html") in text


def test_help_and_module_entry():
    done = subprocess.run(
        [sys.executable, "-m", "mollm", "demo", "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for option in ("--model", "--steps", "--lr", "--seed", "--forget", "--method", "--out"):
        assert option in done.stdout


def test_every_command_is_listed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n    {name} " in text for name in ("demo", "evaluate", "plan", "doctor"))


def test_no_command_is_answered_with_help(capsys):
    assert main([]) == 0
    assert "commands:" in capsys.readouterr().out


def test_threads_wait_as_the_user_says_or_spin_for_a_moment(monkeypatch):
    names = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # and is put back afterwards
    assert main([]) == 0
    assert [os.environ[name] for name in names] == ["PASSIVE", "4000"]
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    assert main([]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert "GOMP_SPINCOUNT" not in os.environ


def test_importing_does_nothing():
    code = "import mollm.cli, mollm.__main__, sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"mollm {mollm.__version__}\n"


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_too_little_memory_is_told_with_what_needs_less(capsys, monkeypatch, error):
    def hungry(arguments):
        raise error

    monkeypatch.setattr(demo, "_demo", hungry)
    sentence = refused(capsys)
    assert all(way in sentence for way in ("per_device_train_batch_size", "--max-length", "plan`"))


def test_a_reader_that_has_read_enough_ends_a_command_quietly():
    command = [sys.executable, "-m", "mollm", "plan", "--preset", "smollm2-135m"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"),
    ],
)
def test_a_full_disk_is_no_defect(capsys, monkeypatch, error):
    def run(*_):
        raise error

    monkeypatch.setattr(demo, "_demo", run)
    assert main(["demo"]) == 2
    assert "mollm: the disk is full or cannot be written (" in capsys.readouterr().err


def test_a_defect_is_told_where_its_log_cannot_be_written(capsys, monkeypatch, tmp_path):
    def broken(arguments):
        raise RuntimeError("odd")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    monkeypatch.setattr(demo, "_demo", broken)
    assert main(["demo"]) == 70
    assert "odd" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_flags(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("unlearn", "evaluate", "gradient-checkpointing", "max-new-tokens"):
        assert word in script


def test_a_plan_as_json(capsys):
    pytest.importorskip("transformers")
    words = ["plan", "--preset", "llama-3.2-1b", "--device", "cuda", "--device-memory", "12"]
    assert main([*words, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert found["peak"]["bytes"] == max(sum(p.values()) for p in found["stages"].values())
    assert found["proposals"][-1]["peak_bytes"] < found["peak"]["bytes"]
    assert main(words) == 1
    shown = f"{found['peak']['bytes'] / (1 << 30):.2f} GiB"
    assert shown[:4] in capsys.readouterr().out
