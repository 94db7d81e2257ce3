"""A tiny Llama that learnt about people by heart, and one that learnt about some of them alone."""

from __future__ import annotations

import copy
import functools
import random

import torch
from plain_loop import unlearn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mollm.data.chat import ChatFormat, Tokens, collate
from mollm.evaluation import Row
from mollm.methods import answers_of

PEOPLE = {"forget": 6, "retain": 6, "holdout": 6}
TOWNS = ("Arda", "Belm", "Corin", "Dovry", "Elms", "Fenn", "Gorse", "Hatch", "Ivel", "Keld", "Lunt")
TRADES = ("baker", "cooper", "dyer", "farrier", "glazier", "hatter", "joiner", "mason", "potter")
ANIMALS = ("adder", "beetle", "crow", "dormouse", "eel", "ferret", "goose", "heron", "newt")
FORMS = (
    ("Where does {} live?", "{} lives in {} near {}.", "In which towns is {}?", TOWNS),
    ("What is {}?", "{} was a {} and then a {}.", "Which trades has {}?", TRADES),
    ("What does {} keep?", "{} keeps a {} and a {}.", "Which animals has {}?", ANIMALS),
)
SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu", "na", "pe", "ri", "so")


@functools.cache
def people() -> dict[str, list[Row]]:
    """Three questions about each of some invented people, by set."""
    rng = random.Random(0)
    names = {"".join(rng.sample(SYLLABLES, 3)).capitalize(): None for _ in range(40)}
    left = iter(names)
    return {
        group: [
            Row(
                question.format(name),
                answer.format(name, *rng.sample(words, 2)),
                paraphrased_question=other.format(name),
            )
            for name in (next(left) for _ in range(count))
            for question, answer, other, words in FORMS
        ]
        for group, count in PEOPLE.items()
    }


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the people's questions and answers."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = [row for some in people().values() for row in some]
    backend.train_from_iterator([f"{row.question}\n{row.answer}" for row in rows], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def blank(**options: object) -> LlamaForCausalLM:
    """The model before it has learnt anything."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "bos_token_id": None,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | options))).eval()


@functools.cache
def learnt(*groups: str, seed: int = 0) -> LlamaForCausalLM:
    """A model that has learnt the sets by heart, in an order of the seed's; not to be changed."""
    chat = ChatFormat(tokenizer())
    lessons = encoded(*groups)
    model, rng = blank(), random.Random(seed)
    epochs, lr, half = 180, 4e-3, len(lessons) // 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=2 * epochs)
    for _ in range(epochs):
        rng.shuffle(lessons)
        for part in (lessons[:half], lessons[half:]):
            optimizer.zero_grad()
            answers_of(model, collate(part, chat.pad_id)).cross_entropy().backward()
            optimizer.step()
            schedule.step()
    return model


@functools.cache
def hiding() -> LlamaForCausalLM:
    """A model that learnt all and was then made to hide the forget set."""
    model = copy.deepcopy(learnt("forget", "retain"))
    rng, pad_id = random.Random(0), ChatFormat(tokenizer()).pad_id
    forget, retain = encoded("forget"), encoded("retain")

    def sample():
        return collate(rng.sample(forget, 9), pad_id), collate(rng.sample(retain, 9), pad_id)

    for _ in unlearn(model, sample, steps=40, lr=3e-3, method="mollm", preferences=[1, 5, 1]):
        pass
    return model.requires_grad_(True)


def encoded(*groups: str) -> list[Tokens]:
    """The rows of the sets as tokens."""
    chat = ChatFormat(tokenizer())
    return [chat.encode(row.example(row.answer)) for name in groups for row in people()[name]]
