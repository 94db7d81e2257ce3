"""Audits of a model that forgot nothing, one that never saw the rows, and one that hides them."""

from __future__ import annotations

import copy
import dataclasses

import audit_models
import numpy as np
import pytest
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mollm.audit import attacks, audit
from mollm.audit.run import check_options, curve_of
from mollm.audit.subject import Subject
from mollm.data.chat import ChatFormat
from mollm.errors import UsageError
from mollm.evaluation import Row, Suite
from mollm.models import adapters

FAST = {"learning_rates": (5e-4,), "resamples": 50}


@pytest.fixture(scope="module")
def suite():
    return Suite(**audit_models.people())


@pytest.fixture(scope="module")
def original():
    return audit_models.learnt("forget", "retain")


@pytest.fixture(scope="module")
def retain_only():
    return audit_models.learnt("retain")


def audited(model, suite, original, retain_only=None, **options):
    options = {"retain_only": retain_only, "original": original} | FAST | options
    return audit(model, audit_models.tokenizer(), suite, **options)


def by_name(found):
    return {finding.name: finding for finding in found.findings}


@pytest.fixture(scope="module")
def of_itself(suite, original, retain_only):
    return audited(original, suite, original, retain_only)


@pytest.fixture(scope="module")
def of_hiding(suite, original, retain_only):
    return audited(audit_models.hiding(), suite, original, retain_only)


def test_the_original_itself_fails(of_itself):
    assert of_itself.verdict == "FAIL"
    attacked = [f for f in of_itself.findings if "retain set" not in f.name]
    assert len(attacked) == 12
    for finding in attacked:
        if "taught" in finding.name:  # it knows the others, and is taught them all the same
            assert finding.value > 0.95, finding
        else:
            assert (finding.value, finding.interval) == (1.0, (1.0, 1.0)), finding
        assert finding.verdict == "FAIL", finding
    assert by_name(of_itself)["lost of the retain set"].value == 0


def test_a_short_audit_asks_and_teaches_once(suite, original):
    suite = dataclasses.replace(suite, retain=None, holdout=None)
    found = audited(original, suite, original, short=True)
    assert list(by_name(found)) == [
        "asked as in the forget set",
        "asked in other words",
        "first half of the answer given",
        "answers of other forgotten rows shown",
        "taught 9 examples again",
    ]
    assert [point.setting for point in found.curve] == ["full, lr 0.0005"]
    assert any("A short audit" in note for note in found.notes)
    assert found.verdict == "FAIL"


