import time

import pytest
import tiny

from mollm.data.vetting import vet_template
from mollm.errors import UsageError
from mollm.system import child


def tokenizer(template):
    made = tiny.tokenizer()
    made.chat_template = template
    return made


def test_templates_that_end_pass():
    vet_template(tiny.tokenizer())
    vet_template(tiny.tokenizer(template=False))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "second",
        ),
        ("{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(200) }}", "recursion"),
        ("{{ 10 ** (10 ** 10) }}", "it takes more than 1 seconds"),
        ("{{ 'a' * 10000000000 }}", "more than 1 GiB of memory"),
        ("{{ raise_exception('never') }}", "it fails: never: put another into its chat_template"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("{% for %}", "it fails: "),
        ("{{ messages.nosuch }}", "it fails: it writes nothing"),
        (3, "it fails: "),
    ],
)
def test_a_template_that_does_not_end_is_refused_in_seconds(monkeypatch, template, words):
    monkeypatch.setattr("mollm.data.vetting._SECONDS", 1.0)
    started = time.monotonic()
    with pytest.raises(UsageError, match=words) as caught:
        vet_template(tokenizer(template))
    assert time.monotonic() - started < 5
    assert "\n" not in str(caught.value)


def test_what_a_task_does_stays_in_its_process(capfd):
    done = []
    assert child.why_not(lambda: (print("x"), done.append(1)), 5, 1 << 30) is None
    assert done == []
    assert capfd.readouterr().out == ""


def test_a_task_that_ends_its_process_is_told():
    import os

    assert child.why_not(lambda: os._exit(0), 5, 1 << 30) == (
        "it takes too much memory, or ends the process"
    )
    assert child.why_not(lambda: os.kill(os.getpid(), 9), 5, 1 << 30) is not None


def test_every_template_of_several_is_tried(monkeypatch):
    monkeypatch.setattr("mollm.data.vetting._SECONDS", 1.0)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UsageError, match="second"):
        vet_template(tokenizer({"default": tiny.TEMPLATE, "rag": endless}))
    with pytest.raises(UsageError, match="it fails: never"):
        vet_template(tokenizer({"default": "{{ raise_exception('never') }}", "rag": tiny.TEMPLATE}))
    vet_template(tokenizer({"default": tiny.TEMPLATE, "rag": tiny.TEMPLATE}))
    vet_template(tokenizer({"rag": tiny.TEMPLATE}))


def test_a_template_that_is_not_used_may_want_documents():
    rag = "{% for document in documents %}{{ document.text }}{% endfor %}" + tiny.TEMPLATE
    vet_template(tokenizer({"default": tiny.TEMPLATE, "rag": rag}))


def test_a_template_may_want_a_turn_of_the_system():
    vet_template(
        tokenizer(
            "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
            + tiny.TEMPLATE
        )
    )
