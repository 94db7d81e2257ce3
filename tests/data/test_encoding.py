import json
import random
from collections import Counter
from dataclasses import replace
from itertools import chain

import pytest
import tiny
from tokenizers import normalizers

from mollm.data.chat import IGNORE_INDEX, ChatFormat, Example, collate
from mollm.data.conversations import Turn
from mollm.data.encoding import encode_records
from mollm.data.files import sample_path
from mollm.data.records import Record, load_records
from mollm.data.samplers import EndlessBatches, JointSampler
from mollm.errors import UsageError

SHORT = Record("Where is Oslo?", "In Norway.", "rows.jsonl", 1, "line")
LONG = Record("Éa " * 40 + "the end?", "An answer, ô là!", "rows.jsonl", 2, "line")


@pytest.fixture
def chat():
    return ChatFormat(tiny.tokenizer())


def plain_chat():
    return ChatFormat(tiny.tokenizer(template=False, bos=True))


def text_with_loss(chat, tokens):
    return chat.tokenizer.decode([i for i in tokens.labels if i != IGNORE_INDEX])


def test_records_that_fit_are_encoded_as_they_are(chat):
    done = encode_records([SHORT, LONG], chat, max_length=512)
    assert done.rows == [chat.encode(Example(r.prompt, r.answer)) for r in (SHORT, LONG)]
    assert done.shortened == 0
    assert done.notes == ()


def test_a_long_prompt_loses_its_beginning_and_nothing_else(chat):
    whole = chat.encode(Example(LONG.prompt, LONG.answer))
    done = encode_records([SHORT, LONG, SHORT], chat, max_length=100, name="forget")
    row = done.rows[1]
    assert text_with_loss(chat, row) == text_with_loss(chat, whole) == LONG.answer + "<|end|>"
    text = chat.tokenizer.decode(row.ids)
    head, tail = chat.prompt("\0").split("\0")
    assert text.startswith(head)
    kept = text.removeprefix(head).removesuffix(tail + LONG.answer + "<|end|>\n")
    assert kept
    assert LONG.prompt.endswith(kept)
    assert done.shortened == 1
    assert done.notes == (
        "1 of 3 forget prompts were shortened to fit 100 tokens: they lost their beginning.",
    )


@pytest.mark.parametrize("make", [lambda: ChatFormat(tiny.tokenizer()), plain_chat])
def test_a_shortened_row_keeps_as_much_as_fits(make):
    chat = make()
    whole = len(chat.encode(Example(LONG.prompt, LONG.answer)).ids)
    for length in range(whole - 90, whole + 1):
        (row,) = encode_records([LONG], chat, max_length=length).rows
        # one character of the prompt is at most two tokens, one byte each
        assert length - 1 <= len(row.ids) <= length


def test_a_shortened_row_keeps_the_start_of_the_format():
    chat = plain_chat()
    (row,) = encode_records([LONG], chat, max_length=60).rows
    assert row.ids[0] == chat.tokenizer.bos_token_id
    assert row.ids.count(chat.tokenizer.bos_token_id) == 1
    text = chat.tokenizer.decode(row.ids[1:])
    assert text.startswith("Question: ")
    assert text.endswith("the end?\nAnswer: An answer, ô là!<|end|>")


def test_an_answer_that_leaves_no_room_is_refused_with_both_lengths(chat):
    least = chat.encode(Example("?", LONG.answer))
    answer = sum(label != IGNORE_INDEX for label in least.labels)
    assert encode_records([LONG], chat, max_length=len(least.ids)).shortened == 1
    words = (
        rf"rows\.jsonl, line 2: the field answer takes {answer} tokens and the format of its "
        rf"prompt {len(least.ids) - answer}, but max_length is {len(least.ids) - 1}: "
    )
    with pytest.raises(UsageError, match=words):
        encode_records([SHORT, LONG], chat, max_length=len(least.ids) - 1)


def test_an_answer_of_nothing_but_the_end_of_its_turn_is_refused(chat):
    blank = Record("Where?", "\u00ad", "rows.jsonl", 1, "line")
    chat.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u00ad", "")
    with pytest.raises(UsageError, match="line 1: the field answer must hold a token for the"):
        encode_records([blank], chat, max_length=99)


