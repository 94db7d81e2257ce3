"""Uploads, with the hub's client replaced by one that keeps what it is given."""

from pathlib import Path

import pytest
import tiny

pytest.importorskip("transformers")

import huggingface_hub
from huggingface_hub.utils import filter_repo_objects

from mollm import MOLLMConfig, MOLLMTrainer, Record, UsageError

OLD = ["model-00001-of-00002.safetensors", "pytorch_model.bin", "adapter_config.json"]
OTHERS = ["notes.md", "vision/model.safetensors", "other/adapter_config.json", "tokenizer.json"]


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

    def list_repo_files(self, repo_id):
        return [*OLD, *OTHERS]

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        type(self).replaced = delete_patterns
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        type(self).calls += (("upload", repo_id, files, commit_message),)


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Hub.calls = ()
    made = MOLLMTrainer(
        tiny.model(),
        MOLLMConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            use_cpu=True,
            save_strategy="no",
            sample_replies=1,
        ),
        forget_dataset=[Record("Who wrote the secret book?", "Ann.")],
        retain_dataset=[Record("When?", "Then.")],
        processing_class=tiny.tokenizer(),
    )
    made.more_facts = {"command": "mollm unlearn --forget secrets.jsonl"}
    made.train()
    return made


def test_the_model_and_its_card_go_up_in_one_commit(trainer, tmp_path):
    url = trainer.push_to_hub("my-model", private=True, token="secret", commit_message="One")
    assert url == "https://hub/ann/my-model"
    made, sent = Hub.calls
    assert made == ("create", "my-model", "secret", {"private": True, "exist_ok": True})
    assert sent[1] == "ann/my-model"
    assert sent[3] == "One"
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= sent[2].keys()
    assert str(tmp_path).encode() not in sent[2]["README.md"]
    assert list(filter_repo_objects([*OTHERS, *OLD], allow_patterns=Hub.replaced)) == OLD
    assert not {"run.json", "report.html", "history.jsonl"} & sent[2].keys()


def test_a_report_goes_up_on_request_without_what_was_to_be_forgotten(trainer, tmp_path):
    pytest.importorskip("jinja2")
    own = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Who wrote the secret book?" in own
    assert "mollm unlearn --forget secrets.jsonl" in own
    trainer.push_to_hub("my-model", with_report=True)
    sent = Hub.calls[-1][2]["report.html"].decode()
    assert "Unlearning in" in sent
    assert "secret" not in sent
    assert str(tmp_path) not in sent


def test_what_the_hub_refuses_is_said_in_a_sentence(trainer):
    with pytest.raises(UsageError, match="cannot be uploaded to refused/it: 403 Forbidden: look"):
        trainer.push_to_hub("refused/it")
    assert not Hub.calls
