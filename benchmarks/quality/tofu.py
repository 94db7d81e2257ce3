"""TOFU forget10 against retain90 on a small Llama that has learnt some of its authors by heart.

Twenty rows in a row speak of one author. A seed draws the authors:

    forget      of forget10, unlearned
    retain      of retain90, trained to stay
    heldout     others of retain90, never trained on
    outside     world facts, another kind of question, never trained on
    rephrased   the forget questions in other words; never trained on

The model has learnt all of them, the rephrased questions too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mollm.chat import Batch, ChatFormat, Example, Tokens, collate
from mollm.data_files import read_table
from mollm.methods import answers_of
from mollm.models import freeze_embeddings
from mollm.unlearn import OBJECTIVES
from quality.case import Batches, Case

_AUTHOR = 20
_BATCH, _LEARNING_BATCH, _EVALUATION_BATCH = 8, 16, 64


@dataclass(frozen=True)
class Size:
    """How much is learnt, and by how large a model."""

    forget: int = 2
    """Authors, as for the next two."""
    retain: int = 4
    heldout: int = 2
    outside: int = 40
    """World facts."""
    vocabulary: int = 1024
    hidden: int = 128
    layers: int = 2
    epochs: int = 40


SMALL, QUICK = Size(), Size(1, 1, 1, 20, 512, 64, 2, 50)


def make_case(data: Path, seed: int, size: Size, cache: Path) -> Case:
    """The task for one seed; a model that has been trained before is read from `cache`."""
    rng = random.Random(f"authors {seed}")
    parts = _draw(data, rng, size)
    known = [example for part in parts.values() for example in part]
    chat = ChatFormat(_tokenizer(known, size.vocabulary))
    rows = {name: [chat.encode(e) for e in part] for name, part in parts.items()}
    model = _model(size, len(chat.tokenizer), seed)
    path = cache / f"tofu-{seed}-{'-'.join(str(v) for v in asdict(size).values())}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        _learn(model, [row for part in rows.values() for row in part], chat.pad_id, size, seed)
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    freeze_embeddings(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def draw(rng: random.Random) -> Batches:
        forget, retain = (
            collate(rng.sample(rows[n], min(_BATCH, len(rows[n]))), chat.pad_id)
            for n in ("forget", "retain")
        )
        return {"forget": forget, "kl": retain, "retain": retain}

    groups: dict[str, list[Any]] = {n: _batches(part, chat.pad_id) for n, part in rows.items()}
    return Case(model, OBJECTIVES, draw, _answers, groups, {"parameters": trained})


def _answers(model: Any, batch: Batch) -> Any:
    return answers_of(model, batch)


def _draw(data: Path, rng: random.Random, size: Size) -> dict[str, list[Example]]:
    def read(name: str, question: str = "question") -> list[Example]:
        lines = read_table(data / f"{name}.jsonl").rows
        return [Example(str(f[question]), str(f["answer"])) for _, f in lines]

    forget, rephrased = read("forget10"), read("forget10_perturbed", "paraphrased_question")
    others, world = read("retain90"), read("world_facts_perturbed")

    def of(rows: Sequence[Example], authors: Sequence[int]) -> list[Example]:
        return [row for a in authors for row in rows[a * _AUTHOR : (a + 1) * _AUTHOR]]

    gone = rng.sample(range(len(forget) // _AUTHOR), size.forget)
    kept = rng.sample(range(len(others) // _AUTHOR), size.retain + size.heldout)
    return {
        "forget": of(forget, gone),
        "retain": of(others, kept[: size.retain]),
        "heldout": of(others, kept[size.retain :]),
        "outside": rng.sample(world, size.outside),
        "rephrased": of(rephrased, gone),
    }


def _tokenizer(examples: Sequence[Example], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"Question: {e.question}\nAnswer: {e.answer}" for e in examples]
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def _model(size: Size, vocabulary: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def _learn(
    model: LlamaForCausalLM, rows: Sequence[Tokens], pad_id: int, size: Size, seed: int
) -> None:
    """AdamW on whole texts, questions too, until the answers are known by heart."""
    rng = random.Random(f"learning {seed}")
    whole = [replace(row, labels=row.ids) for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    count = size.epochs * -(-len(whole) // _LEARNING_BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=count)
    with tqdm(
        total=count, desc="learning TOFU", unit="step", dynamic_ncols=True, mininterval=2
    ) as bar:
        for _ in range(size.epochs):
            rng.shuffle(whole)
            for start in range(0, len(whole), _LEARNING_BATCH):
                batch = collate(whole[start : start + _LEARNING_BATCH], pad_id)
                optimizer.zero_grad()
                loss = model(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    labels=batch.labels,
                ).loss
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()


def _batches(rows: Sequence[Tokens], pad_id: int) -> list[Batch]:
    ordered = sorted(rows, key=lambda row: len(row.ids))
    starts = range(0, len(ordered), _EVALUATION_BATCH)
    return [collate(ordered[s : s + _EVALUATION_BATCH], pad_id) for s in starts]