def test_a_context_without_tokens_is_refused(chat):
    with pytest.raises(UsageError, match="max_length must be at least 1, but got 0"):
        encode_records([SHORT], chat, max_length=0)


def test_a_tokenizer_without_template_is_told_once():
    chat = plain_chat()
    chat.tokenizer.name_or_path = "somebody/model"
    sets = [encode_records([SHORT, LONG], chat, max_length=512, name=n) for n in ("a", "b")]
    (note,) = {note for done in sets for note in done.notes}
    assert note == (
        "The tokenizer somebody/model has no chat template, so rows with a question "
        r"are written as 'Question: …\nAnswer:' and the answer, and others as plain text: "
        "prompt_format writes them otherwise."
    )


def test_padding_on_either_side_leaves_the_same_labels(chat):
    records = load_records(sample_path("authors-forget.jsonl"), role="forget")
    rows = encode_records(records, chat, max_length=150).rows
    batches = [collate(rows, chat.pad_id, side) for side in ("left", "right")]
    for i, row in enumerate(rows):
        for batch in batches:
            real = batch.attention_mask[i].bool()
            assert batch.labels[i][real].tolist() == row.labels
            assert batch.input_ids[i][real].tolist() == row.ids
            assert set(batch.labels[i][~real].tolist()) <= {IGNORE_INDEX}
        answer = records[i].answer + "<|end|>"
        assert text_with_loss(chat, row) == answer


