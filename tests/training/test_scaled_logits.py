"""Models that scale or cap their logits: every loss and gradient is that of their own logits."""

from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers

from mollm import MOLLMConfig, MOLLMOptimizer, MOLLMTrainer, find_blocks
from mollm.data.chat import ChatFormat, Example, collate
from mollm.data.records import Record
from mollm.errors import UsageError
from mollm.evaluation.scores import kl_to_original, score_rows
from mollm.methods import METHODS, answers_of
from mollm.models.adapters import adapted
from mollm.system.precision import computing_in
from mollm.training.objectives import Objectives
from mollm.training.reference_model import AdapterReference, CopyReference
from mollm.training.step import accumulate
from mollm_ops.operands import LogitTransform

FORGET = [Record("Who is Ann?", "a cook"), Record("Who is Bo?", "a tall judge")]
RETAIN = [Record("Where is Oslo?", "in Norway"), Record("What is tea?", "a drink")]
KINDS = {
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {"final_logit_softcapping": 5.0}),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"final_logit_softcapping": 4.0}),
    "Cohere": ("CohereForCausalLM", "CohereConfig", {"logit_scale": 0.0625}),
    "Granite": ("GraniteForCausalLM", "GraniteConfig", {"logits_scaling": 8.0}),
}


def made(kind, **more):
    torch.manual_seed(0)
    cls, config, options = KINDS[kind]
    settings = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    model = getattr(transformers, cls)(getattr(transformers, config)(**(settings | options | more)))
    with torch.no_grad():  # so large that scale and cap show
        model.get_output_embeddings().weight.mul_(40)
    return model.eval()


def batches():
    chat = ChatFormat(tiny.tokenizer())
    return [
        collate([chat.encode(Example(r.prompt, r.answer)) for r in rows], chat.pad_id)
        for rows in (FORGET, RETAIN)
    ]


