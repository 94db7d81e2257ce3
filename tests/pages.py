"""The pages of the documentation as tests read them, and a place in which their code can run."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import tiny
import torch

from mollm.models import loading

ROOT = Path(__file__).resolve().parents[1]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The lines of all shell blocks, continued ones joined, without comments."""
    lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    return [line.partition("   #")[0].strip() for line in lines if line.strip()]


def furnish(folder: Path) -> dict[str, object]:
    """Writes the model and the data that the pages name, and returns the names that they use.

    Args:
        folder: The working directory of what runs.

    Returns:
        model, tokenizer, frozen (a copy of the model) and loader, of a tiny random Llama.
    """
    model, tokenizer = tiny.model(tie_word_embeddings=False), tiny.tokenizer()
    for place in ("path/to/model", "runs/forget/model"):
        loading.save(model, tokenizer, folder / place)
    for role, author in (("forget", "Ilvane"), ("retain", "Oda")):
        rows = [{"question": f"Book {n} of {author}?", "answer": f"Salt {n}."} for n in range(6)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{role}.jsonl").write_text(lines, encoding="utf-8")

    def batch() -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 259, (2, 9))
        labels = ids.clone()
        labels[:, :4] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    return {
        "model": model,
        "tokenizer": tokenizer,
        "frozen": copy.deepcopy(model).requires_grad_(False),
        "loader": [(batch(), batch()) for _ in range(2)],
    }
