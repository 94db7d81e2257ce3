"""Rows are what a chat template writes, token for token, whatever its habits."""

import datetime

import chat_templates
import pytest
import tiny
from transformers.utils import chat_template_utils

from mollm.data.chat import IGNORE_INDEX, ChatFormat, Example
from mollm.data.conversations import Turn
from mollm.data.templates import DATE
from mollm.errors import UsageError

TEMPLATES = sorted(chat_templates.ALL)
QUESTION, ANSWER = "Where is Oslo?", "It lies in Norway, so they say."


class Clock(datetime.datetime):
    """A clock that stands still."""

    day = DATE

    @classmethod
    def now(cls, tz=None):
        return cls.day


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    monkeypatch.setattr(Clock, "day", DATE)
    return Clock


def written(tokenizer, *turns, **options):
    """What the template itself writes."""
    content = (
        (lambda text: [{"type": "text", "text": text}])
        if "part.type" in str(tokenizer.chat_template)
        else str
    )
    messages = [{"role": role, "content": content(text)} for role, text in turns]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


def with_loss(tokenizer, tokens):
    return tokenizer.decode([i for i in tokens.labels if i != IGNORE_INDEX])


@pytest.mark.parametrize("kind", ["bytes", "marks"])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (QUESTION, ANSWER),
        (" Who? \n", "\n Anna wrote it. "),
        ("Why?", "<think>\nIt is so.\n</think>\n\nSo."),
        ("The", "The"),
    ],
)
def test_a_row_is_what_the_template_writes(clock, name, kind, question, answer):
    tokenizer = chat_templates.make(name, kind)
    tokens = ChatFormat(tokenizer).encode(Example(question, answer))
    # white space around an answer is no part of it, whether the template trims it or not
    assert tokens.ids == written(tokenizer, ("user", question), ("assistant", answer.strip()))
    said = answer.rpartition("</think>")[2].strip()
    ends = "" if name == "glm 4" else "</s>" if name in ("llama 2", "mistral", "r1") else "<|end|>"
    ends = "<|return|>" if name == "gpt-oss" else ends
    counted = "".join(with_loss(tokenizer, tokens).split())
    assert "".join(said.split()) in counted
    assert counted.endswith(ends)
    assert "".join(question.split()) not in counted or question == answer
    assert all(b in (IGNORE_INDEX, a) for a, b in zip(tokens.ids, tokens.labels, strict=True))


