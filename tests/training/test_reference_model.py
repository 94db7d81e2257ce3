import copy
import os

import pytest
import tiny
import torch
import zoo

from mollm.data.chat import ChatFormat, Example, collate
from mollm.errors import UsageError
from mollm.models import forward
from mollm.models.trainable import train_only
from mollm.system.precision import computing_in
from mollm.training.objectives import Objectives
from mollm.training.reference_model import AdapterReference, cache_name, make_reference

peft = pytest.importorskip("peft")

CHAT = ChatFormat(tiny.tokenizer())
ROWS = [
    CHAT.encode(Example(*pair))
    for pair in (("Who?", "Ada"), ("And when was that?", "In 1843."), ("Where?", "London"))
]


def made(kind, model, wrapped=None, folder=None):
    reference = make_reference(kind, model, wrapped, folder=folder)
    if kind == "cache":
        fill(reference, model)
    return reference


def fill(reference, model, rows=ROWS):
    states = Objectives(model, reference).states
    device = torch.device("cpu")
    reference.fill(rows, states, device=device, batch_size=2, pad_id=CHAT.pad_id)


def with_adapter(model, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, **({"target_modules": "all-linear"} | options))
    wrapped = peft.get_peft_model(model, config)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    return wrapped


def opened(path):
    from safetensors import safe_open

    return safe_open(str(path), framework="pt")


def spoil(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))


def assert_same(a, b, **tolerance):
    assert torch.equal(a.target, b.target)
    assert torch.equal(a.sequence, b.sequence)
    torch.testing.assert_close(a.hidden, b.hidden, **tolerance)
    torch.testing.assert_close(a.weight, b.weight, rtol=0, atol=0)


def test_copy_cache_and_adapter_are_the_same_original(tmp_path):
    batch = collate([ROWS[2], ROWS[0], ROWS[1]], CHAT.pad_id)
    model = tiny.model(tie_word_embeddings=False)
    plain = made("copy", model)
    cached = made("cache", model, folder=tmp_path / "cache")
    before = plain.answers(batch)
    wrapped = with_adapter(copy.deepcopy(model))
    adapter = made("auto", wrapped.get_base_model(), wrapped)
    assert isinstance(adapter, AdapterReference)
    spoil(model)
    wide = {"rtol": 2e-2, "atol": 2e-2}  # autocast in bf16, in batches of other widths
    assert_same(plain.answers(batch), before, rtol=0, atol=0)
    assert_same(cached.answers(batch), before, **wide)
    assert_same(adapter.answers(batch), before, rtol=0, atol=0)


def test_a_cached_row_is_found_whatever_its_padding(tmp_path):
    cached = made("cache", tiny.model(), folder=tmp_path / "cache")
    right, left = (collate(ROWS, CHAT.pad_id, side) for side in ("right", "left"))
    assert_same(cached.answers(right), cached.answers(left), rtol=0, atol=0)
    unknown = collate([CHAT.encode(Example("Why?", "So."))], CHAT.pad_id)
    with pytest.raises(UsageError, match="must be asked about rows of its cache alone"):
        cached.answers(unknown)


def test_a_cache_takes_as_many_bytes_as_its_states_and_is_used_again(tmp_path, monkeypatch):
    model = tiny.model().bfloat16()
    made("cache", model, folder=tmp_path / "cache")
    answer_tokens = sum(label != -100 for row in ROWS for label in row.labels)
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    assert 0 <= file.stat().st_size - answer_tokens * 32 * 2 < 1024
    monkeypatch.setattr(Objectives, "states", lambda *_: pytest.fail("computed again"))
    made("cache", model, folder=tmp_path / "cache")
    assert cache_name(model, ROWS, "a") != cache_name(model, ROWS, "b")
    assert cache_name(model, ROWS, "a") != cache_name(model, ROWS[:2], "a")
    names = set()
    for dtype in ("float32", "bfloat16"):
        with computing_in(dtype):
            names.add(cache_name(model, ROWS, "a"))
    assert len(names) == 2


def test_a_cache_that_was_begun_is_completed(tmp_path):
    model = tiny.model()
    begun = make_reference("cache", model, None, folder=tmp_path)
    fill(begun, model, ROWS[:1])
    (tmp_path / ".unfinished-x").mkdir()  # of a run that was killed as it wrote
    made("cache", model, folder=tmp_path)
    pieces = [len(read.keys()) for read in map(opened, tmp_path.rglob("*.safetensors"))]
    assert sorted(pieces) == [1, 2]
    assert not list(tmp_path.glob(".unfinished-*"))


