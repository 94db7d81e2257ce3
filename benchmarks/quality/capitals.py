"""SmolLM2 forgets the capitals of some countries, as in `mollm demo`.

forget      the capitals to be unlearned, asked in a form that training does not use
retain      those that are trained on
heldout     those that are not
outside     the model's own right answers to questions about other things
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from mollm import demo, facts, models
from mollm.chat import ChatFormat, Example, collate
from mollm.methods import answers_of
from mollm.quiz import Reply, quiz
from mollm.unlearn import OBJECTIVES
from quality.case import Batches, Case


def make_case(seed: int) -> Case:
    """The task for one seed, which decides the split of the countries."""
    model, tokenizer = models.load(models.find_model(None), torch.device("cpu"))
    chat = ChatFormat(tokenizer)
    split, before = demo.examine(model, chat, [], random.Random(seed), print)
    score = quiz(model, chat, facts.questions_of(facts.EVERYDAY), max_new_tokens=20)
    everyday = [pair for pair, right in zip(score.pairs, score.right, strict=True) if right]
    models.freeze_embeddings(model)

    def draw(rng: random.Random) -> Batches:
        sampler = demo.BatchSampler(chat, split, everyday, rng, model.device)
        forget, retain = sampler()
        return {"forget": forget, "kl": retain, "retain": retain}

    def asked(countries: Sequence[str]) -> list[Any]:
        rows = [
            Example(
                facts.capital_question(country).text,
                split.spelling[country],
                f"The capital of {facts.with_article(country)} is",
                closed=False,
            )
            for country in countries
        ]
        return [collate([chat.encode(row) for row in rows], chat.pad_id)]

    def own(pairs: Sequence[tuple[facts.Question, Reply]]) -> list[Any]:
        rows = [Example(q.text, reply.text, closed=reply.complete) for q, reply in pairs]
        return [collate([chat.encode(row) for row in rows], chat.pad_id)]

    groups = {name: asked(names) for name, names in split.countries().items()}
    groups["outside"] = own(before["general"].pairs)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Case(
        model,
        OBJECTIVES,
        draw,
        lambda model, batch: answers_of(model, batch),  # type: ignore[arg-type]
        groups,
        {"parameters": trained},
    )
