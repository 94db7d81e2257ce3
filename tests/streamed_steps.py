"""Models, batches and steps with which streamed gradients are compared with those that are held."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from mollm import MOLLMOptimizer, find_blocks
from mollm.models.forward import states_at_head
from mollm_ops import linear_ce_kl, linear_cross_entropy, linear_uce_loss

NAMES = ("forget", "kl", "retain")
VOCAB = 48
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
}
KINDS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "dropout": {"attention_dropout": 0.2},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 2, "bos_token_id": 1, "eos_token_id": 2},
    "mixtral": {"num_local_experts": 4, "experts_implementation": "eager"},
}
BIASED_HEADS = {"phi": {}, "tied phi": {"tie_word_embeddings": True}}


def made(kind="llama", dtype=torch.float64, **options):
    torch.manual_seed(0)
    name = kind.split()[-1] if kind in ("gpt2", "mixtral", *BIASED_HEADS) else "llama"
    config = AutoConfig.for_model(name, **(SIZES | (KINDS | BIASED_HEADS)[kind] | options))
    return AutoModelForCausalLM.from_config(config).to(dtype)


def batches(micro, seed):
    """Rows to forget and, of another length, to retain."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(micro):
        yield torch.randint(VOCAB, (2, 7), generator=g), torch.randint(VOCAB, (3, 5), generator=g)


def losses_of(model, forget, retain):
    z, y = model(forget, use_cache=False).logits, model(retain, use_cache=False).logits
    p = z[:, :-1].softmax(-1).gather(2, forget[:, 1:, None])
    away = (y - torch.linspace(-1, 1, VOCAB, dtype=y.dtype)).square().mean()
    return {
        "forget": -torch.log1p(-0.99 * p).mean(),
        "kl": away,
        "retain": cross_entropy(y[:, :-1].flatten(0, 1), retain[:, 1:].flatten()),
    }


def linear_losses_of(model, forget, retain):
    """The same roles, of losses that read the head's weight and make no logits; each objective
    meets it twice."""
    head = model.get_output_embeddings()
    weight, bias = head.weight, head.bias

    def states(ids):
        return states_at_head(model, ids, torch.ones_like(ids))[:, :-1]

    h, r = states(forget), states(retain)
    seen, kept = forget[:, 1:], retain[:, 1:].clone()
    kept[0, :2] = -100
    ramp = torch.linspace(-1, 1, r.numel(), dtype=r.dtype).reshape(r.shape)
    fixed = torch.linspace(-1, 1, weight.numel(), dtype=r.dtype).reshape(weight.shape).sin()
    caps = {"softcap": 3.0, "ref_softcap": 9.0}
    ce, kl = linear_ce_kl(r, weight, kept, ramp, fixed, bias=bias, ref_bias=bias, **caps)
    each = linear_cross_entropy(h, weight, seen, bias=bias, reduction="none", logit_scale=0.5)
    forgotten = linear_uce_loss(h, weight, seen, bias=bias, normalizer=30.0, chunk_rows=5)
    return {"forget": forgotten - each.square().mean(), "kl": kl + 0.1 * ce, "retain": ce}


def hold(opt, losses):
    """The plain way, loss by loss."""
    for n, (name, loss) in enumerate(losses.items()):
        with opt.objective(name):
            loss.backward(retain_graph=n < len(losses) - 1)


def trained(
    model,
    *,
    streamed,
    steps=4,
    micro=1,
    names=NAMES,
    at_once=True,
    everything=False,
    losses=losses_of,
    **options,
):
    """The model and its reports after some steps."""
    model = copy.deepcopy(model)
    params = [p for p in model.parameters() if everything or p.requires_grad]
    memory = "streamed" if streamed else "as-produced"
    opt = MOLLMOptimizer(
        options.pop("groups", lambda params: params)(params),
        **{"lr": 1e-2, "objectives": names, "gradient_memory": memory, **options},
    )
    blocks = find_blocks(model) if streamed else ()
    reports = []
    torch.manual_seed(3)
    for step in range(steps):
        opt.zero_grad()
        for forget, retain in batches(micro, step):
            with opt.streamed(blocks) if streamed else contextlib.nullcontext():
                found = losses(model, forget, retain)
                found = {name: found[name] for name in names}
                if not streamed:
                    hold(opt, found)
                elif at_once:
                    opt.backward(found)
                else:
                    opt.backward({"forget": found.pop("forget")})
                    opt.backward(found)
        opt.step()
        reports.append(opt.last_step)
    return model, opt, reports


def watched(seen):
    """An optimizer that notes how many parameters it works on at a time."""

    class Watched(MOLLMOptimizer):
        def _pieces(self, params):
            for piece in super()._pieces(params):
                seen.append(sum(p.numel() for p in piece[1]))
                yield piece

    return Watched


def assert_same(one, other, limit=1e-12):
    (a, opt_a, reports_a), (b, opt_b, reports_b) = one, other
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=limit)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        mine, theirs = opt_a.state.get(p, {}), opt_b.state.get(q, {})
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=limit)
    for x, y in zip(reports_a, reports_b, strict=True):
        torch.testing.assert_close(x.gram, y.gram, rtol=max(1e-9, limit), atol=limit)
        torch.testing.assert_close(x.weights, y.weights, rtol=1e-7, atol=1e-9)
        assert x.status == y.status
        assert x.conflicts == y.conflicts
        assert (x.changes is None) == (y.changes is None)
        for name in x.changes or {}:
            assert x.changes[name] == pytest.approx(y.changes[name], rel=1e-6, abs=1e-12)


def moved(model, start):
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    return any(not torch.equal(p, q) for p, q in pairs)
