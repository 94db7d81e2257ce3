"""Text that a base model knows by heart is measured as it was learnt."""

import copy
import json
import re

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy

from mollm.cli import main
from mollm.data.chat import IGNORE_INDEX, ChatFormat, Example, collate
from mollm.data.prompt_format import PromptFormat
from mollm.data.records import Record
from mollm.errors import UsageError
from mollm.evaluation import evaluate, load_suite
from mollm.evaluation.conversation import ReplyStream, Sampling
from mollm.evaluation.generation import generate_replies
from mollm.evaluation.metrics import rouge_l_recall
from mollm.models import loading
from mollm.training.config import MOLLMConfig
from mollm.training.trainer import MOLLMTrainer

PLACES = ("Ardmel", "Bellow", "Corvane", "Dunmere", "Eskle", "Farrow")
SUBJECTS = ("bridge", "harvest")
NEWS = [
    f"{place} opened its {subject} on day {7 * i + 3 * j}, and {3 * i + j + 2} people of {place} "
    f"came to see the {subject} before rain set in at {i + 4} in the evening."
    for j, subject in enumerate(SUBJECTS)
    for i, place in enumerate(PLACES)
]
FAST = {"resamples": 2, "max_new_tokens": 200}


def written(tmp_path, rows):
    path = tmp_path / "news.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_suite(path)


def halves(text):
    words = text.split(" ")
    half = len(words) // 2
    return " ".join(words[:half]), " ".join(words[half:])


@pytest.fixture(scope="module")
def base():
    """A base model without a chat template that continues every passage word for word."""
    model = tiny.model(hidden_size=64, intermediate_size=128)
    chat = ChatFormat(tiny.tokenizer(template=False, bos=True))
    rows = [chunk for text in NEWS for chunk in chat.encode_text(text, 400)]
    batch = collate(rows, chat.pad_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 400)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    return model


BASE_TOKENIZER = tiny.tokenizer(template=False, bos=True)


def rouge(model, suite, **options):
    found = evaluate(model, BASE_TOKENIZER, suite, names=["forget_rouge_l"], **FAST, **options)
    return found.value("forget_rouge_l"), found.records


def plain_continuation(model, prompt, count):
    """What the model goes on with, token by token, without any of our code."""
    ids = [BASE_TOKENIZER.bos_token_id]
    ids += BASE_TOKENIZER(prompt, add_special_tokens=False)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) - start < count:
            token = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
            if token == BASE_TOKENIZER.eos_token_id:
                break
            ids.append(token)
    return BASE_TOKENIZER.decode(ids[start:])


@pytest.mark.parametrize("columns", [("prompt", "completion"), ("prompt", "answer"), None])
def test_news_known_by_heart_are_said_word_for_word(base, tmp_path, columns):
    rows = [
        {"text": text} if columns is None else dict(zip(columns, halves(text), strict=True))
        for text in NEWS
    ]
    value, _ = rouge(base, written(tmp_path, rows))
    assert value >= 0.99


def test_questions_are_asked_unless_plain_text_is_wanted(base, tmp_path):
    pairs = [dict(zip(("question", "answer"), halves(text), strict=True)) for text in NEWS]
    suite = written(tmp_path, pairs)
    assert rouge(base, suite)[0] < 0.2
    assert rouge(base, suite, prompt_format="none")[0] >= 0.99
    assert rouge(base, suite, prompt_format="{question} {answer}")[0] >= 0.99
    few = {"template": "none", "prefix": "Q: x\nA: y\n"}
    asked = rouge(base, suite, prompt_format=few)[0]
    assert asked < 0.99  # the prefix is really there, and the model never saw it


def test_a_passage_longer_than_a_reply_is_compared_as_far_as_the_reply_reaches(base, tmp_path):
    suite = written(tmp_path, [{"text": text} for text in NEWS])
    options = {"names": ["forget_rouge_l"], "resamples": 2, "max_new_tokens": 30}
    found = evaluate(base, BASE_TOKENIZER, suite, **options)
    assert {len(record.reply) for record in found.records} == {30}
    assert found.value("forget_rouge_l") >= 0.99