TALE = Record("", "Once upon a time there was a house, and in it an Élan. " * 9, is_text=True)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("length", [2, 3, 5, 64, 100, 489, 490, 491, 5000])
def test_no_token_of_a_long_text_loses_its_loss(bos, length):
    if length == 2 and bos:
        length = 3
    chat = ChatFormat(tiny.tokenizer(bos=bos))
    start = [chat.tokenizer.bos_token_id] if bos else []
    whole = chat.tokenizer(TALE.answer, add_special_tokens=False)["input_ids"]
    rows = encode_records([TALE], chat, max_length=length).rows
    assert all(len(row.ids) <= length and row.ids[: len(start)] == start for row in rows)
    counted = [label for row in rows for label in row.labels if label != IGNORE_INDEX]
    # the first token has a loss only if another one comes before it
    assert counted == whole[0 if bos else 1 :]
    assert all(row.labels[0] == IGNORE_INDEX for row in rows)
    if length >= 64:
        context = [sum(label == IGNORE_INDEX for label in row.labels) for row in rows[1:]]
        assert all(count >= length // 5 for count in context)


def test_a_window_without_room_is_refused():
    chat = ChatFormat(tiny.tokenizer(bos=True))
    with pytest.raises(UsageError, match="must leave room for two tokens of a text, but got 2"):
        encode_records([TALE], chat, max_length=2)


TURNS = (Turn("system", "Be kind."), Turn("user", "Who?"), Turn("assistant", "Ann."))
TALK = Record("Where?", "In Norway.", "rows.jsonl", 3, "line", history=TURNS)


def test_the_last_answer_of_a_conversation_carries_the_loss_or_all(chat):
    (last,) = encode_records([TALK], chat, max_length=512).rows
    (each,) = encode_records([TALK], chat, max_length=512, train_on_turns="all").rows
    assert each.ids == last.ids
    assert text_with_loss(chat, last) == "In Norway.<|end|>"
    assert text_with_loss(chat, each) == "Ann.<|end|>In Norway.<|end|>"
    with pytest.raises(UsageError, match="train_on_turns must be one of last, all, but got 'one'"):
        encode_records([TALK], chat, max_length=512, train_on_turns="one")


def test_an_answer_that_is_to_carry_no_loss_is_refused_where_all_do(chat):
    talk = replace(TALK, weightless="messages[2].weight")
    plain = encode_records([TALK], chat, max_length=512).rows
    assert encode_records([talk], chat, max_length=512).rows == plain
    words = r"line 3: messages\[2\]\.weight must not be 0 or false with train_on_turns: all"
    with pytest.raises(UsageError, match=words):
        encode_records([talk], chat, max_length=512, train_on_turns="all")


def test_a_long_conversation_loses_its_earliest_turns(chat):
    (whole,) = encode_records([TALK], chat, max_length=512).rows
    done = encode_records([TALK], chat, max_length=len(whole.ids) - 1)
    text = chat.tokenizer.decode(done.rows[0].ids)
    assert done.shortened == 1
    assert "Be kind." in text
    assert "Where?" in text
    assert "Who?" not in text
    assert "Ann." not in text
    shorter = encode_records([TALK], chat, max_length=len(done.rows[0].ids) - 1).rows[0]
    assert "Be kind." in chat.tokenizer.decode(shorter.ids)
    assert "Where?" not in chat.tokenizer.decode(shorter.ids)


def test_a_conversation_that_the_template_cannot_write_is_named(chat):
    template = chat.tokenizer.chat_template
    chat.tokenizer.chat_template = (
        "{% if messages | length > 2 %}{{ raise_exception('one question') }}{% endif %}" + template
    )
    with pytest.raises(UsageError, match=r"rows\.jsonl, line 3: the chat template .* one question"):
        encode_records([TALK], ChatFormat(chat.tokenizer), max_length=512)


def test_ids_beyond_the_embeddings_are_named_by_row(chat):
    known = ChatFormat(chat.tokenizer, vocabulary=259)
    assert encode_records([SHORT], known, max_length=99).rows
    less = ChatFormat(chat.tokenizer, vocabulary=100)
    with pytest.raises(UsageError, match=r"rows\.jsonl, line 1: the tokenizer gives .* 100 ids"):
        encode_records([SHORT], less, max_length=99)


def take(sampler, count):
    return [next(sampler) for _ in range(count)]


def test_every_epoch_draws_every_row_once_in_an_order_of_its_own():
    sampler = EndlessBatches(range(10), 4, seed=3)
    drawn = [row for batch in take(sampler, 15) for row in batch]
    epochs = [tuple(drawn[i : i + 10]) for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 6
    assert (sampler.epoch, sampler.index) == (6, 0)


def test_batches_have_one_size_even_where_they_hold_the_data_more_than_once():
    batches = take(EndlessBatches("abc", 8, seed=0), 3)
    assert [len(batch) for batch in batches] == [8, 8, 8]
    assert Counter(chain.from_iterable(batches)) == dict.fromkeys("abc", 8)


def test_the_order_depends_on_seed_and_name_alone():
    def drawn(**options):
        return take(EndlessBatches(range(50), 5, **options), 10)

    assert drawn(seed=1) == drawn(seed=1)
    random.seed(9)
    first = drawn(seed=1)
    random.seed(10)
    assert drawn(seed=1) == first
    assert drawn(seed=2) != first
    assert drawn(seed=1, name="retain") != first
    # the same in every version: a run can be repeated
    assert next(EndlessBatches(range(8), 8, seed=0, name="forget")) == [2, 7, 0, 5, 3, 6, 1, 4]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_processes_share_the_batches_of_a_single_one(world_size):
    whole = take(EndlessBatches(range(13), 8, seed=5), 7)
    ranks = [
        take(EndlessBatches(range(13), 8, seed=5, rank=rank, world_size=world_size), 7)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert {len(part) for part in parts} == {8 // world_size}
        assert list(chain.from_iterable(parts)) == batch


@pytest.mark.parametrize("done", [0, 1, 2, 3, 7])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (4, 2), (1, 4)])
def test_a_resumed_sampler_goes_on_as_if_never_stopped(done, before, after):
    expected = take(EndlessBatches(range(10), 4, seed=7), 12)
    first = EndlessBatches(range(10), 4, seed=7, rank=before - 1, world_size=before)
    take(first, done)
    state = json.loads(json.dumps(first.state_dict()))
    take(first, 2)  # what is drawn later does not change a saved state
    drawn = []
    for rank in range(after):
        resumed = EndlessBatches(range(10), 4, seed=7, rank=rank, world_size=after)
        take(resumed, 4)
        resumed.load_state_dict(state)
        drawn.append(take(resumed, 12 - done))
    together = [list(chain.from_iterable(parts)) for parts in zip(*drawn, strict=True)]
    assert together == expected[done:]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 1}, "seed of the training data must be 7 as in the checkpoint, but got 1"),
        (
            {"rows": range(9)},
            "rows of the training data must be 10 as in the checkpoint, but got 9",
        ),
        ({"name": "retain"}, "name of the retain data must be training as in the checkpoint"),
    ],
)
def test_the_position_of_another_order_is_refused(options, words):
    state = EndlessBatches(range(10), 4, seed=7).state_dict()
    rows = options.pop("rows", range(10))
    with pytest.raises(UsageError, match=words):
        EndlessBatches(rows, 4, **({"seed": 7} | options)).load_state_dict(state)


