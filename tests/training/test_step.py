import pytest
import tiny
import torch

from mollm import MOLLMOptimizer
from mollm.data.chat import ChatFormat, Example, collate
from mollm.methods import METHODS
from mollm.methods.method import OBJECTIVES
from mollm.models import forward
from mollm.training.objectives import Objectives, totals_of
from mollm.training.reference_model import CopyReference
from mollm.training.step import accumulate

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
            totals=(totals_of(FORGET), totals_of(RETAIN)),
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
        forward.answer_states(model, collate(RETAIN, CHAT.pad_id, side))[0]
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
    totals = totals_of(RETAIN)
    assert totals.sequences == 4
    assert totals.tokens == sum(n + 1 for n in range(4)) + 4  # and the end of every turn