@pytest.mark.parametrize(
    "how", ["cut short", "of another model", "of other rows", "narrower", "a pipe"]
)
def test_a_cache_that_cannot_be_trusted_is_computed_again(tmp_path, how, caplog):
    from safetensors.torch import load_file, save_file

    model = tiny.model()
    batch = collate(ROWS, CHAT.pad_id)
    expected = made("cache", model, folder=tmp_path).answers(batch)
    (path,) = tmp_path.rglob("*.safetensors")
    states = load_file(path)
    if how == "cut short":
        path.write_bytes(path.read_bytes()[:-7])
    elif how == "of another model":
        save_file({name: t + 1 for name, t in states.items()}, path, metadata={"model": "other"})
    elif how == "a pipe":
        path.unlink()
        os.mkfifo(path)
    elif how == "of other rows":
        save_file({name: t[:1].clone() for name, t in states.items()}, path)
    else:
        save_file({name: t[:, :7].clone() for name, t in states.items()}, path)
    assert_same(made("cache", model, folder=tmp_path).answers(batch), expected)
    assert "are damaged or of another model: they are computed again" in caplog.text


def test_an_adapter_that_was_given_is_the_reference_as_it_was_given(tmp_path):
    model = tiny.model(tie_word_embeddings=False, attention_bias=True)
    wrapped = with_adapter(model, target_modules=["q_proj", "lm_head"], bias="all")
    batch = collate(ROWS[:2], CHAT.pad_id)
    expected = made("copy", model).answers(batch)
    references = [AdapterReference(wrapped, with_adapter=True)]
    cached = make_reference("cache", model, wrapped, folder=tmp_path, with_adapter=True)
    fill(cached, model)
    references.append(cached)
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.3 * torch.randn_like(p))
    after = {name: p.detach().clone() for name, p in trained.items()}
    for reference in references:
        assert_same(reference.answers(batch), expected, rtol=2e-2, atol=2e-2)
    assert all(torch.equal(p, after[name]) for name, p in trained.items())


@pytest.mark.parametrize("kind", ["copy", "cache"])
def test_other_references_go_with_an_adapter_too(tmp_path, kind):
    model = tiny.model(tie_word_embeddings=False)
    batch = collate(ROWS[:2], CHAT.pad_id)
    before = made("copy", model).answers(batch)
    wrapped = with_adapter(model, target_modules=["q_proj", "lm_head"])
    found = made(kind, wrapped.get_base_model(), wrapped, tmp_path / "cache").answers(batch)
    assert_same(found, before, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "options", [{"target_modules": ["lm_head", "q_proj"]}, {"modules_to_save": ["lm_head"]}]
)
def test_an_adapted_head_is_the_one_that_the_model_uses(options):
    wrapped = with_adapter(tiny.model(tie_word_embeddings=False), **options)
    base = wrapped.get_base_model()
    states = torch.randn(5, 32)
    weight, _ = forward.head_weights(base)
    torch.testing.assert_close(states @ weight.T, base.lm_head(states), rtol=1e-4, atol=1e-4)
    assert weight.requires_grad
    with wrapped.disable_adapter():
        original, _ = forward.head_weights(base)
        torch.testing.assert_close(states @ original.T, base.lm_head(states))
    if "target_modules" in options:
        assert not torch.equal(original, weight)
        weight.sum().backward()
        assert base.lm_head.lora_A["default"].weight.grad is not None


def test_an_adapter_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="no adapter to switch off"):
        made("adapter", tiny.model())
    with pytest.raises(UsageError, match="reference must be one of auto, adapter, copy, cache"):
        made("twin", tiny.model())


def test_a_bias_that_trains_alone_leaves_the_cached_original_as_it_was(tmp_path):
    model = zoo.model("phi", vocab_size=len(tiny.tokenizer()))
    train_only(model, ["lm_head.bias"])
    copied, cached = (made(kind, model, folder=tmp_path / kind) for kind in ("copy", "cache"))
    with torch.no_grad():
        model.lm_head.bias.add_(1.0)
    batch = collate(ROWS[:1], CHAT.pad_id)
    assert torch.equal(copied.answers(batch).bias, cached.answers(batch).bias)
    assert not torch.equal(cached.answers(batch).bias, model.lm_head.bias)