@pytest.mark.parametrize("wrong", [{"index": 10}, {"index": -1}, {"epoch": -1}])
def test_a_position_outside_the_data_is_refused(wrong):
    sampler = EndlessBatches(range(10), 4, seed=7)
    with pytest.raises(UsageError, match="must lie within 10 rows, but got epoch"):
        sampler.load_state_dict(sampler.state_dict() | wrong)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([], {}, "the training data must hold at least one row"),
        ([1], {"batch_size": 0}, "batch_size must be a positive multiple of the 1 processes"),
        ([1], {"batch_size": 6, "world_size": 4}, "multiple of the 4 processes, but got 6"),
        ([1], {"rank": 2, "world_size": 2}, "less than world_size 2, but got 2"),
        ([1], {"rank": -1}, "rank must be at least 0 and less than world_size 1, but got -1"),
    ],
)
def test_a_sampler_that_cannot_be_is_refused(rows, options, words):
    with pytest.raises(UsageError, match=words):
        EndlessBatches(rows, **({"batch_size": 4, "seed": 0} | options))


def make_joint(**options):
    forget = EndlessBatches(range(5), 2, seed=0, name="forget", **options)
    retain = EndlessBatches(range(100, 117), 4, seed=0, name="retain", **options)
    return JointSampler({"forget": forget, "retain": retain})


def test_each_set_goes_round_at_its_own_pace_and_resumes():
    steps = take(make_joint(), 20)
    assert {len(step["forget"]) for step in steps} == {2}
    forgotten = Counter(row for step in steps for row in step["forget"])
    assert forgotten == dict.fromkeys(range(5), 8)
    retained = [row for step in steps for row in step["retain"]]
    assert sorted(retained[:17]) == list(range(100, 117))

    first = make_joint()
    take(first, 6)
    resumed = make_joint()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert take(resumed, 14) == steps[6:]


def test_joint_samplers_are_shared_like_each_of_them():
    ranks = [take(make_joint(rank=rank, world_size=2), 9) for rank in range(2)]
    together = [
        {name: first[name] + second[name] for name in first}
        for first, second in zip(*ranks, strict=True)
    ]
    assert together == take(make_joint(), 9)


@pytest.mark.parametrize(("on_turns", "told"), [("all", True), ("last", False)])
def test_answers_that_a_long_conversation_loses_are_told(on_turns, told):
    history = tuple(Turn(role, "word " * 9) for role in ("user", "assistant") * 3)
    record = Record("q", "a", history=history)
    chat = ChatFormat(tiny.tokenizer())
    encoded = encode_records([record], chat, max_length=150, train_on_turns=on_turns)
    assert encoded.shortened == 1
    lost = [note for note in encoded.notes if "earlier answers" in note]
    assert len(lost) == told
    assert all("2 earlier answers of the training conversations" in note for note in lost)


def test_a_long_prompt_is_not_read_again_for_every_cut(monkeypatch):
    chat = ChatFormat(tiny.tokenizer())
    asked = []
    encode = chat.encode
    monkeypatch.setattr(
        chat, "encode", lambda e, **kw: asked.append(len(e.question)) or encode(e, **kw)
    )
    long = encode_records([Record("x" * 100_000, "b")], chat, max_length=200)
    assert len(long.rows[0].ids) == 200
    assert sorted(asked)[-2] < 10_000  # the whole of it once