def own_losses(model, original, forget, retain):
    """The three losses from what the models return, in float64."""

    def logits(one, batch):
        rows = batch.labels[:, 1:] != -100
        out = one(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return out[:, :-1][rows].double(), batch.labels[:, 1:][rows]

    z, target = logits(model, forget)
    p = z.softmax(-1).gather(-1, target[:, None])
    losses = {"forget": -torch.log1p(-(1 - 1e-4) * p).mean()}
    z, target = logits(model, retain)
    with torch.no_grad():
        z_ref, _ = logits(original, retain)
    losses["kl"] = F.kl_div(
        z.log_softmax(-1), z_ref.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    losses["retain"] = F.cross_entropy(z, target)
    return losses


def moved(model):
    """Another model near `model`, whose KL to it is not zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * p.std().nan_to_num() * torch.randn_like(p))
    return model


def assert_near(ours, gradients, truth, params):
    for name, loss in truth.items():
        assert float(ours[name].detach()) == pytest.approx(float(loss.detach()), rel=1e-3)
        exact = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        pairs = [(a, b) for a, b in zip(gradients[name], exact, strict=True) if b is not None]
        off = sum(float((a.double() - b).square().sum()) for a, b in pairs)
        assert math.sqrt(off / sum(float(b.square().sum()) for _, b in pairs)) < 1e-2, name


def gradients_of(losses, params):
    return {
        name: torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        for name, loss in losses.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_models_own_logits(kind):
    original, model = made(kind), moved(made(kind))
    forget, retain = batches()
    params = list(model.parameters())
    with computing_in("float32"):
        ours = Objectives(model, CopyReference(original))(forget, retain)
        gradients = gradients_of(ours, params)
    truth = own_losses(model.double(), original.double(), forget, retain)
    assert_near(ours, gradients, truth, params)


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_on_the_models_own_logits(kind, with_head):
    peft = pytest.importorskip("peft")
    names = ["q_proj", "up_proj", *["lm_head"] * with_head]
    model = made(kind, tie_word_embeddings=not with_head)
    wrapped = adapted(model, peft.LoraConfig(r=4, target_modules=names))
    params = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in params:
            p.normal_(0, 1)
    forget, retain = batches()
    with computing_in("float32"):
        ours = Objectives(model, AdapterReference(wrapped))(forget, retain)
        gradients = gradients_of(ours, params)
    model.double()
    with torch.no_grad(), wrapped.disable_adapter():
        first = model(input_ids=retain.input_ids, attention_mask=retain.attention_mask)
    truth = own_losses(model, lambda **_: first, forget, retain)
    assert float(ours["kl"].detach()) > 1e-6
    assert_near(ours, gradients, truth, params)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_gradients_are_those_of_the_models_own_logits(kind):
    original, start = made(kind), moved(made(kind))
    forget, retain = batches()
    after = {}
    for memory in ("as-produced", "streamed"):
        model = copy.deepcopy(start)
        params = list(model.parameters())
        optimizer = MOLLMOptimizer(params, lr=1e-3, base="sgd", gradient_memory=memory)
        blocks = find_blocks(model) if memory == "streamed" else ()
        with computing_in("float32"):
            losses = Objectives(model, CopyReference(original))
            found = accumulate(losses, optimizer, forget, retain, blocks=blocks)
        optimizer.step()
        truth = own_losses(copy.deepcopy(start).double(), original.double(), forget, retain)
        original.float()
        for name, loss in truth.items():
            assert float(found[name]) == pytest.approx(float(loss), rel=1e-3)
        after[memory] = optimizer.last_step, [p.detach() for p in params]
    (held, p), (streamed, q) = after.values()
    torch.testing.assert_close(streamed.gram, held.gram, rtol=1e-3, atol=1e-6)
    for one, other, first in zip(p, q, start.parameters(), strict=True):
        change = float((one - first).abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7 + 1e-2 * change)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("reference", ["copy", "cache"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_trainers_losses_are_those_of_the_models_own_logits(kind, reference, by_name, tmp_path):
    model, tokenizer = made(kind), tiny.tokenizer()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with computing_in("float32"):
        trainer = MOLLMTrainer(
            str(folder) if by_name else made(kind),
            MOLLMConfig(
                output_dir=str(tmp_path / "out"),
                max_steps=2,
                learning_rate=1e-2,
                per_device_train_batch_size=2,
                reference=reference,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                save_strategy="no",
            ),
            forget_dataset=FORGET,
            retain_dataset=RETAIN,
            processing_class=tokenizer,
        )
        trainer.train()
    with torch.no_grad():
        truth = own_losses(model, model, *batches())
    first, second = (step.losses for step in trainer.history)
    for name in ("forget", "retain"):
        assert first[name] == pytest.approx(float(truth[name]), rel=1e-3)
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert second["kl"] > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_likelihoods_are_those_of_the_models_own_logits(kind):
    original, model = made(kind), moved(made(kind))
    chat = ChatFormat(tiny.tokenizer())
    rows = [chat.encode(Example(r.prompt, r.answer)) for r in RETAIN]
    with computing_in("float32"):
        scores = score_rows(model, rows, pad_id=chat.pad_id)
        kl = kl_to_original(model, original, rows, pad_id=chat.pad_id)
        likelihoods = answers_of(model, batches()[1]).log_likelihoods()
    for place, row in enumerate(rows):
        batch = collate([row], chat.pad_id)
        with torch.no_grad():
            truth = own_losses(model, original, batch, batch)
        assert scores[place].mean_nll == pytest.approx(float(truth["retain"]), rel=1e-4)
        assert kl[place] == pytest.approx(float(truth["kl"]), rel=1e-3)
        count = len(scores[place].log_probs)
        assert float(likelihoods[place]) == pytest.approx(-count * float(truth["retain"]), rel=1e-4)


@pytest.mark.parametrize("method", ["ga", "npo", "simnpo", "mollm"])
def test_every_forget_loss_reads_the_models_own_logits(method):
    """A scale of 1/8 given by the model, or by an eighth of its head, is the same."""
    scaled, plain = made("Granite"), made("Granite")
    plain.config.logits_scaling = 1.0
    with torch.no_grad():
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight / 8)
    forget, _ = batches()
    with computing_in("float32"):
        found = []
        for model in (scaled, plain):
            answers = answers_of(model, forget)
            found.append(float(METHODS[method].forget_loss(answers, lambda a=answers: a)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_models_that_the_losses_do_not_fit_are_refused_wherever_they_enter():
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = output.logits.sin()
            return output

    odd = Odd(tiny.model().config)
    good = tiny.model()
    options = {"forget_dataset": FORGET, "retain_dataset": RETAIN}
    entries = [
        lambda: Objectives(odd, CopyReference(good)),
        lambda: score_rows(odd, [], pad_id=0),
        lambda: kl_to_original(good, odd, [], pad_id=0),
        lambda: MOLLMTrainer(
            odd, MOLLMConfig(output_dir="unused", use_cpu=True, max_steps=1), **options,
            processing_class=tiny.tokenizer(),
        ),
    ]  # fmt: skip
    for enter in entries:
        with pytest.raises(UsageError, match="transforms its logits after the head"):
            enter()


def test_a_reference_has_its_own_transform():
    original, model = made("Gemma 2"), made("Gemma 2")
    model.config.final_logit_softcapping = None
    forget, retain = batches()
    with computing_in("float32"):
        ours = Objectives(model, CopyReference(original))(forget, retain)
    with torch.no_grad():
        truth = own_losses(model.double(), original.double(), forget, retain)
    assert float(ours["kl"]) == pytest.approx(float(truth["kl"]), rel=1e-3)
    assert LogitTransform() == answers_of(model, forget).transform