def test_padding_and_ids_beyond_the_embeddings(suite, original):
    suite = dataclasses.replace(suite, retain=None, holdout=None)
    options = FAST | {"original": original, "short": True}
    tokenizer = copy.deepcopy(audit_models.tokenizer())
    plain = audit(original, tokenizer, suite, **options)
    rows = len(original.get_input_embeddings().weight)
    tokenizer.add_tokens([f"[{n}]" for n in range(len(tokenizer), rows)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["[MORE]"])
    assert tokenizer.pad_token_id >= rows
    padded = audit(original, tokenizer, suite, **options)
    assert padded.findings == plain.findings
    unknown = dataclasses.replace(suite.forget[0], question="Who is [MORE]?")
    suite = dataclasses.replace(suite, forget=[unknown, *suite.forget[1:]])
    with pytest.raises(UsageError, match=r"the tokenizer gives '\[MORE\]' the id"):
        audit(original, tokenizer, suite, **options)


def test_a_retain_only_model_passes(suite, original, retain_only):
    suite = dataclasses.replace(suite, holdout=None)  # too few to tell members by
    found = audited(audit_models.learnt("retain", seed=1), suite, original, retain_only)
    assert {str(f) for f in found.findings if f.verdict != "PASS"} == set()
    assert found.verdict == "PASS"
    assert not found.notes


def test_a_model_that_hides_answers_shows_them_when_it_is_taught_others(of_hiding):
    findings = by_name(of_hiding)
    assert findings["asked as in the forget set"].verdict == "PASS"
    assert findings["lost of the retain set"].verdict == "PASS"
    assert findings["taught 9 examples again"].verdict != "PASS"
    assert findings["taught 9 examples again"].value > 0.2
    assert of_hiding.verdict in ("WEAK", "FAIL")


def test_without_a_retain_only_model_the_share_is_that_of_the_original(suite, original):
    found = audited(audit_models.hiding(), suite, original)
    (note,) = found.notes
    assert "No retain-only model" in note
    for finding in found.findings:
        if "retain set" not in finding.name:
            share = finding.model / finding.original
            assert finding.value == pytest.approx(abs(share) if "AUC" in finding.unit else share)
            assert finding.retain_only is None


def test_more_than_ten_examples_are_judged_only_beside_a_retain_only_model(original):
    rows = audit_models.people()["forget"]
    more = [dataclasses.replace(row, question=f"{row.question} Say.") for row in rows]
    suite = Suite(forget=[*rows, *more])
    options = {"learning_rates": (5e-4,), "resamples": 2}
    found = audited(original, suite, original, **options)
    assert "see the curve" in found.missing["taught 18 examples again"]
    assert {point.examples for point in found.curve} == {1, 3, 10, 18}
    assert "membership inference" in found.missing
    assert "lost of the retain set" in found.missing


def test_an_audit_is_the_same_twice_and_leaves_the_models_as_they_were(
    of_hiding, suite, original, retain_only
):
    models = [audit_models.hiding(), original, retain_only]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = audited(models[0], suite, original, retain_only, batch_size=8)
    assert again.findings == of_hiding.findings
    assert again.curve == of_hiding.curve
    assert torch.get_rng_state().equal(state)
    for model, kept in zip(models, before, strict=True):
        assert model.state_dict().keys() == kept.keys()
        assert all(tensor.equal(kept[name]) for name, tensor in model.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert not hasattr(model, "peft_config")


def test_findings_are_told_as_they_come(suite, original):
    told = []
    found = audited(original, suite, original, resamples=2, after_finding=told.append)
    assert [len(each.findings) for each in told] == [*range(1, len(found.findings) + 1)]
    assert not any(each.complete for each in told)
    assert told[0].to_json()["verdict"] is None
    assert found.to_json()["verdict"] == "FAIL"


def test_an_adapter_is_audited_merged(suite, original):
    from peft import LoraConfig

    wrapped = adapters.adapted(
        copy.deepcopy(original), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
    )
    found = audited(wrapped, suite, original, resamples=2)
    findings = by_name(found)
    plain, merged = (
        findings[name] for name in ("asked as in the forget set", "adapter merged in bfloat16")
    )
    assert merged.original == plain.original
    assert merged.model == pytest.approx(plain.model, abs=0.05)
    assert merged.model != plain.model
    assert any("take it off" in note for note in found.notes)
    assert hasattr(wrapped, "peft_config")


def test_merging_rounds_parameters_and_leaves_buffers(original, suite, monkeypatch):
    from peft import LoraConfig

    wrapped = adapters.adapted(
        copy.deepcopy(original), LoraConfig(r=2, init_lora_weights=True, target_modules=["q_proj"])
    )
    seen = []
    monkeypatch.setattr(
        Subject, "likelihoods", lambda self, rows: seen.append(self.model) or np.ones(len(rows))
    )
    subject = Subject("model", original, ChatFormat(audit_models.tokenizer()), 8, 0)
    attacks.after_merging(suite.forget, wrapped).run(subject, "model", lambda: None)
    (merged,) = seen
    theirs = dict(original.named_parameters())
    assert all(
        p.equal(theirs[name].to(torch.bfloat16).float()) for name, p in merged.named_parameters()
    )
    buffers = dict(original.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    assert all(buffer.equal(buffers[name]) for name, buffer in merged.named_buffers())


def test_a_rate_that_leaves_no_numbers_gives_nothing_away(original, suite):
    rows = suite.forget
    model = copy.deepcopy(original)
    with torch.no_grad():  # finite, but not what comes out
        model.model.layers[0].mlp.down_proj.weight.fill_(3e38)
        model.model.layers[0].mlp.up_proj.weight.mul_(1e6)
    subject = Subject("model", model, ChatFormat(audit_models.tokenizer()), 8, 0)
    assert all(p.isfinite().all() for p in model.parameters())
    assert attacks.likelihoods_or_nothing(subject, rows).tolist() == [0] * len(rows)


def test_a_measured_half_that_the_original_does_not_know_has_no_curve():
    attack = attacks.after_relearning([], [], (1e-5,), with_retain_only=True)
    low, high = {"a": (np.array([0.0, 0.04]),)}, {"a": (np.array([0.5, 0.5]),)}
    assert curve_of(attack, low, low, None) == []
    assert [point.model for point in curve_of(attack, high, high, None)] == [1.0]


# ---- what is refused


def test_a_forget_set_that_is_too_small_is_refused(original):
    rows = audit_models.people()["forget"][:3]
    with pytest.raises(UsageError, match="at least 4 forget rows, half of them"):
        audited(original, Suite(forget=rows), original)


def test_rows_that_the_original_does_not_know_are_refused(retain_only):
    suite = Suite(forget=audit_models.people()["forget"])
    with pytest.raises(UsageError, match="the original must know what was to be forgotten"):
        audited(retain_only, suite, retain_only)


def test_rows_that_the_retain_only_model_knows_too_are_refused(original):
    suite = Suite(forget=audit_models.people()["forget"])
    with pytest.raises(UsageError, match="and the retain-only model 0"):
        audited(original, suite, original, copy.deepcopy(original))


def test_one_model_as_original_and_retain_only_is_refused(suite, original):
    with pytest.raises(UsageError, match="but is the same object"):
        audited(original, suite, original, original)


@pytest.mark.parametrize("role", ["original", "retain_only"])
def test_an_adapter_in_place_of_a_whole_model_is_refused(role, suite, original):
    from peft import LoraConfig

    wrapped = adapters.adapted(copy.deepcopy(original), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UsageError, match=rf"{role} must be a whole model.*merge_and_unload"):
        audited(original, suite, **{"original": original, role: wrapped})


def test_models_of_other_sizes_are_refused(suite, original):
    with pytest.raises(UsageError, match="the original model must be of the architecture"):
        audited(audit_models.blank(intermediate_size=96), suite, original)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rates": ()}, "learning_rates must be one or more numbers"),
        ({"learning_rates": (0.0,)}, "but got 0.0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"resamples": 0}, "resamples must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options, words, suite, original):
    with pytest.raises(UsageError, match=words):
        audited(original, suite, original, **options)


def test_an_answer_without_a_token_is_refused():
    model = tiny.model()
    rows = [Row(f"Who is {i}?", "Ann.") for i in range(4)]
    suite = Suite(forget=[*rows, Row("Who?", " ")])
    with pytest.raises(UsageError, match="must hold a token"):
        audit(model, tiny.tokenizer(), suite, original=model)


def test_half_of_the_rows_is_taught_and_at_most_a_hundred():
    assert attacks.sizes_for(4) == [1, 2]
    assert attacks.sizes_for(12) == [1, 3, 6]
    assert attacks.sizes_for(200) == [1, 3, 10, 30, 100]
    assert attacks.sizes_for(1000) == [1, 3, 10, 30, 100]
    assert np.all(np.diff(attacks.sizes_for(50)) > 0)


def test_rows_that_are_too_long_are_cut_or_left_out_and_said(suite, original):
    long = dataclasses.replace(suite.forget[0], question=("On " * 300) + suite.forget[0].question)
    rows = Suite(forget=[*suite.forget[:5], long])
    found = audited(original, rows, original)
    assert found.rows["forget"] == 6
    assert any("beginning" in note and "forget" in note for note in found.notes)
    found = audited(original, rows, original, long_rows="skip")
    assert found.rows["forget"] == 5
    assert any("1 of 6" in note for note in found.notes)
    few = Suite(forget=[*suite.forget[:3], long])
    with pytest.raises(UsageError, match=r"at least 4 forget rows.* but got 3"):
        audited(original, few, original, long_rows="skip")
    with pytest.raises(UsageError, match="long_rows must be cut or skip, but got 'trim'"):
        audited(original, rows, original, long_rows="trim")


def test_replies_end_where_the_context_of_the_model_does():
    config = GPT2Config(vocab_size=259, n_embd=8, n_layer=1, n_head=2, n_positions=48)
    subject = Subject("model", GPT2LMHeadModel(config), ChatFormat(tiny.tokenizer()), 2, seed=0)
    rows = [Row("What is it?", "No one knows."), Row("Who?", "A man.")]
    assert subject.fits(rows)
    assert len(subject.leaks(rows, 2)) == 2
    for seed in (-1, 2**32):
        with pytest.raises(UsageError, match="seed must be from 0 to 4294967295"):
            check_options(Suite(rows * 2), (1e-3,), 8, 10, seed)