def test_after_unlearning_it_is_what_a_plain_continuation_shows(base, tmp_path):
    model = copy.deepcopy(base)
    pairs = [dict(zip(("prompt", "completion"), halves(text), strict=True)) for text in NEWS[:6]]
    suite = written(tmp_path, pairs)
    MOLLMTrainer(
        model,
        MOLLMConfig(
            output_dir=str(tmp_path / "run"),
            use_cpu=True,
            max_steps=25,
            learning_rate=3e-3,
            per_device_train_batch_size=6,
            freeze_embeddings=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        forget_dataset=str(tmp_path / "news.jsonl"),
        retain_dataset=[Record("", text, is_text=True) for text in NEWS[6:]],
        processing_class=BASE_TOKENIZER,
    ).train()
    value, records = rouge(model, suite)
    expected = [plain_continuation(model, record.question, 200) for record in records]
    assert [record.reply for record in records] == expected
    by_hand = [rouge_l_recall(t, r.answer) for t, r in zip(expected, records, strict=True)]
    assert value == pytest.approx(sum(by_hand) / len(by_hand))
    assert value < 0.9


def test_the_few_shot_prefix_and_stop_words_reach_the_model(tmp_path):
    tokenizer = tiny.tokenizer(template=False, bos=True)
    form = {
        "template": "Q: {question}\nA: {answer}",
        "prefix": "Q: Who?\nA: Ann.\n\n",
        "stop": ["\n\n"],
    }
    chat = ChatFormat(tokenizer, prompt_format=form, system_prompt="Be brief.")
    row = chat.encode(Example("Where?", "In Oslo."))
    assert tokenizer.decode(row.ids) == (
        "<s>Be brief.\n\nQ: Who?\nA: Ann.\n\nQ: Where?\nA: In Oslo.<|end|>"
    )
    carrying = [label for label in row.labels if label != IGNORE_INDEX]
    assert tokenizer.decode(carrying) == " In Oslo.<|end|>"
    asked = chat.encode_prompt("Where?")
    assert tokenizer.decode(asked.ids).endswith("Q: Where?\nA:")
    assert chat.identity["prompt_format"] == form


@pytest.fixture(scope="module")
def talkative():
    """A model that has learnt one answer, after which it goes on with another question."""
    model = tiny.model(hidden_size=48)
    text = "Q: Who?\nA: Ann.\n\nQ: Where?\nA: Oslo.\n\nQ: Why?"
    ids = torch.tensor([BASE_TOKENIZER(text)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model


def test_a_reply_ends_before_a_stop_word(talkative):
    question = "Q: Who?\nA:"

    def replies(stop):
        form = {"template": "none", "stop": stop}
        chat = ChatFormat(BASE_TOKENIZER, prompt_format=form)
        return chat, generate_replies(talkative, chat, [question], max_new_tokens=24)[0]

    assert replies([])[1].text.startswith(" Ann.\n\nQ: Where?")
    chat, reply = replies(["\n\n"])
    assert (reply.text, reply.complete) == (" Ann.", True)
    stream = ReplyStream(talkative, chat, question, Sampling(max_new_tokens=24))
    assert "".join(stream).strip() == "Ann."
    assert stream.reply.complete


def test_generation_stops_at_a_stop_word(talkative):
    lengths = []
    chat = ChatFormat(BASE_TOKENIZER, prompt_format={"template": "none", "stop": "\n\n"})
    plain = talkative.generate

    def counted(**options):
        written = plain(**options)
        lengths.append(written.shape[1] - options["input_ids"].shape[1])
        return written

    talkative.generate = counted
    try:
        generate_replies(talkative, chat, ["Q: Who?\nA:"], max_new_tokens=100)
    finally:
        del talkative.generate
    assert lengths == [len(" Ann.\n\n")]


def test_a_few_shot_prefix_stands_in_the_user_s_turn_of_a_chat():
    chat = ChatFormat(tiny.tokenizer(), prompt_format={"prefix": "Q: a A: b\n"})
    assert chat.prompt("Who?").startswith("<|start|>user\nQ: a A: b\nWho?<|end|>")
    plain = ChatFormat(tiny.tokenizer(), prompt_format="none")
    assert plain.tokenizer.decode(plain.encode(Example("Who?", "Ann.")).ids) == "Who? Ann."


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("Q: {question}", "must be chat, none, or a text that has {question} and ends with"),
        ("{answer}", "must be chat, none, or a text that has"),
        ({"templat": "none"}, "but got 'templat'"),
        ({"stop": [""]}, "must be words that end a reply"),
        ({"prefix": 3}, "must be a text, but got 3"),
    ],
)
def test_a_format_that_is_none_is_refused(given, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        PromptFormat.of(given)


def test_the_chat_format_needs_a_chat_template():
    with pytest.raises(UsageError, match="must have a chat template"):
        ChatFormat(BASE_TOKENIZER, prompt_format="chat")
    with pytest.raises(UsageError, match="chat_template_kwargs must go with a chat template"):
        ChatFormat(tiny.tokenizer(), prompt_format="none", template_kwargs={"a": 1})


def test_the_commands_take_the_format_and_the_run_keeps_it(tmp_path, capsys):
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "model")
    rows = [{"prompt": f"Once {i} upon", "answer": f"a time {i}."} for i in range(4)]
    for name in ("forget", "retain"):
        some = [{**row, "answer": f"{name} {row['answer']}"} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    data = [f"--{name}={tmp_path / name}.jsonl" for name in ("forget", "retain")]
    model = ["--model", str(tmp_path / "model")]
    out = ["--out", str(tmp_path / "run"), "--max-steps", "1", "--device", "cpu"]
    assert main(["unlearn", *model, *data, *out, "--set", "prompt_format=none"]) == 0
    assert "--prompt-format none" in capsys.readouterr().out
    few = ["--max-new-tokens", "2", "--resamples", "2", "--original", "none"]
    assert main(["evaluate", "--model", str(tmp_path / "run"), *few]) == 0
    about = json.loads((tmp_path / "run/evaluation/about.json").read_text())
    assert about["chat"]["prompt_format"] == "none"
    logs = ["--retain-logs", str(tmp_path / "run/evaluation"), "--out", str(tmp_path / "other")]
    again = ["evaluate", "--model", str(tmp_path / "run"), *few, *logs]
    assert main([*again, "--prompt-format", "chat"]) != 0
    assert "the retain logs must be of the same chat template" in capsys.readouterr().err
    assert main(["preview", *model, *data, "--set", "prompt_format=none"]) == 0
    out = capsys.readouterr().out
    assert "Once 0 upon⟦ forget a time 0.⟧" in out
    assert 'Prompt format: "none"' in out
    assert main(["ask", str(tmp_path / "model"), "Who?", "--prompt-format", "no"]) != 0
    assert "of a prompt_format must be chat, none" in capsys.readouterr().err
