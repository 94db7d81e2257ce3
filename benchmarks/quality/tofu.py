"""TOFU forget10 against retain90 on a model that has learnt its authors by heart.

Twenty rows in a row speak of one author. A seed draws the authors:

    forget      of forget10, unlearned
    retain      of retain90, trained to stay; first those that TOFU has wrong answers for
    heldout     others of retain90, never trained on
    outside     world facts and real authors, other kinds of question, never trained on
    rephrased   the forget questions in other words, asked at the end alone

The model has learnt all of them, the rephrased questions too. A second one, of the same beginnings,
has learnt all but forget and rephrased: forget quality compares with it.

Two sizes: a small Llama from scratch with the texts of some authors, and SmolLM2 with all of TOFU.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mollm.data.chat import Batch, ChatFormat, Example, Tokens, collate
from mollm.data.files import read_table
from mollm.data.records import Record
from mollm.errors import UsageError
from mollm.evaluation import Suite, evaluate, load_tofu
from mollm.methods import answers_of
from mollm.methods.method import OBJECTIVES
from mollm.models import forward, loading
from mollm.planning.run import check_memory
from mollm.planning.settings import PlanSettings
from mollm_ops import linear_cross_entropy
from quality.case import Batches, Case

AUTHOR = 20
"""Rows in a row that speak of one."""
_EVALUATION_BATCH = 64
_REPLY_TOKENS = 100
_LEARNT = 0.02
_FIGURES = ("forget_quality", "model_utility")


@dataclass(frozen=True)
class Size:
    """How much is learnt, and by how large a model."""

    forget: int | None = 2
    """Authors; None for all."""
    retain: int | None = 4
    """Authors; None for two thirds of them, the others are held out."""
    heldout: int | None = 2
    outside: int = 40
    """World facts, and as many real authors."""
    batch: int = 8
    evaluated: int = 400
    """Rows of a group that are measured along a run, at most."""
    epochs: int = 40
    """At most; learning ends when the answers are known."""
    lr: float = 3e-3
    """When it learns, at its highest."""
    pretrained: str | None = None
    """The model that learns; without one, a small Llama that knows nothing yet."""
    vocabulary: int = 1024
    hidden: int = 128
    layers: int = 2


SMALL = Size()
QUICK = Size(1, 1, 1, 20, epochs=50, vocabulary=512, hidden=64)


def full(model: str | None) -> Size:
    """All 400 rows of forget10 and all 3600 of retain90, learnt by `model`, SmolLM2 for None."""
    name = model or loading.SMOLLM2
    return Size(None, None, None, 100, batch=32, epochs=15, lr=2e-4, pretrained=name)


def quick_full(model: str | None) -> Size:
    """The same with a few authors and little learning: to see that it runs."""
    return replace(full(model), forget=1, retain=1, heldout=1, outside=5, batch=8, epochs=3)


def make_case(data: Path, seed: int, size: Size, device: torch.device, cache: Path) -> Case:
    """The task for one seed; models that have been trained before are read from `cache`."""
    parts = _draw(data, random.Random(f"authors {seed}"), size)
    known = [example for part in parts.values() for example in part]
    blank, chat = _beginner(known, size, seed, device)
    rows = {name: [chat.encode(e) for e in part] for name, part in parts.items()}
    name = _name(seed, size)

    def taught(names: Sequence[str], file: Path) -> LlamaForCausalLM:
        lessons = [row for name in names for row in rows[name]]
        return _taught(blank, lessons, chat.pad_id, size, seed, file)

    model = taught(list(rows), cache / f"{name}.pt")
    suite = _suite(data, parts)
    others = [name for name in rows if name not in ("forget", "rephrased")]
    retrained = taught(others, _retain_only_file(cache, name))
    logs = evaluate(
        retrained,
        chat.tokenizer,
        suite,
        names=("forget_truth_ratio",),
        batch_size=_EVALUATION_BATCH,
        resamples=1,
    ).records
    suite = replace(suite, retain_logs=logs)
    figures = {
        "original": _figures(model, chat, suite),
        "retain-only": _figures(retrained, chat, suite),
    }
    del retrained
    forward.freeze_embeddings(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def draw(rng: random.Random) -> Batches:
        forget, retain = (
            collate(rng.sample(rows[n], min(size.batch, len(rows[n]))), chat.pad_id).to(device)
            for n in ("forget", "retain")
        )
        return {"forget": forget, "kl": retain, "retain": retain}

    picks = random.Random(f"picks {seed}")
    order = picks.sample(rows["forget"], len(rows["forget"]))
    groups: dict[str, list[Any]] = {
        n: _batches(picks.sample(part, min(size.evaluated, len(part))), chat.pad_id, device)
        for n, part in rows.items()
    }
    rephrased = groups.pop("rephrased")
    return Case(
        model,
        OBJECTIVES,
        draw,
        _answers,
        groups,
        ten=collate(order[:10], chat.pad_id).to(device),
        others=_batches(order[10:], chat.pad_id, device),
        facts={"parameters": trained, "figures of": figures},
        rewordings={"forget, rephrased": rephrased},
        figures=lambda model: _figures_of_a_run(model, chat, suite),
    )


def records(data: Path, seed: int, size: Size) -> tuple[dict[str, list[Record]], Any]:
    """What the model of a case is to forget, in two wordings, and to retain, for a trainer; and its
    tokenizer."""
    parts = _draw(data, random.Random(f"authors {seed}"), size)
    known = [example for part in parts.values() for example in part]
    _, chat = _beginner(known, size, seed, torch.device("cpu"))
    wanted = ("forget", "rephrased", "retain")
    named = {n: [Record(e.question, e.answer) for e in parts[n]] for n in wanted}
    return named, chat.tokenizer


def retain_only(seed: int, size: Size, case: Case, cache: Path) -> Any:
    """The model of the case that has never learnt what is to be forgotten, once it is made."""
    model = copy.deepcopy(case.model)
    model.load_state_dict(
        torch.load(_retain_only_file(cache, _name(seed, size)), weights_only=True)
    )
    return model


def _name(seed: int, size: Size) -> str:
    return f"tofu-{seed}-{hashlib.sha256(repr(size).encode()).hexdigest()[:12]}"


def _retain_only_file(cache: Path, name: str) -> Path:
    return cache / f"{name}-retain-only.pt"


def _answers(model: Any, batch: Batch) -> Any:
    return answers_of(model, batch)


def _figures_of_a_run(model: Any, chat: ChatFormat, suite: Suite) -> dict[str, float]:
    """Both are 0 where the run has left a model that puts out no numbers."""
    try:
        return _figures(model, chat, suite)
    except UsageError:
        return dict.fromkeys(_FIGURES, 0.0)


def _figures(model: Any, chat: ChatFormat, suite: Suite) -> dict[str, float]:
    """Forget quality and model utility."""
    found = evaluate(
        model,
        chat.tokenizer,
        suite,
        names=_FIGURES,
        batch_size=_EVALUATION_BATCH,
        max_new_tokens=_REPLY_TOKENS,
        resamples=1,
    )
    return {name: float(f"{found.value(name):.4g}") for name in _FIGURES}


def _draw(data: Path, rng: random.Random, size: Size) -> dict[str, list[Example]]:
    def read(name: str, question: str = "question") -> list[Example]:
        lines = read_table(data / f"{name}.jsonl").rows
        return [Example(str(f[question]), str(f["answer"])) for _, f in lines]

    forget, rephrased = read("forget10"), read("forget10_perturbed", "paraphrased_question")
    others, perturbed = read("retain90"), {e.question for e in read("retain_perturbed")}

    def of(rows: Sequence[Example], authors: Sequence[int]) -> list[Example]:
        return [row for a in authors for row in rows[a * AUTHOR : (a + 1) * AUTHOR]]

    def authors(rows: Sequence[Example]) -> list[int]:
        return rng.sample(range(len(rows) // AUTHOR), len(rows) // AUTHOR)

    gone, rest = authors(forget)[: size.forget], authors(others)
    rest.sort(key=lambda a: others[a * AUTHOR].question not in perturbed)
    first = 2 * len(rest) // 3 if size.retain is None else size.retain
    last = len(rest) if size.heldout is None else first + size.heldout
    outside = [read(f"{name}_perturbed") for name in ("world_facts", "real_authors")]
    return {
        "forget": of(forget, gone),
        "retain": of(others, rest[:first]),
        "heldout": of(others, rest[first:last]),
        "outside": [e for part in outside for e in rng.sample(part, min(size.outside, len(part)))],
        "rephrased": of(rephrased, gone),
    }


def _suite(data: Path, parts: dict[str, list[Example]]) -> Suite:
    """TOFU's suite of the rows that the model knows, the held-out authors left out."""
    suite = load_tofu(data)

    def known(group: str, part: str) -> Any:
        questions = {example.question for example in parts[part]}
        return tuple(row for row in suite.groups()[group] if row.question in questions)

    return Suite(
        forget=known("forget", "forget"),
        retain=known("retain", "retain"),
        real_authors=known("real_authors", "outside"),
        world_facts=known("world_facts", "outside"),
    )