@pytest.mark.parametrize("kind", ["bytes", "marks"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_model_is_asked_with_what_precedes_an_answer(clock, name, kind):
    chat = ChatFormat(chat_templates.make(name, kind))
    row, asked = chat.encode(Example(QUESTION, ANSWER)), chat.encode_prompt(QUESTION)
    first = next(i for i, label in enumerate(row.labels) if label != IGNORE_INDEX)
    # that a space comes before an answer is the model's to write
    assert asked.ids == row.ids[: len(asked.ids)]
    assert not chat.tokenizer.decode(row.ids[len(asked.ids) : first]).strip()
    assert set(asked.labels) == {IGNORE_INDEX}


@pytest.mark.parametrize("kind", ["bytes", "marks"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_tokenizer_that_tells_no_places_gives_the_same_rows(monkeypatch, name, kind):
    tokenizer = chat_templates.make(name, kind)
    before = (Turn("user", "Who?"), Turn("assistant", "Anna wrote it."))
    example = Example(QUESTION, ANSWER, history=before)
    expected = ChatFormat(tokenizer).encode(example, on_turns="all")
    asked = ChatFormat(tokenizer).encode_prompt(example)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert ChatFormat(tokenizer).encode(example, on_turns="all") == expected
    assert ChatFormat(tokenizer).encode_prompt(example) == asked


@pytest.mark.parametrize("on_turns", ["last", "all"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_what_the_template_writes(clock, name, on_turns):
    tokenizer = chat_templates.make(name)
    before = (Turn("user", "Who?"), Turn("assistant", "<think>\nHm.\n</think>\n\nAnna."))
    tokens = ChatFormat(tokenizer).encode(
        Example(QUESTION, ANSWER, history=before), on_turns=on_turns
    )
    assert tokens.ids == written(tokenizer, *before, ("user", QUESTION), ("assistant", ANSWER))
    said = with_loss(tokenizer, tokens)
    assert ANSWER in said
    assert ("Anna." in said) == (on_turns == "all")
    assert QUESTION not in said


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_system_prompt_is_written_as_a_turn_or_before_the_question(clock, name):
    tokenizer = chat_templates.make(name)
    chat = ChatFormat(tokenizer, system_prompt="Be brief.")
    tokens = chat.encode(Example(QUESTION, ANSWER))
    turns = [("system", "Be brief."), ("user", QUESTION)]
    if name in ("mistral", "gemma"):
        turns = [("user", f"Be brief.\n\n{QUESTION}")]
        assert "takes no system prompt" in chat.note
    assert tokens.ids == written(tokenizer, *turns, ("assistant", ANSWER))
    assert "Be brief." not in with_loss(tokenizer, tokens)
    assert chat.identity["system_prompt"] == "Be brief."
    own = chat.encode(Example(QUESTION, ANSWER, history=(Turn("system", "Be kind."),)))
    assert "Be kind." in tokenizer.decode(own.ids)
    assert "Be brief." not in tokenizer.decode(own.ids)


def test_a_template_that_wants_a_turn_of_the_system_wants_a_system_prompt():
    wants = "{% if messages[0].role != 'system' %}{{ raise_exception('none') }}{% endif %}"
    tokenizer = chat_templates.make("phi 3", template=wants + chat_templates.NO_GENERATION_PROMPT)
    with pytest.raises(UsageError, match="without which it fails: give a system_prompt"):
        ChatFormat(tokenizer)
    chat = ChatFormat(tokenizer, system_prompt="Be brief.")
    turns = ("system", "Be brief."), ("user", QUESTION), ("assistant", ANSWER)
    assert chat.encode(Example(QUESTION, ANSWER)).ids == written(tokenizer, *turns)
    assert ANSWER in with_loss(tokenizer, chat.encode(Example(QUESTION, ANSWER)))


def test_options_reach_the_template_and_the_identity():
    tokenizer = chat_templates.make("qwen 3")
    chat = ChatFormat(tokenizer, template_kwargs={"enable_thinking": False})
    assert chat.identity["chat_template_kwargs"] == {"enable_thinking": False}
    assert chat.identity != ChatFormat(tokenizer).identity
    # switched off, the generation prompt is what precedes an answer
    assert chat.note is None
    assert chat.encode_prompt(QUESTION).ids == written(
        tokenizer, ("user", QUESTION), add_generation_prompt=True, enable_thinking=False
    )
    assert "its replies to the former are not measured" in ChatFormat(tokenizer).note


@pytest.mark.parametrize("name", ["enable_thoughts", "add_generation_prompt", "tokenize"])
def test_options_that_are_none_of_the_template_are_refused(name):
    with pytest.raises(UsageError, match=f"chat_template_kwargs must hold .* but got '{name}'"):
        ChatFormat(chat_templates.make("qwen 3"), template_kwargs={name: True})


def test_options_without_a_template_are_refused():
    with pytest.raises(UsageError, match="must go with a chat template, but got"):
        ChatFormat(tiny.tokenizer(template=False), template_kwargs={"enable_thinking": False})


@pytest.mark.parametrize("name", ["llama 3", "gpt-oss"])
def test_every_day_is_the_same_day(clock, name):
    tokenizer = chat_templates.make(name)
    first = ChatFormat(tokenizer)
    row = first.encode(Example(QUESTION, ANSWER))
    clock.day = datetime.datetime(2031, 1, 2)
    again = ChatFormat(tokenizer)
    assert again.encode(Example(QUESTION, ANSWER)) == row
    assert again.identity == first.identity
    assert first.identity["date in the chat template"] == "2024-07-26"
    assert ChatFormat(chat_templates.make("gemma")).identity["date in the chat template"] is None


def test_a_date_may_be_given_to_a_template_that_takes_one():
    chat = ChatFormat(chat_templates.make("llama 3"), template_kwargs={"date_string": "1 May 1999"})
    assert "Today: 1 May 1999" in chat.prompt(QUESTION)


@pytest.mark.parametrize("literal", ["% \\0", "%d \\ud800"])
def test_a_text_that_no_date_can_be_written_in_is_left_alone(clock, literal):
    template = f"{{% set odd = '{literal}' %}}{{{{ strftime_now('%Y') }}}}"
    tokenizer = chat_templates.make("gemma", template=template + chat_templates.GEMMA)
    asked = ChatFormat(tokenizer).encode(Example(QUESTION, ANSWER)).ids
    assert asked == written(tokenizer, ("user", QUESTION), ("assistant", ANSWER))


def test_a_text_that_is_none_is_refused_as_the_template_fails():
    template = "{{ strftime_now('%Y') }}{% set odd = '100 % \\x' %}"
    tokenizer = chat_templates.make("gemma", template=template + chat_templates.GEMMA)
    with pytest.raises(UsageError, match="chat template"):
        ChatFormat(tokenizer)


def test_every_way_to_write_a_date_is_pinned(clock):
    ways = [f"%{d}" for d in "aAbBdeHIjmMpSyYFTCgGkluPrRDhnstVf"]
    ways += ["%-d", "%-m", "%_d", "%^a", "100 %%", "100%%d", "%d.%m.%Y", "%A, le %-d\\u00e9"]
    template = "".join(f"{{{{ strftime_now('{way}') }}}};" for way in ways)
    template += (
        "{% set way = '%j|%-j' %}{{ strftime_now(format=way) }}{{ strftime_now('%Y')|int + 1 }}"
    )
    template += "{{ strftime_now('%' + 'd') }}"
    tokenizer = chat_templates.make("gemma", template="\n " + template + chat_templates.GEMMA)
    asked = ChatFormat(tokenizer).encode(Example(QUESTION, ANSWER)).ids
    assert asked == written(tokenizer, ("user", QUESTION), ("assistant", ANSWER))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}",
            "leaves out the question",
        ),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            "leaves out the answer",
        ),
        ("Hello", "leaves out the question"),
    ],
)
def test_a_template_that_leaves_something_out_is_refused(template, words):
    with pytest.raises(UsageError, match=words):
        ChatFormat(chat_templates.make("gemma", template=template))


def test_an_answer_that_the_template_drops_is_refused():
    chat = ChatFormat(chat_templates.make("r1"))
    with pytest.raises(UsageError, match="must write every answer, but it leaves out '<think>No"):
        chat.encode(Example(QUESTION, "<think>No.</think>"))


def test_of_several_templates_the_default_or_a_named_one_is_used():
    tokenizer = chat_templates.make("gemma")
    tokenizer.chat_template = {"default": chat_templates.GEMMA, "short": chat_templates.MISTRAL}
    assert "<|start|>user" in ChatFormat(tokenizer).prompt("Who?")
    chosen = ChatFormat(tokenizer, template_kwargs={"chat_template": "short"})
    assert chosen.prompt("Who?") == "<s>[ASK]Who?[/ASK]"
    assert chosen.identity != ChatFormat(tokenizer).identity
    with pytest.raises(UsageError, match="has the chat templates default, short, but none of the"):
        ChatFormat(tokenizer, template_kwargs={"chat_template": "long"})
    tokenizer.chat_template = {"rag": chat_templates.GEMMA, "short": chat_templates.MISTRAL}
    with pytest.raises(UsageError, match="none of the name 'default': choose one with"):
        ChatFormat(tokenizer)
    tokenizer.chat_template = {"rag": chat_templates.GEMMA}
    assert "<|start|>user" in ChatFormat(tokenizer).prompt("Who?")


def test_a_name_needs_named_templates():
    with pytest.raises(UsageError, match=r"must have named chat templates .* and got 'short'"):
        ChatFormat(chat_templates.make("gemma"), template_kwargs={"chat_template": "short"})
