import os

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

from mollm.models import loading  # noqa: E402
from mollm.models.gguf_files import headers_read_once  # noqa: E402


def write(path, name, values):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", name)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ß"])
    writer.add_tensor("output.weight", np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def name_of(reader):
    return reader.fields["general.name"].contents()


def test_a_header_is_read_once_inside_and_as_ever_outside(tmp_path):
    path, plain = tmp_path / "some.gguf", (gguf.GGUFReader, gguf.get_tensor_name_map)
    write(path, "first", [[1.0, 2.0]])
    with headers_read_once():
        reader = gguf.GGUFReader(path)
        with headers_read_once():
            assert gguf.GGUFReader(str(path)) is reader
        assert gguf.GGUFReader(path) is reader
        assert name_of(reader) == name_of(plain[0](path)) == "first"
        (tensor,) = reader.tensors
        assert tensor.data.tolist() == [[1.0, 2.0]]
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == plain


def test_a_file_that_changed_is_read_anew(tmp_path):
    path = tmp_path / "some.gguf"
    write(path, "first", [1.0])
    with headers_read_once():
        assert name_of(gguf.GGUFReader(path)) == "first"
        write(tmp_path / "other.gguf", "the second", [2.0])
        os.replace(tmp_path / "other.gguf", path)
        assert name_of(gguf.GGUFReader(path)) == "the second"


def test_a_table_of_names_is_made_once():
    with headers_read_once():
        first, second = (gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) for _ in range(2))
    assert first is second
    assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is not first


@pytest.mark.model
def test_to_load_a_model_takes_one_reading_of_its_header(monkeypatch):
    made, plain = [], gguf.GGUFReader.__init__
    monkeypatch.setattr(
        gguf.GGUFReader, "__init__", lambda self, path: made.append(path) or plain(self, path)
    )
    loading.load(loading.find_model(None), torch.device("cpu"))
    assert len(made) == 1


def test_an_error_leaves_no_trace(tmp_path):
    plain = gguf.GGUFReader
    with pytest.raises(FileNotFoundError), headers_read_once():
        gguf.GGUFReader(tmp_path / "none.gguf")
    assert gguf.GGUFReader is plain
