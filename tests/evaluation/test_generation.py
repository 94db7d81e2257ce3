"""What a model is asked, where its replies end, and what of them is read."""

import json
import types

import chat_templates
import pytest
import tiny
import torch
import transformers
from tokenizers import AddedToken
from transformers import GenerationConfig

from mollm.data.chat import ChatFormat, Example
from mollm.data.conversations import Turn
from mollm.errors import UsageError
from mollm.evaluation.conversation import ReplyStream, Sampling
from mollm.evaluation.evaluate import evaluate
from mollm.evaluation.examine import Examiner
from mollm.evaluation.generation import Reply, answers_alike_in_company, ask, generate_replies
from mollm.evaluation.journal import Journal
from mollm.evaluation.raw_text import continuations
from mollm.evaluation.suite import Row, Suite, load_suite


class Parrot:
    """A model that replies the given texts, whatever it is asked."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, tokenizer, texts, ends=None):
        self._mollm_asked_alone = {self.dtype: ""}
        self.replies = [tokenizer(text)["input_ids"] for text in texts]
        self.generation_config = GenerationConfig(eos_token_id=ends)
        self.config = types.SimpleNamespace(max_position_embeddings=512)
        self.asked = []

    def modules(self):
        return []

    def eval(self):
        return self

    def generate(self, input_ids, max_new_tokens, pad_token_id, eos_token_id, **_):
        self.asked += input_ids.tolist()
        self.stops = eos_token_id
        width = max(map(len, self.replies))
        rows = [ids + [pad_token_id] * (width - len(ids)) for ids in self.replies]
        replies = torch.tensor(rows)[: len(input_ids), :max_new_tokens]
        return torch.cat([input_ids, replies], dim=1)


@pytest.fixture
def thinking():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(
        [AddedToken(mark, special=False, normalized=False) for mark in ("<think>", "</think>")]
    )
    return ChatFormat(tokenizer)


def test_a_reply_ends_at_every_end_of_a_turn():
    chat = ChatFormat(chat_templates.make("phi 3"))
    ids = chat.tokenizer.convert_tokens_to_ids
    model = Parrot(chat.tokenizer, ["Oslo.<|return|> More"], ends=[ids("<|return|>")])
    (reply,) = ask(model, chat, ["Where?"], max_new_tokens=40)
    assert set(model.stops) == {ids("<|end|>"), ids("<|endoftext|>"), ids("<|return|>")}
    assert (reply.text, reply.complete) == ("Oslo.", True)
    for end in ("<|end|>", "<|endoftext|>"):
        (reply,) = ask(Parrot(chat.tokenizer, [f"Oslo.{end} More"]), chat, ["Where?"])
        assert (reply.text, reply.complete) == ("Oslo.", True)
    (reply,) = ask(Parrot(chat.tokenizer, ["Oslo. More"]), chat, ["Where?"], max_new_tokens=40)
    assert (reply.text, reply.complete) == ("Oslo. More", False)


def test_a_reply_is_what_follows_the_thought(thinking):
    model = Parrot(thinking.tokenizer, ["<think>Bergen? No.</think>\n\nOslo.<|end|>"])
    (reply,) = generate_replies(model, thinking, ["Where?"], max_new_tokens=80)
    assert (reply.text, reply.complete, reply.thinking) == ("Oslo.", True, False)


def test_a_thought_that_is_cut_off_is_known(thinking):
    model = Parrot(thinking.tokenizer, ["<think>Bergen, or perhaps", "Oslo.<|end|>"])
    rows = [Row("Where is it?", "Oslo."), Row("Where?", "Oslo.")]
    examiner = Examiner(model, thinking, max_new_tokens=26)
    replies = examiner._ask(rows)
    assert [reply.text for reply in replies] == ["", "Oslo."]
    assert [reply.thinking for reply in replies] == [True, False]


def test_thoughts_that_are_cut_off_are_counted_over_the_whole_set(thinking, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mollm.evaluation.examine.generate_replies",
        lambda model, chat, asked, **options: [
            Reply("", complete=False, thinking="cut" in question) for question in asked
        ],
    )
    rows = [Row("Where?", "Oslo."), *[Row(f"Where is it, cut {n}?", "Oslo.") for n in range(9)]]
    for known in (0, 10):
        said = []
        journal = Journal(tmp_path / "unfinished.jsonl", "key")
        assert journal.known == known
        evaluate(
            tiny.model(),
            thinking.tokenizer,
            Suite(forget=rows),
            names=["forget_rouge_l"],
            batch_size=1,
            resamples=2,
            journal=journal,
            say=said.append,
        )
        assert "Measuring forget (10 questions) …" in said
        assert [text for text in said if "within a thought" in text] == [
            "9 of 10 replies of forget were cut off within a thought, and count as empty: raise "
            "max_new_tokens, or switch thinking off with chat_template_kwargs."
        ]


def test_a_question_comes_after_what_was_said_before():
    chat = ChatFormat(tiny.tokenizer())
    model = Parrot(chat.tokenizer, ["Oslo.<|end|>"])
    history = (Turn("system", "Be kind."), Turn("user", "Who?"), Turn("assistant", "Ann."))
    generate_replies(model, chat, [Example("Where?", "", history=history)])
    assert chat.tokenizer.decode(model.asked[0]) == (
        "<|start|>system\nBe kind.<|end|>\n<|start|>user\nWho?<|end|>\n"
        "<|start|>assistant\nAnn.<|end|>\n<|start|>user\nWhere?<|end|>\n<|start|>assistant\n"
    )


def test_of_several_accepted_answers_the_nearest_one_counts(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"question": "Where?", "answer": ["In Norway.", "Oslo."]}\n'
        '{"question": "Who?", "answer": "Ann."}\n'
    )
    suite = load_suite(path)
    assert [row.answer for row in suite.forget] == ["In Norway.", "Ann."]
    assert suite.forget[0].accepted_answers == ("In Norway.", "Oslo.")
    chat = ChatFormat(tiny.tokenizer())
    examiner = Examiner(Parrot(chat.tokenizer, ["Oslo.<|end|>", "Ann."]), chat)
    replies = examiner._ask(suite.forget)
    scores = examiner._replies(suite.forget, replies, {"rouge_l"})
    assert [each["rouge_l"] for each in scores] == [1, 1]


def test_a_text_is_asked_how_it_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    words = " ".join(f"w{i}" for i in range(500))
    path.write_text(f'{{"text": "Once upon a time."}}\n{{"text": "{words}"}}\n')
    first, long = load_suite(path).forget
    assert (first.question, first.answer) == ("Once upon", " a time.")
    assert long.question + long.answer == " ".join(f"w{i}" for i in range(400))
    chat = ChatFormat(tiny.tokenizer(bos=True))
    row, asked = chat.encode(first.example(first.answer)), chat.encode_prompt(first.asked)
    assert chat.tokenizer.decode(row.ids) == "<s>Once upon a time."
    assert chat.tokenizer.decode(asked.ids) == "<s>Once upon"
    assert row.ids[: len(asked.ids)] == asked.ids
    path.write_text('{"text": "O"}\n')
    with pytest.raises(
        UsageError, match=r"line 1: the field text must hold at least two characters"
    ):
        load_suite(path)


def test_a_text_without_spaces_is_cut_between_characters(tmp_path):
    path = tmp_path / "rows.jsonl"
    long = "むかしむかし、" * 30
    path.write_text(f'{{"text": "昔話です"}}\n{{"text": "A {long}"}}\n', encoding="utf-8")
    short, other = load_suite(path).forget
    assert (short.question, short.answer) == ("昔話", "です")
    assert other.question + other.answer == f"A {long}"
    assert abs(len(other.question) - len(other.answer)) <= 2


def test_a_limit_counts_rows_whatever_number_of_answers_they_accept(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"Where {n}?", "answer": ["a", "b", "c"]} for n in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert len(load_suite(path, limit=2).forget) == 2


def test_conversations_and_texts_are_evaluated():
    talk = (Turn("user", "Who?"), Turn("assistant", "Ann."))
    rows = [Row("Where?", "Here.", history=talk), Row("Once upon", " a time.", is_text=True)]
    done = evaluate(
        tiny.model(), tiny.tokenizer(), Suite(forget=rows), max_new_tokens=3, resamples=3
    )
    assert {"forget_probability", "forget_rouge_l"} <= set(done.estimates)


def test_a_system_prompt_changes_what_is_measured():
    suite = Suite(forget=[Row("Where?", "Here."), Row("Who?", "Ann.")])

    def probability(**options):
        done = evaluate(
            tiny.model(),
            tiny.tokenizer(),
            suite,
            names=["forget_probability"],
            resamples=3,
            **options,
        )
        return done.value("forget_probability")

    assert probability(system_prompt="Be kind.") != probability()
    with pytest.raises(UsageError, match="chat_template_kwargs must hold what"):
        probability(chat_template_kwargs={"thinking": True})


def test_padding_and_ids_beyond_the_embeddings():
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    suite = Suite(forget=[Row("Where is it?", "Here, or there."), Row("Who?", "Ann.")])
    options = {"names": ["forget_probability"], "resamples": 3}
    padded = evaluate(tiny.model(), tokenizer, suite, **options)
    plain = evaluate(tiny.model(), tiny.tokenizer(), suite, **options)
    assert padded.value("forget_probability") == plain.value("forget_probability")
    with pytest.raises(UsageError, match=r"the row 'Where is it\?' of the set forget: the token"):
        evaluate(tiny.model(vocab_size=200), tokenizer, suite, **options)
    chat = ChatFormat.of(tiny.model(), tokenizer)
    for asking in (
        lambda: generate_replies(tiny.model(), chat, ["Who?", "Who [PAD]?"], max_new_tokens=1),
        lambda: ReplyStream(tiny.model(), chat, "Who [PAD]?", Sampling(max_new_tokens=1)),
    ):
        with pytest.raises(UsageError, match=r"the question.*: the tokenizer gives '\[PAD\]' the"):
            asking()


def test_what_goes_on_with_a_text_is_scored_as_it_was_written_even_if_it_is_nothing():
    chat = ChatFormat(tiny.tokenizer())
    rows = [Row("Once upon", " a time.", is_text=True)] * 2
    replies = [Reply(" a\n  time.", True), Reply("", True)]
    encoded = []

    class Original(Examiner):
        def _score(self, model, rows, chat=None):
            encoded.extend(rows)
            return super()._score(model, rows, chat)

    scores = Original(tiny.model(), chat, original=tiny.model())._replies(
        rows, replies, {"reply_nll"}
    )
    assert chat.tokenizer.decode(encoded[0].ids) == "Once upon a\n  time."
    assert [each["reply_tokens"] for each in scores] == [len(" a\n  time."), 1]


def recurrent():
    config = transformers.RwkvConfig(
        vocab_size=259, context_length=256, hidden_size=32, num_hidden_layers=2,
        attention_hidden_size=32, intermediate_size=64,
    )  # fmt: skip
    model = transformers.RwkvForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.usefixtures("in_float32")
def test_a_model_that_takes_padding_for_tokens_is_asked_a_row_at_a_time():
    chat = ChatFormat(tiny.tokenizer())
    model = recurrent()
    assert not answers_alike_in_company(model)
    assert answers_alike_in_company(tiny.model())
    questions = ["Who?", "Where is the town hall?", "When?", "Who is it?", "Why, then?"]
    together = ask(model, chat, questions, max_new_tokens=8)
    alone = [ask(model, chat, [question], max_new_tokens=8)[0] for question in questions]
    assert together == alone
    vars(model)["_mollm_asked_alone"] = {model.dtype: ""}
    assert ask(model, chat, questions, max_new_tokens=8) != alone


@pytest.mark.usefixtures("in_float32")
def test_why_a_model_is_asked_a_row_at_a_time_is_said_once(caplog):
    model, chat = recurrent(), ChatFormat(tiny.tokenizer())
    for _ in range(2):
        ask(model, chat, ["Who?", "Where is it?"], max_new_tokens=1)
    (said,) = caplog.messages
    assert "RwkvForCausalLM is asked one row at a time: padding before a row changes" in said


@pytest.mark.usefixtures("in_float32")
def test_near_ties_do_not_make_a_model_unsound():
    """Rounding then decides which token comes next, and what follows another one differs."""
    model = tiny.model(initializer_range=0.3)

    def tie(module, args, logits):
        tied = 1.1 * logits.abs().amax(-1)
        logits[..., 100] = tied
        logits[..., 101] = tied * (1 + (1e-5 if len(logits) > 1 else -1e-5))
        return logits

    model.lm_head.register_forward_hook(tie)
    assert answers_alike_in_company(model)


def test_a_model_whose_numbers_are_not_finite_is_tried_again():
    model = tiny.model()
    weight = model.get_output_embeddings().weight.data
    before = weight.clone()
    weight.fill_(float("nan"))
    assert not answers_alike_in_company(model)
    weight.copy_(before)
    assert answers_alike_in_company(model)


def test_what_is_known_is_known_for_a_dtype(caplog):
    model = tiny.model()
    vars(model)["_mollm_asked_alone"] = {torch.bfloat16: "it is narrow"}
    assert answers_alike_in_company(model)
    assert not answers_alike_in_company(model.bfloat16())
    assert not caplog.messages


def test_a_model_that_takes_no_padded_batch_is_asked_a_row_at_a_time(caplog):
    model, chat = tiny.model(), ChatFormat(tiny.tokenizer())

    def refuse(module, args, given):
        mask = given.get("attention_mask")
        if mask is not None and not mask.all():
            raise ValueError("no padding, please")

    handle = model.register_forward_pre_hook(refuse, with_kwargs=True)
    assert len(ask(model, chat, ["Who?", "Where is it?"], max_new_tokens=1)) == 2
    assert not answers_alike_in_company(model)
    handle.remove()
    (said,) = caplog.messages
    assert said.endswith("one row at a time: a padded batch fails with it (no padding, please).")


def test_a_model_that_answers_nothing_is_not_said_to_mind_padding(caplog):
    model = tiny.model()
    handle = model.register_forward_pre_hook(lambda *_: 1 / 0)
    assert not answers_alike_in_company(model)
    handle.remove()
    assert not caplog.messages
    assert answers_alike_in_company(model)


def test_sampled_replies_are_drawn_from_the_whole_distribution_by_the_seed():
    model, chat = tiny.model(initializer_range=0.3), ChatFormat(tiny.tokenizer())
    model.generation_config.top_k, model.generation_config.temperature = 1, 0.01

    def drawn(seed, **options):
        torch.manual_seed(seed)
        found = generate_replies(model, chat, ["Who?"] * 20, max_new_tokens=4, **options)
        return [reply.text for reply in found]

    assert drawn(0, sampled=True) == drawn(0, sampled=True) != drawn(1, sampled=True)
    assert len(set(drawn(0, sampled=True))) > 10
    assert len(set(drawn(0))) == 1


def test_a_generation_config_that_asks_for_more_than_replies_changes_none():
    model, chat = tiny.model(), ChatFormat(tiny.tokenizer())
    plain = ask(model, chat, ["Who?", "Where?"], max_new_tokens=4)
    model.generation_config.return_dict_in_generate = True
    model.generation_config.output_scores = True
    assert ask(model, chat, ["Who?", "Where?"], max_new_tokens=4) == plain


def test_a_generation_config_that_does_not_work_is_to_blame():
    model, chat = tiny.model(), ChatFormat(tiny.tokenizer())
    model.name_or_path = "tiny"
    model.generation_config.bad_words_ids = 3
    with pytest.raises(UsageError, match="generation config of the model tiny must suit"):
        ask(model, chat, ["Who?"], max_new_tokens=2)
    assert model.generation_config.bad_words_ids == 3
    model.generation_config.bad_words_ids = None
    model.generation_config.num_beams = 10**9  # greedy is greedy
    assert len(ask(model, chat, ["Who?"], max_new_tokens=2)) == 1


@pytest.mark.parametrize(("name", "value"), [("bad_words_ids", 3), ("assistant_early_exit", "")])
@pytest.mark.parametrize("way", ["asked", "streamed", "continued"])
def test_whoever_generates_blames_it(way, name, value):
    model, tokenizer = tiny.model(), tiny.tokenizer()
    model.name_or_path = "tiny"
    setattr(model.generation_config, name, value)
    chat = ChatFormat(tokenizer)
    ways = {
        "asked": lambda: ask(model, chat, ["Who?"], max_new_tokens=2),
        "streamed": lambda: list(ReplyStream(model, chat, "Who?", Sampling(max_new_tokens=2))),
        "continued": lambda: continuations(model, tokenizer, ["Who"], max_new_tokens=2),
    }
    with pytest.raises(UsageError, match="generation config of the model tiny must suit"):
        ways[way]()
