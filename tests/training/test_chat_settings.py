"""Settings of the chat template reach the rows, the identity of a run and the commands."""

import datetime
import json

import chat_templates
import pytest
import tiny
from transformers.utils import chat_template_utils

from mollm.cli import main
from mollm.commands.unlearn import evaluate_line
from mollm.data.records import Record
from mollm.errors import UsageError
from mollm.models import loading
from mollm.training.config import MOLLMConfig
from mollm.training.trainer import MOLLMTrainer

FORGET = [Record(f"Who wrote book {n}?", f"Ada {n}.") for n in range(4)]
RETAIN = [Record(f"How many legs has animal {n}?", "Four.") for n in range(4)]


def make(out, template=None, tokenizer=None, forget=FORGET, **options):
    tokenizer = tokenizer or tiny.tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    settings = {
        "output_dir": str(out),
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return MOLLMTrainer(
        tiny.model(),
        MOLLMConfig(**settings | options),
        forget_dataset=forget,
        retain_dataset=RETAIN,
        processing_class=tokenizer,
    )


def test_a_run_is_resumed_on_another_day_as_on_the_same(tmp_path, monkeypatch):
    class Clock(datetime.datetime):
        day = datetime.datetime(2026, 11, 9)

        @classmethod
        def now(cls, tz=None):
            return cls.day

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    dated = "{{ '<|start|>system\n' + strftime_now('%d %b %Y') + '<|end|>\n' }}" + tiny.TEMPLATE
    whole = make(tmp_path / "whole", dated)
    whole.train()
    assert whole.resume_signature["date in the chat template"] == "2024-07-26"
    make(tmp_path / "run", dated, max_steps=2, lr_scheduler_type="constant").train()
    monkeypatch.setattr(Clock, "day", datetime.datetime(2027, 1, 1))
    resumed = make(tmp_path / "run", dated)
    assert resumed._data.rows == whole._data.rows
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.history) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"system_prompt": "Be kind."}, "system_prompt was .* and is now Be kind"),
        ({"train_on_turns": "all"}, "train_on_turns was last and is now all"),
        ({"template": tiny.TEMPLATE + " "}, "chat template was .* and is now"),
    ],
)
def test_a_run_goes_on_only_in_the_same_format(tmp_path, change, words):
    make(tmp_path, max_steps=2).train()
    with pytest.raises(UsageError, match=words):
        make(tmp_path, **change).train(resume_from_checkpoint=True)


def test_options_of_the_template_reach_rows_and_card(tmp_path):
    options = {"chat_template_kwargs": {"enable_thinking": False}, "system_prompt": "Be kind."}
    made = make(tmp_path, chat_templates.QWEN_3, **options)
    assert "Be kind." in made.processing_class.decode(made._data.rows["forget"][0].ids)
    assert made.resume_signature["chat_template_kwargs"] == {"enable_thinking": False}
    assert "enable_thinking" in made.model_card()
    assert "Be kind." in made.model_card()
    assert not any("generation" in note for note in made.notes)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"system_prompt": 3}, "system_prompt must be a text, but got 3"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs must be options by name, but got 'x"),
        ({"train_on_turns": "first"}, "train_on_turns must be one of last, all, but got 'first'"),
        ({"chat_template_kwargs": {"thinking": 1}}, "but got 'thinking': leave it out"),
    ],
)
def test_settings_that_are_none_are_refused(tmp_path, option, words):
    with pytest.raises(UsageError, match=words):
        make(tmp_path, **option)


def test_padding_and_ids_beyond_the_embeddings(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    made = make(tmp_path, tokenizer=tokenizer)
    made.train()
    plain = make(tmp_path / "plain")
    plain.train()
    assert [r.losses for r in made.history] == [r.losses for r in plain.history]
    unknown = [Record("Who?", "I [PAD] am.", "rows.jsonl", 7, "line"), *FORGET]
    with pytest.raises(UsageError, match=r"rows\.jsonl, line 7: the tokenizer gives '\[PAD\]' the"):
        make(tmp_path, tokenizer=tokenizer, forget=unknown)


def test_the_commands_take_the_settings(tmp_path, capsys):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = chat_templates.QWEN_3
    loading.save(tiny.model(), tokenizer, tmp_path / "model")
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        lines = [json.dumps({"prompt": row.prompt, "answer": row.answer}) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = [f"--{name}={tmp_path / name}.jsonl" for name in ("forget", "retain")]
    common = ["--model", str(tmp_path / "model"), *data]
    options = "{enable_thinking: false}"
    unlearn = [*common, "--out", str(tmp_path / "run"), "--max-steps", "1", "--device", "cpu"]
    unlearn += ["--set", f"chat_template_kwargs={options}", "--set", "system_prompt=Be kind."]
    assert main(["unlearn", *unlearn]) == 0
    assert "--system-prompt 'Be kind.'" in capsys.readouterr().out
    out = tmp_path / "evaluation"
    evaluate = [*common, "--out", str(out), "--max-new-tokens", "2", "--resamples", "2"]
    evaluate += ["--system-prompt", "Be kind.", "--chat-template-kwargs", options]
    assert main(["evaluate", *evaluate]) == 0
    about = json.loads((out / "about.json").read_text())
    assert about["chat"]["chat_template_kwargs"] == {"enable_thinking": False}
    assert about["chat"]["system_prompt"] == "Be kind."
    other = ["--out", str(tmp_path / "other"), "--retain-logs", str(out)]
    assert main(["evaluate", *evaluate, *other, "--system-prompt", "Be brief."]) != 0
    assert "the retain logs must be of the same system_prompt" in capsys.readouterr().err
    known, about["chat"]["chat template"] = about["chat"]["chat template"], "another"
    (out / "about.json").write_text(json.dumps(about))
    assert main(["evaluate", *evaluate, *other]) != 0
    assert "the retain logs must be of the same chat template" in capsys.readouterr().err
    about["chat"]["chat template"] = known
    (out / "about.json").write_text(json.dumps(about))
    assert main(["evaluate", *evaluate, *other]) == 0
    assert main(["evaluate", *evaluate[:-1], "thinking"]) != 0
    assert "chat-template-kwargs must be options by name" in capsys.readouterr().err


def test_the_next_command_repeats_the_settings(tmp_path):
    settings = {"model": "m", "forget": "f", "retain": "r", "system_prompt": "Be kind."}
    assert "--system-prompt ''" in evaluate_line(settings | {"system_prompt": ""}, tmp_path)
    line = evaluate_line(settings | {"chat_template_kwargs": {"a": 1}}, tmp_path)
    assert "--system-prompt 'Be kind.'" in line
    assert """--chat-template-kwargs '{"a": 1}'""" in line
