"""The training loop in the README runs as it is printed, before the change and after it."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
transformers = pytest.importorskip("transformers")


def printed(sign):
    """The side of the README's diff that keeps the lines of `sign` beside the common ones."""
    (block,) = re.findall(r"```diff\n(.*?)```", README, flags=re.DOTALL)
    return "\n".join(line[1:] for line in block.splitlines() if line[:1] in ("", " ", sign))


@pytest.fixture
def scene():
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    frozen = copy.deepcopy(model).requires_grad_(False)

    def batch():
        ids = torch.randint(0, 64, (2, 9))
        labels = ids.clone()
        labels[:, :4] = -100
        return {"input_ids": ids, "labels": labels}

    return {"model": model, "frozen": frozen, "loader": [(batch(), batch()) for _ in range(3)]}


@pytest.mark.parametrize("sign", ["-", "+"])
def test_the_training_loop_runs_as_printed(scene, sign):
    before = [p.detach().clone() for p in scene["model"].parameters()]
    exec(printed(sign), scene)
    moved = [
        not torch.equal(p, b) for p, b in zip(scene["model"].parameters(), before, strict=True)
    ]
    assert any(moved)
    assert all(p.isfinite().all() for p in scene["model"].parameters())
    if sign == "+":
        assert set(scene["optimizer"].last_step.conflicts) == {"forget", "kl", "retain"}


def test_every_make_target_the_documents_name_exists():
    root = Path(__file__).resolve().parents[2]
    makefile = (root / "Makefile").read_text()
    named = set(
        re.findall(
            r"(?:^|`)make (\w+)",
            README + (root / "CONTRIBUTING.md").read_text(),
            flags=re.MULTILINE,
        )
    )
    targets = set(re.findall(r"^(\w+):", makefile, flags=re.MULTILINE))
    assert {"demo", "test", "lint", "gpu"} <= named <= targets
