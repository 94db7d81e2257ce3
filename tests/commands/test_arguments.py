"""Flags that several commands share."""

from __future__ import annotations

import argparse
from importlib import import_module

import pytest

from mollm.commands.arguments import chat_options, chat_words, format_of
from mollm.commands.settings_file import read_settings
from mollm.errors import UsageError


def test_a_new_line_is_one_in_both_forms_of_a_prompt_format():
    assert format_of(r"Q: {question}\nA: {answer}") == "Q: {question}\nA: {answer}"
    text = r"{template: 'Q: {question}\nA: {answer}', prefix: 'Be brief.\n', stop: ['\n\n', 'Q:']}"
    assert format_of(text) == {
        "template": "Q: {question}\nA: {answer}",
        "prefix": "Be brief.\n",
        "stop": ["\n\n", "Q:"],
    }


def test_the_command_line_comes_before_the_run():
    settings = {
        "system_prompt": "Be kind.",
        "chat_template_kwargs": {"a": 1},
        "prompt_format": r"{question}\n{answer}",
    }
    run = {"settings": settings}
    assert chat_options({}, run) == settings  # the run's, letter by letter
    given = {"system_prompt": "", "chat_template_kwargs": "{a: 2}", "prompt_format": "none"}
    assert chat_options(given, run) == {
        "system_prompt": "",
        "chat_template_kwargs": {"a": 2},
        "prompt_format": "none",
    }
    assert set(chat_options({}, None).values()) == {None}
    with pytest.raises(UsageError, match="chat-template-kwargs must be options by name"):
        chat_options({"chat_template_kwargs": "thinking"}, run)


def test_the_flags_of_a_chat_say_what_it_is():
    chat = {
        "system_prompt": "",
        "chat_template_kwargs": {},
        "prompt_format": {"template": "Q: {question}\n{answer}"},
    }
    words = chat_words(chat)
    assert words[:3] == ["--system-prompt", "", "--prompt-format"]
    assert format_of(words[3]) == chat["prompt_format"]


@pytest.mark.parametrize("command", ["unlearn", "preview", "tune"])
def test_runs_take_the_flags_as_settings(command):
    parser = argparse.ArgumentParser(prog="mollm")
    import_module(f"mollm.commands.{command}").add_parser(parser.add_subparsers())
    words = [command, "--system-prompt", "Be kind.", "--chat-template-kwargs", "{a: 1}"]
    found = parser.parse_args([*words, "--prompt-format", r"Q: {question}\nA: {answer}"])
    names = ("system_prompt", "chat_template_kwargs", "prompt_format")
    assert read_settings({name: vars(found)[name] for name in names}) == {
        "system_prompt": "Be kind.",
        "chat_template_kwargs": {"a": 1},
        "prompt_format": "Q: {question}\nA: {answer}",
    }
    assert not set(names) & set(vars(parser.parse_args([command])))
