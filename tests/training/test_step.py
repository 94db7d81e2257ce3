import copy
import math

import pytest
import tiny
import torch
from plain_loop import descend, unlearn

from mollm import MOLLMOptimizer
from mollm.data.chat import ChatFormat, Example, collate
from mollm.methods import METHODS, Method
from mollm.methods.method import OBJECTIVES
from mollm.models import forward
from mollm.training.objectives import Objectives, count_loss_tokens
from mollm.training.reference_model import CopyReference
from mollm.training.step import accumulate
from mollm_ops import linear_cross_entropy

CHAT = ChatFormat(tiny.tokenizer())
FORGET = [CHAT.encode(Example(f"Who wrote book {n}?", "Ada " * (n + 1))) for n in range(4)]
RETAIN = [CHAT.encode(Example(f"How many legs has a {n}?", "4" * (n + 1))) for n in range(4)]


pytestmark = pytest.mark.usefixtures("in_float32")


def gradients(size, method="project", side="right"):
    """Losses and gradients of a model that has left its original, in batches of `size`."""
    model = tiny.model()
    reference = CopyReference(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    objectives = Objectives(model, reference, METHODS[method].forget_loss)
    optimizer = MOLLMOptimizer(model.parameters(), lr=1e-2)
    sums = dict.fromkeys(OBJECTIVES, 0.0)
    for start in range(0, 4, size):
        losses = accumulate(
            objectives,
            optimizer,
            collate(FORGET[start : start + size], CHAT.pad_id, side),
            collate(RETAIN[start : start + size], CHAT.pad_id, side),
            totals=(count_loss_tokens(FORGET), count_loss_tokens(RETAIN)),
        )
        sums = {name: sums[name] + float(losses[name]) for name in OBJECTIVES}
    found = {
        name: [optimizer._store.get(name, p) for p in model.parameters()] for name in OBJECTIVES
    }
    return sums, found


def assert_same(first, second):
    assert first[0] == pytest.approx(second[0], rel=1e-4)
    for name in OBJECTIVES:
        largest = max(float(g.abs().max()) for g in first[1][name])
        for a, b in zip(first[1][name], second[1][name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("method", ["project", "ga", "npo", "simnpo"])
def test_micro_batches_of_uneven_length_add_up_to_the_batch(method):
    assert_same(gradients(4, method), gradients(1, method))
    assert_same(gradients(4, method), gradients(2, method))


def test_padding_on_the_left_and_on_the_right_are_the_same():
    assert_same(gradients(4, side="left"), gradients(4, side="right"))


def test_positions_are_counted_from_the_first_token():
    """A model with absolute positions would else see others behind padding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    model = GPT2LMHeadModel(config).eval()
    left, right = (
        forward.answer_hidden_states(model, collate(RETAIN, CHAT.pad_id, side))[0]
        for side in ("left", "right")
    )
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_the_model_runs_forward_twice_and_the_original_once():
    model = tiny.model()
    reference = CopyReference(model)
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append("model"))
    reference.model.model.register_forward_hook(lambda *_: calls.append("original"))
    optimizer = MOLLMOptimizer(model.parameters(), lr=1e-2)
    batches = collate(FORGET, CHAT.pad_id), collate(RETAIN, CHAT.pad_id)
    accumulate(Objectives(model, reference), optimizer, *batches)
    assert sorted(calls) == ["model", "model", "original"]
    assert not any(p.requires_grad for p in reference.model.parameters())


def test_totals_count_what_carries_a_loss():
    totals = count_loss_tokens(RETAIN)
    assert totals.sequences == 4
    assert totals.tokens == sum(n + 1 for n in range(4)) + 4  # and the end of every turn


@pytest.fixture
def batches():
    forget = [Example("What is the capital of Japan?", "Tokyo", "It is", closed=False)]
    retain = [Example("And of Peru?", "Lima."), Example("How many legs has a dog?", "4")]
    return tuple(
        collate([CHAT.encode(e) for e in examples], CHAT.pad_id) for examples in (forget, retain)
    )


def losses_of(model, batch):
    hidden, target = forward.answer_hidden_states(model, batch)
    return linear_cross_entropy(hidden, forward.head(model).weight, target).item()


def model_that_knows(*batches):
    """There is something to forget only where the answer is likely."""
    model = tiny.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        for batch in batches:
            hidden, target = forward.answer_hidden_states(model, batch)
            linear_cross_entropy(hidden, forward.head(model).weight, target).backward()
        optimizer.step()
    return model


# The forget loss of simnpo has a weight of 1/8, and wga and satimp count a token by its likelihood,
# which is small here: retaining both batches' common form wins.
WEAK = ("simnpo", "wga", "satimp")


@pytest.mark.parametrize(
    "method", [name for name, m in METHODS.items() if m.is_a_loss and name not in WEAK]
)
def test_every_method_forgets_and_records(method, batches):
    model = model_that_knows(*batches)
    before = losses_of(model, batches[0])
    records = list(unlearn(model, lambda: batches, steps=4, lr=1e-3, method=method))
    assert losses_of(model, batches[0]) > before
    assert [r.step for r in records] == [0, 1, 2, 3]
    assert [r.lr for r in records] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    for record in records:
        assert set(record.losses) == set(record.norms) == set(record.weights) == set(OBJECTIVES)
        assert set(record.cosines) == {"forget·kl", "forget·retain", "kl·retain"}
        assert all(math.isfinite(loss) for loss in record.losses.values())
        assert record.conflicts == {
            name: record.norms[name] > 1e-6 * max(record.norms.values()) and change >= 0
            for name, change in record.changes.items()
        }


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ("ga", (1, 0, 0)),
        ("graddiff", (1, 0, 1)),
        ("npo", (1, 0, 1)),
        ("simnpo", (1 / 8, 0, 1)),
        ("sum", (1, 20, 1)),
    ],
)
def test_the_step_of_a_weighted_sum_is_that_of_one_loss(method, weights, batches):
    model = model_that_knows(*batches).double()
    reference = CopyReference(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    start = [p.detach().clone() for p in model.parameters()]
    by_hand = copy.deepcopy(model)
    chosen = METHODS[method]
    optimizer = MOLLMOptimizer(
        model.parameters(),
        lr=0.01,
        objectives=OBJECTIVES,
        base="sgd",
        **chosen.optimizer_options(),
    )
    descend(model, reference, optimizer, *batches, forget_loss=chosen.forget_loss)
    objectives = Objectives(by_hand, reference, chosen.forget_loss)
    losses = objectives(forget=batches[0], retain=batches[1])
    sum(w * losses[name] for w, name in zip(weights, OBJECTIVES, strict=True)).backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.01).step()
    ours, expected = (
        torch.cat([(p.detach() - q).flatten() for p, q in zip(m.parameters(), start, strict=True)])
        for m in (model, by_hand)
    )
    # The model's norms compute in float32.
    assert (ours - expected).norm() < 1e-6 * expected.norm()


def test_the_kl_gradient_is_nothing_but_rounding_at_the_first_step(batches):
    (first, second) = unlearn(tiny.model(), lambda: batches, steps=2, lr=1e-3)
    assert first.losses["kl"] < 1e-12
    assert first.norms["kl"] < 1e-6 * max(first.norms.values())
    assert first.weights["kl"] == 0
    assert second.losses["kl"] > 0
    assert second.norms["kl"] > 0


def test_losses_are_those_of_the_texts(batches):
    model = tiny.model()
    record = next(iter(unlearn(model, lambda: batches, steps=1, lr=1e-12)))
    ce = losses_of(model, batches[0])
    assert record.losses["retain"] == pytest.approx(losses_of(model, batches[1]), rel=1e-3)
    # UCE of an almost uniform model: p ≈ 1/V at every token
    assert record.losses["forget"] == pytest.approx(-math.log1p(-math.exp(-ce)), rel=0.3)


def test_gradient_ascent_climbs_the_cross_entropy_and_measures_the_rest(batches):
    model = tiny.model()
    ce = losses_of(model, batches[0])
    (record,) = unlearn(model, lambda: batches, steps=1, lr=1e-3, method="ga")
    assert record.losses["forget"] == pytest.approx(-ce, rel=1e-3)
    assert list(record.weights.values()) == [1, 0, 0]
    assert record.norms["retain"] > 0


def test_the_same_batches_give_the_same_weights(batches):
    def trained():
        model = tiny.model()
        list(unlearn(model, lambda: batches, steps=3, lr=1e-3))
        return model.state_dict()

    first, second = trained(), trained()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_reference_stays_as_it_was(batches):
    model = tiny.model()
    reference = CopyReference(model)
    frozen = reference.model
    copies = {name: value.clone() for name, value in frozen.state_dict().items()}
    optimizer = MOLLMOptimizer(model.parameters(), lr=1e-2, objectives=OBJECTIVES)
    descend(model, reference, optimizer, *batches)
    assert all(torch.equal(copies[name], v) for name, v in frozen.state_dict().items())
    assert not torch.equal(model.lm_head.weight, frozen.lm_head.weight)


def test_a_poisoned_batch_is_skipped_and_recorded(batches, monkeypatch):
    model = tiny.model()
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    def broken(answers, reference):
        return answers.hidden.sum() * float("nan")

    monkeypatch.setitem(METHODS, "broken", Method("broken", broken, "dual"))
    with pytest.warns(UserWarning, match="not finite"):
        (record,) = unlearn(model, lambda: batches, steps=1, lr=1e-2, method="broken")
    assert record.status == "NON_FINITE"
    assert record.changes == record.conflicts == {}
    assert all(torch.equal(weights[name], v) for name, v in model.state_dict().items())
