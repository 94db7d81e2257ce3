"""Rounding: what a file in that format would give back, and weights that come back."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import tiny
import torch
from gguf import quants

from mollm.audit.rounding import FORMATS, obstacle, rounded

NF4_LEVELS = (
    *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
)


def q8_0(weight):
    blocks = weight.reshape(-1, 32).astype(np.float32)
    scale = np.abs(blocks).max(1, keepdims=True) / 127
    levels = np.round(blocks / scale)
    return (levels * scale.astype(np.float16)).reshape(weight.shape)


def q4_0(weight):
    blocks = weight.reshape(-1, 32).astype(np.float32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    scale = largest / -8
    levels = np.clip(np.trunc(blocks / scale + 8.5), 0, 15) - 8
    return (levels * scale.astype(np.float16)).reshape(weight.shape)


def nf4(weight):
    blocks = weight.reshape(-1, 64).astype(np.float64)
    scale = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs((blocks / scale)[..., None] - np.array(NF4_LEVELS)).argmin(-1)
    return (np.array(NF4_LEVELS)[nearest] * scale).reshape(weight.shape)


@pytest.mark.parametrize(("name", "plain"), [("Q8_0", q8_0), ("Q4_0", q4_0), ("nf4", nf4)])
def test_the_layers_hold_what_the_format_can_tell_apart(name, plain):
    model = tiny.model()
    kept = copy.deepcopy(model.state_dict())
    with rounded(model, name):
        inside = copy.deepcopy(model.state_dict())
    for key, tensor in inside.items():
        if "proj" in key:
            wanted = torch.from_numpy(plain(kept[key].numpy())).float()
            close = (tensor - wanted).abs() <= 1e-3 * wanted.abs().max()
            assert close.float().mean() > 0.99, key  # a tie may go either way
            assert not tensor.equal(kept[key])
        else:
            assert tensor.equal(kept[key]), key
    assert all(tensor.equal(kept[key]) for key, tensor in model.state_dict().items())


def test_every_format_is_known_to_its_library():
    assert obstacle(tiny.model(), "Q8_0") is None
    assert FORMATS.keys() == {"Q8_0", "Q4_0", "nf4"}
    assert all(hasattr(quants, name) for name in FORMATS if name != "nf4")


def test_rows_that_cannot_be_divided_into_blocks_are_no_matrices_of_gguf():
    model = tiny.model(hidden_size=20, intermediate_size=30, num_key_value_heads=4)
    assert "multiple of 32" in obstacle(model, "Q4_0")
    assert obstacle(model, "nf4") is None


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert obstacle(tiny.model(), "Q8_0") == "it needs the package gguf, which is not installed"
    assert "bitsandbytes" in obstacle(tiny.model(), "nf4")


@pytest.mark.parametrize("name", FORMATS)
def test_other_dtypes_keep_theirs(name):
    model = tiny.model().bfloat16()
    with rounded(model, name):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
