"""Replies are scored and judged as they were written, whatever tokenizer the original has."""

import math

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mollm.errors import UsageError
from mollm.evaluation import Row, Suite, evaluate
from mollm.evaluation import examine as examine_module
from mollm.evaluation.generation import Reply, generate_replies

POEM = "Roses are red,\n\tviolets are blue;\n\nsugar  is sweet."
SUITE = Suite(forget=[Row("Say a poem.", "No."), Row("Another?", "No.")])


def other_tokenizer():
    """One token a letter, as in tiny.tokenizer, but with other ids and no chat template."""
    special = ["</s>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def poets(monkeypatch):
    """Every question is answered with the poem, and a limit comes after it."""
    monkeypatch.setattr(
        examine_module,
        "generate_replies",
        lambda model, chat, questions, **_: [Reply(POEM, False) for _ in questions],
    )


def perplexity_by_hand(model, ids, start):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    losses = [-logits[i - 1, ids[i]].item() for i in range(start, len(ids))]
    return math.exp(sum(losses) / len(losses))


def test_a_poem_keeps_its_lines(poets):
    judged = []

    def judge(questions, replies):
        judged.extend(replies)
        return [0.0] * len(replies)

    original, tokenizer = tiny.model(seed=3, initializer_range=0.3), tiny.tokenizer()
    found = evaluate(
        tiny.model(), tokenizer, SUITE, original=original, judges={"rhyme": judge}, resamples=2
    )
    assert {record.reply for record in found.records} == {POEM}
    assert judged == [POEM, POEM]
    perplexities = []
    for row in SUITE.forget:
        asked = f"<|start|>user\n{row.question}<|end|>\n<|start|>assistant\n"
        ids = tokenizer(asked + POEM, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        perplexities.append(perplexity_by_hand(original, ids, start))
    expected = math.sqrt(perplexities[0] * perplexities[1])  # both of the same length
    assert found.value("forget_perplexity") == pytest.approx(expected, rel=1e-6)


def test_perplexity_under_another_tokenizer_is_that_of_the_text(poets):
    original, tokenizer = (
        tiny.model(seed=5, vocab_size=258, initializer_range=0.3),
        other_tokenizer(),
    )
    said = []
    found = evaluate(
        tiny.model(),
        tiny.tokenizer(),
        SUITE,
        original=original,
        original_tokenizer=tokenizer,
        resamples=2,
        say=said.append,
    )
    perplexities = []
    for row in SUITE.forget:
        asked = f"Question: {row.question}\nAnswer:"
        ids = tokenizer(f"{asked} {POEM}")["input_ids"]
        perplexities.append(perplexity_by_hand(original, ids, len(tokenizer(asked)["input_ids"])))
    expected = math.sqrt(perplexities[0] * perplexities[1])
    assert found.value("forget_perplexity") == pytest.approx(expected, rel=1e-6)
    assert "with the same tokenizer" in found.missing["forget_kl"]
    assert any("another tokenizer" in text for text in said)


def test_no_figure_of_another_vocabulary_is_made_up(poets):
    original = tiny.model(vocab_size=258)
    with pytest.raises(UsageError, match="vocabulary of the model, but they have 258 and 259"):
        evaluate(
            tiny.model(),
            tiny.tokenizer(),
            SUITE,
            original=original,
            names=["forget_perplexity"],
            resamples=2,
        )
    with pytest.raises(UsageError, match=r"forget_kl needs the original model.* same tokenizer"):
        evaluate(
            tiny.model(),
            tiny.tokenizer(),
            SUITE,
            original=original,
            original_tokenizer=other_tokenizer(),
            names=["forget_kl"],
            resamples=2,
        )


def test_a_reply_that_is_generated_keeps_its_white_space():
    model, tokenizer = tiny.model(hidden_size=48), tiny.tokenizer()
    text = f"<|start|>user\nSay it.<|end|>\n<|start|>assistant\n{POEM}<|end|>"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    chat = examine_module.ChatFormat(tokenizer)
    (reply,) = generate_replies(model, chat, ["Say it."], max_new_tokens=80)
    assert reply.text == POEM
