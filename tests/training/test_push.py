"""Uploads, with the hub's client replaced by one that keeps what it is given."""

from pathlib import Path

import pytest
import tiny

pytest.importorskip("transformers")

import huggingface_hub

from mollm import MOLLMConfig, MOLLMTrainer, Record, UsageError


class Url(str):
    repo_id = "ann/my-model"


class Hub:
    calls = ()

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, **options):
        if repo_id == "refused/it":
            raise OSError("403 Forbidden.")
        type(self).calls += (("create", repo_id, self.token, options),)
        return Url("https://hub/ann/my-model")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        type(self).calls += (("upload", repo_id, files, commit_message),)


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Hub.calls = ()
    made = MOLLMTrainer(
        tiny.model(),
        MOLLMConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True, save_strategy="no"),
        forget_dataset=[Record("Who?", "Ann.")],
        retain_dataset=[Record("When?", "Then.")],
        processing_class=tiny.tokenizer(),
    )
    made.train()
    return made


def test_model_card_and_report_go_up_in_one_commit(trainer, tmp_path):
    url = trainer.push_to_hub("my-model", private=True, token="secret", commit_message="One")
    assert url == "https://hub/ann/my-model"
    made, sent = Hub.calls
    assert made == ("create", "my-model", "secret", {"private": True, "exist_ok": True})
    assert sent[1] == "ann/my-model"
    assert sent[3] == "One"
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "report.html"} <= (
        sent[2].keys()
    )
    assert sent[2]["report.html"] == (tmp_path / "report.html").read_bytes()
    assert str(tmp_path).encode() not in sent[2]["README.md"] + sent[2]["report.html"]
    assert "run.json" not in sent[2]


def test_what_the_hub_refuses_is_said_in_a_sentence(trainer):
    with pytest.raises(UsageError, match="cannot be uploaded to refused/it: 403 Forbidden: look"):
        trainer.push_to_hub("refused/it")
    assert not Hub.calls