def _beginner(
    known: Sequence[Example], size: Size, seed: int, device: torch.device
) -> tuple[Any, ChatFormat]:
    """The model that is to learn, and how it is spoken to."""
    if size.pretrained is not None:
        name = None if size.pretrained == loading.SMOLLM2 else size.pretrained
        source = loading.find_model(name)
        check_memory(
            source.name,
            loading.load_config(source.name)[0],
            PlanSettings(device=device.type),
            step=False,
        )
        model, tokenizer = loading.load(source, device)
        return model, ChatFormat(tokenizer)
    chat = ChatFormat(_tokenizer(known, size.vocabulary))
    return _small_llama(size, len(chat.tokenizer), seed).to(device), chat


def _tokenizer(examples: Sequence[Example], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these texts."""
    backend = Tokenizer(token_models.BPE())
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


def _small_llama(size: Size, vocabulary: int, seed: int) -> LlamaForCausalLM:
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


def _taught(
    blank: Any, rows: Sequence[Tokens], pad_id: int, size: Size, seed: int, path: Path
) -> Any:
    """A copy of `blank` that has learnt the rows, read from `path` where it is there."""
    model = copy.deepcopy(blank)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True, map_location=model.device))
        return model
    _learn(model, rows, pad_id, size, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path.with_suffix(".unfinished"))
    path.with_suffix(".unfinished").rename(path)
    return model


def _learn(model: Any, rows: Sequence[Tokens], pad_id: int, size: Size, seed: int) -> None:
    """AdamW until the answers are known by heart: their mean loss in an epoch is below _LEARNT.

    A model that knows no language learns the questions too.
    """
    rng = random.Random(f"learning {seed}")
    lessons = list(rows) if size.pretrained else [replace(row, labels=row.ids) for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.lr, weight_decay=0.0)
    batch_size = 2 * size.batch
    count = size.epochs * -(-len(lessons) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, size.lr, total_steps=count)
    with tqdm(
        total=count, desc="learning TOFU", unit="step", dynamic_ncols=True, mininterval=2
    ) as bar:
        for _ in range(size.epochs):
            rng.shuffle(lessons)
            losses = []
            for start in range(0, len(lessons), batch_size):
                batch = collate(lessons[start : start + batch_size], pad_id).to(model.device)
                optimizer.zero_grad()
                answers = answers_of(model, batch)
                loss = linear_cross_entropy(
                    answers.hidden, answers.weight, answers.target, **answers.head_options
                )
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
                bar.update()
            if float(torch.stack(losses).mean()) < _LEARNT:
                return


def _batches(rows: Sequence[Tokens], pad_id: int, device: torch.device) -> list[Batch]:
    ordered = sorted(rows, key=lambda row: len(row.ids))
    starts = range(0, len(ordered), _EVALUATION_BATCH)
    return [collate(ordered[s : s + _EVALUATION_BATCH], pad_id).to(device) for s in starts]
