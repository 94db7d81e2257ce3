import os
import random

import numpy as np
import pytest
import tiny
import torch

from mollm.errors import UsageError
from mollm.training import checkpoint, serialization


def test_a_tree_comes_back_as_it_was(tmp_path):
    tree = {
        "none": None,
        "numbers": [True, 3, 1e-5, float("inf"), "text"],
        "pair": (1, (2.5, "x")),
        "by number": {0: torch.arange(3, dtype=torch.bfloat16), 7: torch.tensor(2.0)},
        "dtype": torch.bfloat16,
        "array": np.arange(4, dtype=np.uint32),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
    }
    serialization.save_tree(tree, tmp_path, "tree")
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    back = serialization.load_tree(tmp_path, "tree")
    assert list(back) == list(tree)
    assert back["by number"][0].dtype == torch.bfloat16
    assert back["array"].dtype == np.uint32
    for key in ("none", "numbers", "pair", "dtype"):
        assert back[key] == tree[key]
    for key in (0, 7):
        assert torch.equal(back["by number"][key], tree["by number"][key])
    assert np.array_equal(back["array"], tree["array"])
    assert torch.equal(back["transposed"], tree["transposed"])


def test_what_no_json_holds_is_refused(tmp_path):
    with pytest.raises(TypeError, match="must hold tensors and plain values"):
        serialization.save_tree({"code": print}, tmp_path, "tree")


def test_keys_that_json_would_change_are_refused(tmp_path):
    with pytest.raises(TypeError, match="keys must be texts or whole numbers"):
        serialization.save_tree({(1, 2): 3.0}, tmp_path, "tree")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tree.json", None),
        ("tree.json", b'{"dict": [["a", '),
        ("tree.json", b'{"tensor": "7"}'),
        ("tree.json", b'{"dtype": "load"}'),
        ("tree.json", b'{"dtype": "no such"}'),
        ("tree.safetensors", None),
        ("tree.safetensors", b""),
    ],
)
def test_a_damaged_tree_is_told_in_one_sentence(tmp_path, name, content):
    serialization.save_tree({"a": torch.arange(3)}, tmp_path, "tree")
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match="must be a whole checkpoint, but it is damaged: "):
        serialization.load_tree(tmp_path, "tree")


@pytest.mark.parametrize("name", ["tree.json", "tree.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path, name):
    serialization.save_tree({"a": torch.arange(3)}, tmp_path, "tree")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UsageError, match=r"damaged: .* must be a file, but it is a pipe"):
        serialization.load_tree(tmp_path, "tree")


def test_damaged_weights_are_told_in_one_sentence(tmp_path):
    model = tiny.model()
    checkpoint.write_weights(model, None, checkpoint.whole_weights(model, None), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match="must be a whole checkpoint, but it is damaged: "):
        checkpoint.load_weights(model, None, tmp_path)


def test_random_numbers_go_on_where_they_stood(tmp_path):
    def drawn():
        return random.random(), np.random.rand(), torch.rand(3).tolist()  # noqa: NPY002

    serialization.save_tree(checkpoint.random_state(), tmp_path, "random")
    first = drawn()
    assert drawn() != first
    checkpoint.set_random_state(serialization.load_tree(tmp_path, "random"))
    assert drawn() == first


def test_weights_come_back_and_transformers_reads_them(tmp_path):
    from transformers import AutoModelForCausalLM

    model, other = tiny.model(seed=1), tiny.model(seed=2)
    checkpoint.write_weights(model, None, checkpoint.whole_weights(model, None), tmp_path)
    checkpoint.load_weights(other, None, tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
        assert torch.equal(value, read.state_dict()[name])
    with pytest.raises(UsageError, match="must be a checkpoint of this model"):
        checkpoint.load_weights(tiny.model(hidden_size=16), None, tmp_path)


def test_a_fingerprint_tells_models_apart_and_ignores_adapters():
    peft = pytest.importorskip("peft")
    model = tiny.model(seed=1)
    before = checkpoint.fingerprint(model)
    assert before == checkpoint.fingerprint(tiny.model(seed=1))
    assert before != checkpoint.fingerprint(tiny.model(seed=2))
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert checkpoint.fingerprint(model) == before


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    about = {"version": "1", "model": "a", "forget data": "b"}
    with pytest.raises(UsageError, match="must be a checkpoint of mollm"):
        checkpoint.check(tmp_path, about)
    for other in ("{", "[1]", "\udcff"):
        (tmp_path / "mollm.json").write_text(other, errors="surrogateescape")
        with pytest.raises(UsageError, match="must be a checkpoint of mollm"):
            checkpoint.check(tmp_path, about)
    checkpoint.describe(tmp_path, about)
    checkpoint.check(tmp_path, about | {"version": "2"})
    with pytest.raises(UsageError, match=r"cannot resume from .*: forget data was b and is now c"):
        checkpoint.check(tmp_path, about | {"forget data": "c"})
    (tmp_path / "mollm.json").write_text('{"format": 99, "version": "3"}')
    with pytest.raises(UsageError, match=r"of format 3, but it is of format 99: .*\(3\)"):
        checkpoint.check(tmp_path, about)


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    for step in (2, 4, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-tmp").mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    checkpoint.keep_last(tmp_path, 2, str(tmp_path / "checkpoint-2"))
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "checkpoint-2",
        "checkpoint-10",
        "checkpoint-12",
    ]
    checkpoint.keep_last(tmp_path, None, None)
    assert len(checkpoint.checkpoints(tmp_path)) == 3
