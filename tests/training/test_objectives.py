"""Objectives: against the plain losses on logits."""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy, kl_div

from mollm.methods import unlearning_cross_entropy
from mollm.training.objectives import Objectives
from mollm.training.reference_model import CopyReference
from mollm_ops import uce_loss


def batch(seed, pad=0):
    torch.manual_seed(seed)
    ids = torch.randint(3, 259, (3, 9))
    mask = torch.ones_like(ids)
    mask[:, :pad] = 0
    labels = ids.clone()
    labels[:, : 4 + pad] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


pytestmark = pytest.mark.usefixtures("in_float32")


@pytest.fixture
def pair():
    model = tiny.model()
    reference = CopyReference(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model, reference


def rows(model, batch):
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    target = batch["labels"][:, 1:]
    return logits[target != -100], target[target != -100]


def test_the_losses_are_those_of_the_logits(pair):
    model, reference = pair
    forget, retain = batch(1), batch(2, pad=1)
    objectives = Objectives(model, reference, partial(unlearning_cross_entropy, eps=0.01))
    losses = objectives(forget, retain)
    logits, target = rows(model, retain)
    original, _ = rows(reference.model, retain)
    kl = kl_div(logits.log_softmax(-1), original.softmax(-1), reduction="batchmean")
    expected = {
        "forget": uce_loss(*rows(model, forget), eps=0.01),
        "retain": cross_entropy(logits, target),
        "kl": kl,
    }
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-4, atol=1e-6)


def test_one_batch_alone_gives_its_losses_alone(pair):
    objectives = Objectives(*pair)
    assert objectives(forget=batch(1)).keys() == {"forget"}
    assert objectives(retain=batch(2)).keys() == {"kl", "retain"}


def test_every_loss_trains_the_model_and_none_its_original(pair):
    model, reference = pair
    objectives = Objectives(model, reference)
    for loss in objectives(batch(1), batch(2)).values():
        objectives.zero_grad()
        loss.backward(retain_graph=True)
        assert all(p.grad is not None for p in model.parameters())
        assert all(p.grad is None and not p.requires_grad for p in reference.parameters())


def test_a_model_in_training_mode_has_no_dropout_in_its_losses():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 259, "n_embd": 32, "n_layer": 2, "n_head": 2}
    noise = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **noise)).train()
    objectives = Objectives(model, CopyReference(model)).train()
    losses = objectives(retain=batch(1))
    assert abs(float(losses["kl"])) < 1e-6
    (gradient,) = torch.autograd.grad(losses["kl"], model.transformer.h[0].attn.c_attn.weight)
    assert float(gradient.abs().max()) < 1e-6
