import pytest
import tiny

pytest.importorskip("transformers")

from mollm.cli import main
from mollm.commands.settings_file import read_settings
from mollm.data.files import sample_path
from mollm.models import loading
from mollm.planning.first_settings import FirstSettings, first_settings, written
from mollm.planning.memory import plan
from mollm.planning.settings import OPTIONS, PlanSettings, flag_of
from mollm.planning.shapes import shape_named
from mollm.system.units import GIB
from mollm.training.config import MOLLMConfig

FORGET, RETAIN = (str(sample_path(f"authors-{role}.jsonl")) for role in ("forget", "retain"))


@pytest.fixture
def words(tmp_path):
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    return [
        *("init", str(tmp_path / "run.yaml"), "--model", str(tmp_path / "tiny")),
        *("--forget", FORGET, "--retain", RETAIN, "--out", str(tmp_path / "out")),
        *("--device", "cpu"),
    ]


def test_the_file_is_one_that_a_run_takes(words, tmp_path, capsys):
    assert main(words) == 0
    text = (tmp_path / "run.yaml").read_text()
    settings = read_settings({"config": tmp_path / "run.yaml"})
    assert settings["forget"] == FORGET
    assert settings["max_length"] == 192  # the longest row has 151 tokens
    assert settings["per_device_train_batch_size"] == 8
    assert settings["max_steps"] == 12
    assert settings["learning_rate"] == 1e-3
    assert "forget: 12 rows of 105 to" in text
    assert all("#" in line for line in text.splitlines() if line and ":" in line)
    own = ("model:", "forget:", "retain:", "out:")  # as long as their paths
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith(own))
    short = ["--max-steps", "1", "--set", "sample_replies=1", "--set", "save_strategy=no"]
    assert main(["unlearn", "--config", str(tmp_path / "run.yaml"), *short]) == 0
    assert (tmp_path / "out/report.html").is_file()
    capsys.readouterr()
    assert main(words) == 2
    assert "must be a new file" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0


def test_mistakes(words, capsys):
    assert main([*words, "--device-memory", "-1"]) == 2
    assert "device_memory must be positive" in capsys.readouterr().err


@pytest.mark.parametrize("gib", [None, 400, 80, 30, 16])
def test_what_is_chosen_fits_where_something_does(gib):
    shape = shape_named("llama-3-8b")
    settings = PlanSettings(sequence_length=8192)
    memory = None if gib is None else gib * GIB
    first = first_settings(shape, settings, memory, longest=300, forget_rows=400)
    if gib is not None:
        assert first.fits
        assert first.plan.peak.total <= memory
        assert bool(first.changes) == (gib < 400)
    chosen = first.by_name()
    assert chosen["max_length"] == 320
    rows = chosen["per_device_train_batch_size"] * chosen["gradient_accumulation_steps"]
    assert rows == 8
    assert chosen["max_steps"] == 60
    chosen.pop("quantization", None)
    lora = chosen.pop("lora", None)
    assert chosen["learning_rate"] == (1e-4 if lora else 1e-5)
    MOLLMConfig(output_dir="unused", use_cpu=True, **chosen)


@pytest.mark.parametrize("gib", [80, 30, 24, 20, 16])
def test_what_is_written_plans_as_what_was_proposed(gib):
    shape = shape_named("llama-3-8b")
    given = PlanSettings(sequence_length=8192)
    first = first_settings(shape, given, gib * GIB, longest=300, forget_rows=400)
    chosen = first.by_name()
    chosen |= chosen.pop("optimizer_options", {})
    names = {flag_of(name).removeprefix("--").replace("-", "_"): name for name in OPTIONS}
    read = {names[name]: value for name, value in chosen.items() if name in names}
    reference = "adapter" if read.get("lora_rank") else "copy"  # what a run takes
    again = plan(shape, PlanSettings(**{"reference": reference, "freeze_embeddings": True, **read}))
    assert again.peak.total == first.plan.peak.total <= gib * GIB


def test_narrow_weights_are_written_into_the_file():
    proposed = PlanSettings(dtype="bfloat16", adam_beta2=0.0, freeze_embeddings=True)
    made = FirstSettings(plan(shape_named("llama-3-8b"), proposed), (), True, 1e-5, 12)
    text = written({"model": "m"}, made, "")
    assert 'dtype: "bfloat16"' in text
    assert "adam_beta2: 0 " in text


def test_a_device_is_written_where_it_is_given(words, tmp_path):
    assert main(words) == 0
    assert read_settings({"config": tmp_path / "run.yaml"})["device"] == "cpu"
    assert main([*words[:-2], "--force"]) == 0
    assert "device" not in read_settings({"config": tmp_path / "run.yaml"})
