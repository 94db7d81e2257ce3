import pytest
import tiny
import torch
from torch import nn

from mollm import CopyReference, MOLLMConfig, MOLLMTrainer, Objectives
from mollm.data.chat import ChatFormat, Example, Tokens, collate
from mollm.data.records import Record
from mollm.errors import UsageError
from mollm.models import forward
from mollm.training.relearning import relearnt, rows_to_relearn
from mollm.training.step import accumulate_forget

CHAT = ChatFormat(tiny.tokenizer())
ROWS = [CHAT.encode(Example(f"Who wrote book {n}?", "Ada " * (n % 3 + 1))) for n in range(8)]

pytestmark = pytest.mark.usefixtures("in_float32")


def some_rows(count):
    return [Tokens([n], [n]) for n in range(count)]


def test_an_attacker_learns_rows_that_the_step_does_not_see():
    rows = some_rows(10)
    outer = rows[2:5]
    drawn = rows_to_relearn(rows, outer, seed=0, step=3)
    assert len(drawn) == 3
    assert not {id(row) for row in drawn} & {id(row) for row in outer}
    assert drawn == rows_to_relearn(rows, outer, seed=0, step=3)
    assert drawn != rows_to_relearn(rows, outer, seed=0, step=4)


@pytest.mark.parametrize(("seen", "drawn"), [(9, 1), (10, 10)])
def test_of_a_small_set_an_attacker_learns_what_is_left_or_all(seen, drawn):
    rows = some_rows(10)
    assert len(rows_to_relearn(rows, rows[:seen], seed=0, step=0)) == drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_come_back_bit_for_bit(dtype):
    model = tiny.model().to(dtype)
    losses = Objectives(model, CopyReference(model))
    params = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in params]
    batch = collate(ROWS[:4], CHAT.pad_id)

    def backward():
        losses(relearn=batch)["relearn"].backward()

    loss = float(losses(relearn=batch)["relearn"])
    with relearnt(params, backward, steps=3, lr=1e-2):
        assert float(losses(relearn=batch)["relearn"]) < loss
        assert all(p.grad is None for p in params)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    with pytest.raises(KeyboardInterrupt), relearnt(params, backward, steps=1, lr=1e-2):
        raise KeyboardInterrupt
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_an_attacker_takes_steps_of_adamw():
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    other = weight.detach().clone().requires_grad_()
    theirs = torch.optim.AdamW([other], lr=0.1, weight_decay=0.0)
    for _ in range(4):
        theirs.zero_grad()
        other.pow(4).sum().backward()
        theirs.step()
    with relearnt([weight], lambda: weight.pow(4).sum().backward(), steps=4, lr=0.1):
        torch.testing.assert_close(weight, other, rtol=1e-12, atol=0)


FORGET = [Record(f"Who wrote book {n}?", "Ada " * (n % 3 + 1)) for n in range(10)]
RETAIN = [Record(f"How many legs has animal {n}?", "four " * (n % 4 + 1)) for n in range(12)]


def trainer(out, *, forget=FORGET, peft_config=None, **options):
    settings = {
        "use_cpu": True,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "disable_tqdm": True,
        "relearn_steps": 2,
    }
    return MOLLMTrainer(
        tiny.model(tie_word_embeddings=False),
        MOLLMConfig(output_dir=str(out), **(settings | options)),
        forget_dataset=forget,
        retain_dataset=RETAIN,
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )


def weights(made):
    return {name: p.detach().clone() for name, p in made._base.named_parameters()}


def test_the_forget_gradient_is_that_after_relearning(tmp_path):
    """Made once more by hand, with Torch's own optimizer and a copy of the model."""
    made = trainer(tmp_path)
    made._begin()
    rows = next(made._sampler)
    losses = made._accumulate(rows)

    twin = tiny.model(tie_word_embeddings=False)
    forward.freeze_embeddings(twin)
    objectives = Objectives(twin, CopyReference(twin), made.args.forget_loss)
    params = [p for p in twin.parameters() if p.requires_grad]
    attacker = torch.optim.AdamW(params, lr=3e-3, weight_decay=0.0)
    others = rows_to_relearn(made._data.rows["forget"], rows["forget"], seed=42, step=0)
    attack = collate(others, CHAT.pad_id)
    for _ in range(2):
        attacker.zero_grad()
        objectives(relearn=attack)["relearn"].backward()
        attacker.step()
    attacker.zero_grad()
    loss = objectives(forget=collate(rows["forget"], CHAT.pad_id))["forget"]
    loss.backward()
    assert losses["forget"] == pytest.approx(float(loss), rel=1e-5)
    mine = [p for p in made._base.parameters() if p.requires_grad]
    for p, q in zip(mine, params, strict=True):
        found = made.optimizer._store.get("forget", p)
        torch.testing.assert_close(found, q.grad, rtol=1e-3, atol=1e-5 * float(q.grad.abs().max()))


def test_a_run_with_relearning_resumes_bit_for_bit(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    first = trainer(tmp_path / "cut", save_strategy="steps", save_steps=2)
    first.train()
    second = trainer(tmp_path / "cut", save_strategy="steps", save_steps=2)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert [r.losses for r in second.history] == [r.losses for r in whole.history]
    for name, value in weights(second).items():
        assert torch.equal(value, weights(whole)[name]), name


def test_an_adapter_alone_relearns(tmp_path):
    peft = pytest.importorskip("peft")
    made = trainer(tmp_path, peft_config=peft.LoraConfig(r=4, target_modules="all-linear"))
    before = weights(made)
    made.train()
    changed = {n for n, value in weights(made).items() if not torch.equal(value, before[n])}
    assert changed == {n for n in before if "lora_" in n}


def test_a_set_too_small_to_be_split_is_told(tmp_path):
    notes = trainer(tmp_path, forget=FORGET[:4]).notes
    assert any("no more than a step sees" in note for note in notes)
    assert not any("no more than a step sees" in note for note in trainer(tmp_path).notes)


def test_settings_without_effect_are_refused(tmp_path):
    with pytest.raises(UsageError, match="relearn_lr must be left out without relearn_steps"):
        trainer(tmp_path, relearn_steps=0, relearn_lr=1e-3)
    with pytest.raises(UsageError, match="relearn_steps must not be negative"):
        trainer(tmp_path, relearn_steps=-1)


def test_a_forget_batch_alone_is_accumulated():
    model = tiny.model()
    from mollm import MOLLMOptimizer

    optimizer = MOLLMOptimizer(model.parameters(), lr=1e-2)
    losses = Objectives(model, CopyReference(model))
    found = accumulate_forget(losses, optimizer, collate(ROWS[:2], CHAT.pad_id))
    assert list(found) == ["forget"]
    assert "forget" in optimizer._store
