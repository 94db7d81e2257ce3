"""Several sets to forget and to retain: an objective for each, and KL over all that is kept."""

import json

import pytest
import tiny
import torch

from mollm import MOLLMConfig, MOLLMTrainer
from mollm.data.records import Record
from mollm.errors import UsageError

FORGET = {
    "ada": [Record(f"Who wrote book {n}?", "Ada " * (n % 3 + 1)) for n in range(6)],
    "bob": [Record(f"Who painted wall {n}?", "Bob " * (n % 2 + 1)) for n in range(9)],
}
RETAIN = {
    "legs": [Record(f"How many legs has animal {n}?", "four " * (n % 4 + 1)) for n in range(7)],
    "sums": [Record(f"What is {n} and {n}?", f"{2 * n} it is") for n in range(11)],
}
NAMES = ("forget_ada", "forget_bob", "kl", "retain_legs", "retain_sums")


def trainer(out, forget=FORGET, retain=RETAIN, evaluate=None, **options):
    settings = {
        "use_cpu": True,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "logging_steps": 2,
        "disable_tqdm": True,
    }
    return MOLLMTrainer(
        tiny.model(tie_word_embeddings=False),
        MOLLMConfig(output_dir=str(out), **(settings | options)),
        forget_dataset=forget,
        retain_dataset=retain,
        eval_dataset=evaluate,
        processing_class=tiny.tokenizer(),
    )


def weights(made):
    return {name: p.detach().clone() for name, p in made._base.named_parameters()}


def test_every_set_is_an_objective(tmp_path, in_float32):
    made = trainer(tmp_path)
    made.train()
    assert made.objectives == made.optimizer.objectives == NAMES
    assert len(made.optimizer.last_step.gram) == 5
    for record in made.history:
        assert tuple(record.losses) == tuple(record.norms) == tuple(record.weights) == NAMES
        assert not any(record.conflicts.values())
        assert len(record.cosines) == 10
    logs = [log for log in made.state.log_history if "kl_loss" in log][-1]
    assert {"forget_bob_loss", "grad_norm_retain_sums", "cosine_forget_ada_kl"} <= set(logs)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert tuple(json.loads(lines[0])["losses"]) == NAMES
    card = (tmp_path / "README.md").read_text()
    assert "w retain_sums" in card
    assert "| forget\\_ada |" in card


def test_a_single_set_may_have_a_name(tmp_path, in_float32):
    plain = trainer(tmp_path / "a", FORGET["bob"], RETAIN["sums"])
    named = trainer(tmp_path / "b", {"bob": FORGET["bob"]}, RETAIN["sums"])
    assert plain.objectives == ("forget", "kl", "retain")
    assert named.objectives == ("forget_bob", "kl", "retain")


def test_kl_is_the_mean_over_all_that_is_retained(tmp_path, in_float32):
    """Gradients of two sets in two batches are those of both in one."""
    made = trainer(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    made._begin()
    rows = next(made._sampler)
    with torch.no_grad():
        for p in made._base.parameters():
            p.mul_(1.02)
    losses = made._accumulate(rows)
    both = made._batch([*rows["retain_legs"], *rows["retain_sums"]])
    params = [p for p in made._base.parameters() if p.requires_grad]
    kl = made._passes.objectives(retain=both)["kl"]
    expected = torch.autograd.grad(kl, params)
    assert losses["kl"] == pytest.approx(float(kl), rel=1e-4)
    for p, g in zip(params, expected, strict=True):
        found = made.optimizer._store.get("kl", p)
        torch.testing.assert_close(found, g, rtol=1e-3, atol=1e-4 * float(g.abs().max()))


def test_micro_batches_add_up(tmp_path, in_float32):
    sgd = {"optimizer_options": {"base": "sgd"}, "learning_rate": 0.05}
    ends = []
    for name, size in (("a", 4), ("b", 1)):
        made = trainer(
            tmp_path / name,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            **sgd,
        )
        made.train()
        ends.append(weights(made))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-4, atol=1e-5)


def test_a_run_of_several_sets_resumes_bit_for_bit(tmp_path, in_float32):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "whole")
    whole.train()
    trainer(tmp_path / "cut", **saving).train()
    second = trainer(tmp_path / "cut", **saving)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert [r.as_dict() for r in second.history] == [r.as_dict() for r in whole.history]
    for name, value in weights(second).items():
        assert torch.equal(value, weights(whole)[name]), name


def test_other_sets_are_refused_on_resuming(tmp_path):
    trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    other = trainer(tmp_path, retain={"legs": RETAIN["legs"], "more": RETAIN["sums"]})
    with pytest.raises(UsageError, match=r"cannot resume from .*: objectives was"):
        other.train(resume_from_checkpoint=True)


def test_preferences_are_by_role_or_by_name(tmp_path):
    made = trainer(tmp_path, preferences={"kl": 10, "retain": 2, "retain_sums": 3})
    made.create_optimizer()
    assert made.optimizer.rule.preferences == (1.0, 1.0, 10.0, 2.0, 3.0)
    made = trainer(tmp_path, preferences=[1, 5, 2])
    made.create_optimizer()
    assert made.optimizer.rule.preferences == (1.0, 1.0, 5.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preferences": {"kll": 10}}, r"preferences must be of .*got 'kll'.*kl"),
        ({"preferences": {"retain_code": 1}}, r"preferences must be of .*, but got 'retain_code'"),
        ({"preferences": [1, 2]}, "preferences"),
        ({"method": "retain-first"}, "retain-first must have one set to forget"),
        ({"forget": {"no name": FORGET["ada"]}}, "a name of letters, digits, - and _"),
        ({"forget": {"ada": []}}, "the forget data must hold at least one row"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        trainer(tmp_path, **options)


def test_sets_to_evaluate_on_are_named_like_those_to_train_on(tmp_path, in_float32):
    evaluate = {"forget": {"bob": FORGET["bob"][:3]}, "retain_sums": RETAIN["sums"][:2]}
    made = trainer(tmp_path, evaluate=evaluate, eval_strategy="steps", eval_steps=2)
    made.train()
    last = [log for log in made.state.log_history if "eval_loss" in log][-1]
    assert {"eval_forget_bob_loss", "eval_kl_loss", "eval_retain_sums_loss"} <= set(last)
    found = made.evaluate({"retain": RETAIN["sums"][:2]})
    assert found["eval_retain_loss"] == pytest.approx(last["eval_retain_sums_loss"])
