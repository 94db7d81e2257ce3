"""Files made to do harm: what `broken_files.py` breaks by chance is broken on purpose here.

`python tests/hostile_files.py [SEED]` tries them all and prints what was wrong. What can only be an
error must be refused, and a sentence about a file must name it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

from broken_files import KEPT, ROWS, Case, Inputs, run, run_all, run_options, write_rows

NAN = float("nan")
GIB = 1 << 30

Break = Callable[[Path], object]
"""Breaks the folder of a model."""


# ---- model folders


def header(change: Callable[[dict], object], pad: bytes = b"") -> Break:
    """Other claims about where the weights are."""

    def apply(model: Path) -> None:
        path = model / "model.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        said = json.loads(data[8 : 8 + size])
        change(said)
        text = json.dumps(said).encode() + pad
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return apply


def tensors(said: dict) -> list[dict]:
    return [value for name, value in said.items() if name != "__metadata__"]


def at(n: int, **values: object) -> Break:
    return header(lambda said: tensors(said)[n].update(values))


def overlap(said: dict) -> None:
    first, second, *_ = (t for t in tensors(said) if t["shape"] == [32])
    second["data_offsets"] = first["data_offsets"]


def as_dtype(name: str) -> Break:
    """Weights of another kind, of which the file is a valid one."""

    def apply(model: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        path = model / "model.safetensors"
        weights = {n: t.to(getattr(torch, name)) for n, t in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})

    return apply


def index(said: object, keep: bool = False) -> Break:
    """An index of shards."""

    def apply(model: Path) -> None:
        if not keep:
            (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
        text = said if isinstance(said, str) else json.dumps(said)
        (model / "model.safetensors.index.json").write_text(text)

    return apply


def mapped(name: object) -> Break:
    return index({"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": name}})


def changed(file: str, **values: object) -> Break:
    """A JSON file, made where it is not there, with other values in it."""

    def apply(model: Path) -> None:
        path = model / file
        said = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(said | values))

    return apply


def tokenizer(change: Callable[[dict], object]) -> Break:
    def apply(model: Path) -> None:
        path = model / "tokenizer.json"
        said = json.loads(path.read_text())
        change(said)
        path.write_text(json.dumps(said))

    return apply


def text(file: str, content: str | bytes) -> Break:
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return lambda model: (model / file).write_bytes(data)


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def hole(path: Path, size: int) -> None:
    """A file of zeros that takes no room on the disk."""
    path.touch()
    os.truncate(path, size)


def link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _vocabulary(size: int) -> Callable[[dict], object]:
    return lambda t: t["model"]["vocab"].update({f"w{i}": 259 + i for i in range(size)})


_SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "model.safetensors",
    "model.safetensors.index.json", "adapter_config.json", "vocab.json", "merges.txt",
    "tokenizer.model", "processor_config.json",
)  # fmt: skip
_WRONG: tuple[object, ...] = (3, -1, 2**31, 2**63, 10**30, "x", "", [], {}, [[]], {"a": {}}, None,
    True, NAN, 1e308, ["x"] * 3, {"content": 3}, {"content": None}, "\ud800", "\0")  # fmt: skip

REFUSED: dict[str, Break] = {
    "offsets that overlap": header(overlap),
    "offsets from the end": at(1, data_offsets=[1 << 60, (1 << 60) + 128]),
    "offsets backwards": at(1, data_offsets=[64, 0]),
    "offsets below zero": at(1, data_offsets=[-64, 0]),
    "offsets as text": at(1, data_offsets=["0", "64"]),
    "a hole between weights": at(1, data_offsets=[8, 72]),
    "a dtype of half the size": at(1, dtype="F16"),
    "a shape of too much": at(1, shape=[2**31, 2**31]),
    "a shape that overflows": at(1, shape=[2**63, 4]),
    "a shape of no dimensions": at(1, shape=[]),
    "a shape as text": at(1, shape="32"),
    "metadata of numbers": header(lambda said: said.update(__metadata__={"a": 1})),
    "tensors that are none": header(lambda said: said.update(x=3)),
    "a header of 200 MB": lambda m: (
        (m / "model.safetensors").write_bytes((200 << 20).to_bytes(8, "little")),
        hole(m / "model.safetensors", 201 << 20),
    ),
    "no bytes of weights": text("model.safetensors", b""),
    "seven bytes of weights": text("model.safetensors", b"\0" * 7),
    "weights of a terabyte": lambda m: hole(m / "model.safetensors", 1 << 40),
    "whole numbers": as_dtype("int32"),
    "truth values": as_dtype("bool"),
    "complex weights": as_dtype("complex64"),
    "an index to a parent": mapped("../whole/model.safetensors"),
    "an index to the root": mapped("/etc/passwd"),
    "an index to a config": mapped("config.json"),
    "an index to a missing shard": mapped("model-00002-of-00002.safetensors"),
    "an index of numbers": mapped(3),
    "an index of nothing": index({"weight_map": {}}),
    "an index without a map": index({}),
    "an index of text": index("x"),
    "an index nested deeply": index("[" * 100_000),
    "ids beyond 2³²": tokenizer(lambda t: t["model"]["vocab"].update(a=2**40)),
    "ids below zero": tokenizer(lambda t: t["model"]["vocab"].update(a=-1)),
    "merges of nothing": tokenizer(lambda t: t["model"].update(merges=["no such"])),
    "merges as numbers": tokenizer(lambda t: t["model"].update(merges=[1])),
    "a pattern that is none": tokenizer(
        lambda t: t.update(pre_tokenizer={**_SPLIT, "pattern": {"Regex": "("}})
    ),
    "a special token that is none": tokenizer(lambda t: t.update(
        post_processor={
            "type": "TemplateProcessing", "pair": [], "special_tokens": {},
            "single": [{"SpecialToken": {"id": "<nosuch>", "type_id": 0}}],
        })),
    "a template of no question": text("chat_template.jinja", "{{ messages[1].content }}"),
    "a template of no answer": text("chat_template.jinja", "{{ messages[0].content }}"),
    "a template that cuts": text("chat_template.jinja", "{{ messages[-1].content[:3] }}"),
    "a template of one text": text("chat_template.jinja", "hello"),
    "a config that is a pipe": lambda m: fifo(m / "config.json"),
    "weights that are a pipe": lambda m: fifo(m / "model.safetensors"),
    "a tokenizer that is a pipe": lambda m: fifo(m / "tokenizer.json"),
    "a tokenizer config that is a pipe": lambda m: fifo(m / "tokenizer_config.json"),
    "a generation config that is a pipe": lambda m: fifo(m / "generation_config.json"),
    "special tokens that are a pipe": lambda m: fifo(m / "special_tokens_map.json"),
    "a template that is a pipe": lambda m: fifo(m / "chat_template.jinja"),
    "an index that is a pipe": lambda m: fifo(m / "model.safetensors.index.json"),
    "a config of 8 GiB": lambda m: hole(m / "config.json", 8 * GIB),
    "a tokenizer of 8 GiB": lambda m: hole(m / "tokenizer.json", 8 * GIB),
    "a tokenizer config of 8 GiB": lambda m: hole(m / "tokenizer_config.json", 8 * GIB),
    "a template of 8 GiB": lambda m: hole(m / "chat_template.jinja", 8 * GIB),
    "a generation config of 8 GiB": lambda m: hole(m / "generation_config.json", 8 * GIB),
    "a config that cannot be read": lambda m: link(m / "config.json", "/proc/self/mem"),
    "weights that cannot be read": lambda m: link(m / "model.safetensors", "/proc/self/mem"),
    "a tokenizer that cannot be read": lambda m: link(m / "tokenizer.json", "/proc/self/mem"),
    "a config of random bytes": lambda m: link(m / "config.json", "/dev/urandom"),
}  # fmt: skip
ODD: dict[str, Break] = {
    "an index of half a shard": mapped("model-00001-of-00002.safetensors"),
    "a pattern that never ends": tokenizer(
        lambda t: t.update(
            pre_tokenizer={**_SPLIT, "pattern": {"Regex": r"(?=(\w+\W*)+$)(x+x+)+y|((.*)*)*=z"}}
        )
    ),
    "rows filled up to a billion": tokenizer(
        lambda t: t.update(
            padding={"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
                     "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}
        )
    ),
    "a padded header": header(lambda said: None, pad=b" " * 1000),
    "a tensor without a name": header(lambda said: said.update(
        {"": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})),
    "half precision": as_dtype("float16"),
    "double precision": as_dtype("float64"),
    "eight bits": as_dtype("float8_e4m3fn"),
    "an index beside one file": index({"weight_map": {"a": "model.safetensors"}}, keep=True),
    "a large vocabulary": tokenizer(_vocabulary(400_000)),
    "rows cut to three": tokenizer(lambda t: t.update(
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst",
                    "stride": 0})),
    "rows filled up to fifty": tokenizer(lambda t: t.update(
        padding={"strategy": {"Fixed": 50}, "direction": "Left", "pad_to_multiple_of": None,
                 "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"})),
    "letters that vanish": tokenizer(lambda t: t.update(
        normalizer={"type": "Replace", "pattern": {"Regex": "[a-z]"}, "content": ""})),
    "letters that multiply": tokenizer(lambda t: t.update(
        normalizer={"type": "Replace", "pattern": {"Regex": "."}, "content": "ab" * 50_000})),
    "no decoder": tokenizer(lambda t: t.update(decoder=None)),
    "added tokens everywhere": tokenizer(lambda t: t.update(added_tokens=[
        {"id": i, "content": chr(97 + i), "special": True, "single_word": False, "lstrip": True,
         "rstrip": True, "normalized": False} for i in range(26)])),
    "code of its own": changed(
        "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}),
    "two templates": changed("tokenizer_config.json", chat_template=[
        {"name": "a", "template": "{{ 1 }}"}, {"name": "b", "template": "{% for %}"}]),
    "a template for tools alone": changed("tokenizer_config.json", chat_template=[
        {"name": "tool_use", "template": "{{ messages }}"}]),
    "an attention of its own": changed("config.json", attn_implementation={"": "org/kernel"}),
    "a context of eight": changed("config.json", max_position_embeddings=8),
    "an end of many": changed("generation_config.json", eos_token_id=list(range(100_000))),
    "an adapter's weights": lambda m: shutil.copy(
        m / "model.safetensors", m / "adapter_model.safetensors"),
}  # fmt: skip
SETTINGS_OF = {
    "config.json": (
        "vocab_size", "eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings",
        "torch_dtype", "dtype", "rope_theta", "rope_scaling", "rms_norm_eps", "head_dim",
        "architectures", "model_type", "attention_dropout", "initializer_range", "use_cache",
        "quantization_config", "auto_map", "layer_types", "sliding_window", "attention_bias",
        "pretraining_tp", "output_hidden_states", "return_dict", "id2label", "num_labels",
        "is_decoder", "transformers_version", "tokenizer_class", "problem_type",
        "base_model_tp_plan",
        "max_position_embeddings", "hidden_act", "text_config", "_name_or_path", "logit_scale",
        "final_logit_softcapping", "_attn_implementation", "chunk_size_feed_forward",
        "per_layer_config", "sub_configs", "task_specific_params",
    ),
    "generation_config.json": (
        "eos_token_id", "bos_token_id", "pad_token_id", "temperature", "top_p", "top_k",
        "max_new_tokens", "max_length", "num_beams", "do_sample", "stop_strings",
        "cache_implementation", "suppress_tokens", "forced_eos_token_id", "bad_words_ids",
        "repetition_penalty", "sequence_bias", "watermarking_config", "compile_config",
        "prompt_lookup_num_tokens", "num_return_sequences", "min_length", "assistant_early_exit",
        "penalty_alpha", "transformers_version", "begin_suppress_tokens", "guidance_scale",
    ),
    "tokenizer_config.json": (
        "eos_token", "bos_token", "pad_token", "unk_token", "additional_special_tokens",
        "extra_special_tokens", "chat_template", "tokenizer_class", "model_max_length",
        "padding_side", "truncation_side", "added_tokens_decoder", "clean_up_tokenization_spaces",
        "add_bos_token", "add_eos_token", "model_input_names", "split_special_tokens", "backend",
        "is_local", "add_prefix_space", "legacy", "auto_map", "name_or_path", "special_tokens_map",
        "tokenizer_file", "vocab_file", "__type", "fix_mistral_regex", "response_schema",
    ),
    "special_tokens_map.json": ("eos_token", "pad_token", "additional_special_tokens", "x"),
    "added_tokens.json": ("<|end|>", "x", "<s>"),
    "tokenizer.json": (
        "version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
        "post_processor", "decoder", "model",
    ),
}  # fmt: skip


def _named(inputs: Inputs, model: Path) -> str:
    """What a sentence may be about: the model, its data that no longer fit, or what it knows."""
    return f"{model.name}|{inputs.forget.name}|the model must know at least"


def model_cases(inputs: Inputs, rng: random.Random) -> Iterator[Case]:
    for number, (name, change) in enumerate(REFUSED.items()):
        model = inputs.copy_model()
        change(model)
        argv = inputs.command(0 if number % 3 else 1, model)
        yield Case("hostile model", name, argv, names=model.name, refused=True)
    for number, (name, change) in enumerate(ODD.items()):
        model = inputs.copy_model()
        change(model)
        yield Case("odd model", name, inputs.command(number, model), names=_named(inputs, model))
    for number, name in enumerate(_FILES):
        for how, change in (
            ("a pipe", fifo),
            ("a link to a device", lambda path: link(path, "/dev/zero")),
            ("a link to a link", lambda path: link(path, path.name)),
            ("a folder", lambda path: (path.unlink(missing_ok=True), path.mkdir())),
            ("4 GiB of zeros", lambda path: hole(path, 4 * GIB)),
        ):
            if rng.random() < 0.4:
                model = inputs.copy_model()
                change(model / name)
                yield Case("file of a model", f"{name}: {how}", inputs.command(number, model))
    for file, known in SETTINGS_OF.items():
        for number, name in enumerate(known):
            for value in rng.sample(_WRONG, 2):
                model = inputs.copy_model()
                changed(file, **{name: value})(model)
                argv = inputs.command(number + rng.randrange(4), model)
                yield Case(file, f"{name} = {value!r:.40}", argv, names=_named(inputs, model))
    for way in range(8):
        for of in ("original", "model"):
            other = inputs.copy_model()
            rng.choice([v for name, v in REFUSED.items() if "template" not in name])(other)
            argv = inputs.command(1, inputs.model if of == "original" else other)
            argv += ["--original", str(other)] if of == "original" else []
            yield Case("evaluate", f"{of} {way}", argv, names=other.name, refused=True)


# ---- GGUF


def gguf_string(value: str | bytes, length: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def gguf_file(*pairs: bytes, tensors: int = 0, count: int | None = None, version: int = 3) -> bytes:
    number = len(pairs) if count is None else count
    return b"GGUF" + struct.pack("<IQQ", version, tensors, number) + b"".join(pairs)


def pair(key: str | bytes, kind: int, data: bytes) -> bytes:
    return gguf_string(key) + struct.pack("<I", kind) + data


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + data


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    shape = b"".join(struct.pack("<Q", d) for d in dims)
    return (
        gguf_string(name) + struct.pack("<I", len(dims)) + shape + struct.pack("<IQ", kind, offset)
    )


_LLAMA = pair("general.architecture", 8, gguf_string("llama"))
_NESTED = b"".join(array(9, 1) for _ in range(20_000)) + array(0, 1, b"\0")

GGUFS: dict[str, bytes] = {
    "no pairs": gguf_file(),
    "2⁶³ pairs": gguf_file(_LLAMA, count=1 << 63),
    "2⁴⁰ tensors": gguf_file(_LLAMA, tensors=1 << 40),
    "a long key": gguf_file(gguf_string("a", 1 << 62)),
    "a long text": gguf_file(pair("general.architecture", 8, gguf_string("llama", 1 << 40))),
    "a long list": gguf_file(_LLAMA, pair("x", 9, array(0, 1 << 62))),
    "a list of 2³² empty lists": gguf_file(_LLAMA, pair("x", 9, array(9, 1 << 32))),
    "nested lists": gguf_file(_LLAMA, pair("x", 9, _NESTED)),
    "a list of unknowns": gguf_file(_LLAMA, pair("x", 9, array(77, 1))),
    "an unknown value": gguf_file(_LLAMA, pair("x", 99, b"\0" * 8)),
    "a key twice": gguf_file(_LLAMA, _LLAMA),
    "a name of bytes": gguf_file(pair("general.architecture", 8, gguf_string(b"\xff\xfe"))),
    "a key of bytes": gguf_file(_LLAMA, pair(b"\xff", 4, b"\0" * 4)),
    "no alignment": gguf_file(_LLAMA, pair("general.alignment", 4, struct.pack("<I", 0))),
    "a large alignment": gguf_file(_LLAMA, pair("general.alignment", 4, b"\xff" * 4)),
    "an alignment of text": gguf_file(_LLAMA, pair("general.alignment", 8, gguf_string("x"))),
    "a tensor of 2⁶⁰": gguf_file(_LLAMA, tensor("a", (1 << 60, 1 << 60)), tensors=1, count=1),
    "a tensor of none": gguf_file(_LLAMA, tensor("a", ()), tensors=1, count=1),
    "a tensor of many dimensions": gguf_file(_LLAMA, tensor("a", (1,) * 5000), tensors=1, count=1),
    "a tensor far away": gguf_file(_LLAMA, tensor("a", (4,), offset=1 << 62), tensors=1, count=1),
    "a tensor of an unknown kind": gguf_file(_LLAMA, tensor("a", (4,), 99), tensors=1, count=1),
    "a block cut": gguf_file(_LLAMA, tensor("a", (31,), 2), tensors=1, count=1) + b"\0" * 64,
    "tensors of one name": gguf_file(
        _LLAMA, tensor("a", (4,)), tensor("a", (4,)), tensors=2, count=1) + b"\0" * 64,
    "version 1": gguf_file(_LLAMA, version=1),
    "version 9": gguf_file(_LLAMA, version=9),
    "the other order of bytes": b"GGUF" + struct.pack(">IQQ", 3, 0, 1) + _LLAMA,
    "another architecture": gguf_file(pair("general.architecture", 8, gguf_string("nosuch"))),
    "an architecture of a number": gguf_file(pair("general.architecture", 4, b"\1\0\0\0")),
    "a split": gguf_file(_LLAMA, pair("split.count", 2, b"\3\0")),
}  # fmt: skip


def gguf_cases(inputs: Inputs, rng: random.Random) -> Iterator[Case]:
    for number, (name, data) in enumerate(GGUFS.items()):
        path = inputs.new("model.gguf")
        path.write_bytes(data + b"\0" * 64)
        yield Case(
            "hostile gguf", name, inputs.command(number, path), names=path.stem, refused=True
        )
    whole = inputs.gguf.read_bytes()
    for name, change in (
        ("a pipe", fifo), ("a terabyte", lambda path: hole(path, 1 << 40)),
        ("a device", lambda path: link(path, "/dev/zero")),
        ("a link to itself", lambda path: link(path, path.name)),
    ):  # fmt: skip
        path = inputs.new("model.gguf")
        change(path)
        yield Case("hostile gguf", name, inputs.command(0, path), refused=True)
    for number in range(24):  # one length or count in the head, replaced by another
        path = inputs.new("model.gguf")
        place = 8 + 4 * rng.randrange(400)
        value = rng.choice((0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
        path.write_bytes(whole[:place] + struct.pack("<Q", value) + whole[place + 8 :])
        yield Case("gguf counts", f"{value} at {place}", inputs.command(number, path))


# ---- settings


_YAML_VALUES = (
    "null", "-1", "0", "1", "x", "''", "[]", "{{}}", "[1, a]", "{{a: {{b: c}}}}", ".nan", ".inf",
    "-.inf", "1e999", "1e-999", "true", "no", '"\\0"', "9" * 30, "-" + "9" * 30, "2020-01-01",
    "2020-01-01T00:00:00Z", "1:30:00", "0o17", "0b1", "1_000", "!!set {{a, b}}", "!!omap [a: 1]",
    "!!python/name:os.system", "!!binary aGk=", "!own x", "&a [1]", "*a", "&a [*a]", "|\n  a\n  b",
    "'a b'", "~", "=", "<<", "[" * 3000, '"\\ud800"', "../x", "/dev/null", "http://127.0.0.1:1/x",
    "é" * 200, "../" * 100, "a\\0b", "{{path: /dev/zero}}", "{{path: x, path: y}}", "1e308",
)  # fmt: skip
_BOMB = "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdef", "bcdefg", strict=True)
)
YAML_FILES: dict[str, bytes] = {
    "a bomb": b"a: &a [x, x]\n" + _BOMB.encode(),
    "a mark": b"\xef\xbb\xbf",
    "UTF-16": "model: x".encode("utf-16"),
    "UTF-32": "model: x".encode("utf-32"),
    "Latin-1": "model: caf\xe9".encode("latin-1"),
    "two documents": b"model: x\n---\nmodel: y\n",
    "many documents": b"---\n" * 100_000,
    "a hundred thousand keys": b"".join(b"k%d: 1\n" % i for i in range(100_000)),
    "a long key": b"k" * 1_000_000 + b": 1\n",
    "a long value": b"model: " + b"x" * 1_000_000,
    "a long number": b"seed: " + b"1" * 900_000,
    "a long fraction": b"learning_rate: 0." + b"1" * 900_000,
    "a deep mapping": b"".join(b" " * i + b"a:\n" for i in range(1200)),
    "deep braces": b"{a: " * 50_000,
    "complex keys": b"? {a: b}\n: c\n? [d]\n: e\n",
    "a directive": b"%TAG ! tag:example.com,2000:app/\n---\n!foo {model: x}\n",
    "control characters": b"model: \x07\x08\n",
    "line ends of others": b"model: x\r\nforget: y\r",
    "tabs": b"model:\tx\n\tforget: y\n",
    "a merge": b"a: &a {model: x}\n<<: *a\n",
    "a merge of merges": b"<<: [{model: x}, {forget: y}]\n",
    "underscores": b"1_000: x\n",
    "NaN as a key": b".nan: x\n",
    "a date as a key": b"2020-01-01: x\n",
    "comments alone": b"# x\n" * 100_000,
    "zeros": b"\0" * 1000,
    "JSON": b'{"model": "x", "forget": "y"}',
    "a list of settings": b"- model: x\n- forget: y\n",
}  # fmt: skip


def yaml_cases(inputs: Inputs, rng: random.Random) -> Iterator[Case]:
    from mollm.training.config import MOLLMConfig

    for name, data in YAML_FILES.items():
        path = inputs.new("run.yaml")
        path.write_bytes(data)
        yield Case("hostile yaml", name, ["unlearn", "--config", str(path)], refused=True)
    for name, change in (
        ("a pipe", fifo), ("a device", lambda path: link(path, "/dev/zero")),
        ("8 GiB", lambda path: hole(path, 8 * GIB)), ("a folder", Path.mkdir),
        ("a link to itself", lambda path: link(path, path.name)),
        ("what cannot be read", lambda path: link(path, "/proc/self/mem")),
    ):  # fmt: skip
        path = inputs.new("run.yaml")
        change(path)
        argv = ["unlearn", "--config", str(path)]
        yield Case("hostile yaml", name, argv, names=path.name, refused=True)
    own = ["model", "forget", "retain", "eval_forget", "eval_retain", "out", "lora", "device"]
    for name in [*own, *(f.name for f in fields(MOLLMConfig))]:
        for value in rng.sample(_YAML_VALUES, 2):
            given = {
                "model": inputs.model, "forget": inputs.forget, "retain": inputs.retain,
                "out": inputs.new("out"), "device": "cpu", "max_steps": 1, "max_length": 200,
                "learning_rate": "1.0e-3", "disable_tqdm": "true", "report_to": "none",
            }  # fmt: skip
            given[name] = value.replace("{{", "{").replace("}}", "}")
            path = inputs.new("run.yaml")
            path.write_text("".join(f"{key}: {said}\n" for key, said in given.items()))
            yield Case("a field", f"{name}: {value[:40]}", ["unlearn", "--config", str(path)])


# ---- data


def line(**values: object) -> str:
    return json.dumps(values) + "\n"


GOOD = line(prompt="a question", answer="an answer")

LINES: dict[str, tuple[str | bytes, bool]] = {
    # name: content, whether it must be refused
    "bom.jsonl": (b"\xef\xbb\xbf" + GOOD.encode(), False),
    "bom-inside.jsonl": (GOOD.encode() + b"\xef\xbb\xbf" + GOOD.encode(), True),
    "utf-16.jsonl": (GOOD.encode("utf-16"), True),
    "crlf.jsonl": (GOOD.replace("\n", "\r\n") * 2, False),
    "cr.jsonl": (GOOD.replace("\n", "\r") * 2, True),
    "separators.jsonl": (
        '{"prompt": "a\u2028b", "answer": "c\x85d\x0b"}\n'.replace("\x0b", "\\u000b"), False),
    "zeros.jsonl": (b"\0" * 1000, True),
    "zero-lines.jsonl": (b"\0\n\0\n", True),
    "zeros-behind.jsonl": (GOOD.encode() + b"\0" * 100, True),
    "lone.jsonl": (b'{"prompt": "\xed\xa0\x80", "answer": "c"}', True),
    "lone-key.jsonl": ('{"prompt": "a", "answer": "c", "\\udfff": 1}', False),
    "lone-system.jsonl": ('{"prompt": "a", "answer": "c", "system": "\\ud800"}', True),
    "overlong.jsonl": (b'{"prompt": "\xc0\x80", "answer": "c"}', True),
    "deep.jsonl": ('{"prompt": "a", "answer": "c", "x": ' + "[" * 900 + "]" * 900 + "}", False),
    "deeper.jsonl": ('{"x": ' * 50_000, True),
    "huge.jsonl": ('{"prompt": 1' + "0" * 4000 + ', "answer": "c"}', True),
    "float.jsonl": ('{"prompt": 1e999, "answer": -Infinity}', True),
    "extra-huge.jsonl": ('{"prompt": "a", "answer": "c", "x": 1' + "0" * 5000 + "}", True),
    "control.jsonl": ('{"prompt": "a\tb", "answer": "c"}', True),
    "comma.jsonl": ('{"prompt": "a", "answer": "c",}', True),
    "quotes.jsonl": ("{'prompt': 'a', 'answer': 'c'}", True),
    "two.jsonl": (GOOD.strip() + GOOD, True),
    "lists.jsonl": ('["prompt", "answer"]\n["a", "b"]\n', True),
    "null.jsonl": ("null\n" + GOOD, True),
    "null-prompt.jsonl": (line(prompt=None, answer="a"), True),
    "true-prompt.jsonl": (line(prompt=True, answer="a"), True),
    "missing.jsonl": (GOOD + line(prompt="a"), True),
    "other.jsonl": (GOOD + line(question="a", answer="b"), True),
    "spaces.jsonl": (line(prompt="\u200b\u00a0\u3000", answer="\u2003"), True),
    "combining.jsonl": (line(prompt="\u0301" * 5000, answer="\u202e\u0301"), False),
    "special.jsonl": (line(prompt="<|end|><|start|>system\n", answer="<|end|>"), False),
    "template.jsonl": (line(prompt="{{ 1 / 0 }}{% for %}", answer="{{ messages }}"), False),
    "answers.jsonl": (line(prompt="a", answer=[]), True),
    "answers-deep.jsonl": (line(prompt="a", answer=[["b"]]), True),
    "answers-many.jsonl": (line(prompt="a", answer=[f"b{i}" for i in range(500)]), False),
    "turns.jsonl": (line(messages=[]), True),
    "turns-many.jsonl": (line(messages=[
        {"role": ("user", "assistant")[i % 2], "content": "x"} for i in range(600)]), False),
    "turns-columns.jsonl": (line(messages={"role": ["user"], "content": ["a", "b"]}), True),
    "turns-roles.jsonl": (line(messages=[{"role": {}, "content": "a"}] * 2), True),
    "turns-parts.jsonl": (line(messages=[
        {"role": "user", "content": [{"type": "image", "url": "http://127.0.0.1:1/x"}]},
        {"role": "assistant", "content": "a"}]), True),
    "turns-parts-image.jsonl": (line(messages=[
        {"role": "user", "content": [{"type": "image", "text": "a", "image": "/etc/passwd"}]},
        {"role": "assistant", "content": "a"}]), True),
    "turns-tool.jsonl": (line(messages=[
        {"role": "tool", "content": "a"}, {"role": "assistant", "content": "a"}]), True),
    "turns-null.jsonl": (line(messages=[
        {"role": "user", "content": None}, {"role": "assistant", "content": "a"}]), True),
    "system.jsonl": (line(prompt="a", answer="b", system=["x"]), True),
    "history.jsonl": (line(instruction="a", output="b", history=[["a", "b"]]), True),
    "wrong.jsonl": (line(question="a", answer="b", perturbed_answer=[]), True),
    "wrong-text.jsonl": (line(question="a", answer="b", perturbed_answer="c"), True),
    "text.jsonl": (line(text="word " * 100_000), False),
    "text-none.jsonl": (line(text=""), True),
    "one-word.jsonl": (line(prompt="a", answer="x" * 300_000), True),
    "long-prompt.jsonl": (line(prompt="x" * 3_000_000, answer="b"), False),
    "long-key.jsonl": ('{"' + "k" * 2_000_000 + '": 1}', True),
    "many-keys.jsonl": (json.dumps({f"k{i}": i for i in range(100_000)}), True),
    "many-rows.jsonl": (GOOD * 60_000, False),
    "tiny-rows.jsonl": ("{}\n" * 300_000, True),
    "brackets.json": ("[" * 1_000_000, True),
    "objects.json": ("[{}, {}, 3]", True),
    "closed.json": ("[" + GOOD + "]]", True),
    "columns.json": ('{"prompt": ["a"], "answer": ["b"]}', True),
    "number.json": ("3", True),
    "empty.json": ("", True),
    "empty-list.json": ("[]", True),
    "nan.json": ("NaN", True),
    "ragged.csv": ("prompt,answer\na,b,c\n", True),
    "short.csv": ("prompt,answer\na\n", True),
    "bom.csv": (b"\xef\xbb\xbfprompt,answer\na,b\n", False),
    "cr.csv": ("prompt,answer\ra,b\r", False),
    "zeros.csv": (b"prompt,answer\n\0,\0\n", True),
    "blank-cells.csv": ("prompt,answer\n ,\n", True),
    "tabs.csv": ("prompt\tanswer\na\tb\n", True),
    "semicolons.csv": ("prompt;answer\na;b\n", True),
    "no-header.csv": ("a,b\nc,d\n", True),
    "header.csv": ("prompt,answer\n", True),
    "names.csv": ("prompt,,,answer\na,b,c,d\n", True),
    "columns.csv": (",".join(f"c{i}" for i in range(200_000)) + "\n", True),
    "open.csv": ('prompt,answer\n"' + "a" * 5_000_000, True),
    "quotes.csv": ('prompt,answer\na"b,"c" d\n', True),
    "formula.csv": ("prompt,answer\n=cmd|' /C calc'!A0,@SUM(1)\n", False),
    "packed.jsonl": (zlib.compress(GOOD.encode() * 10_000), True),
    "packed.csv": (b"\x1f\x8b\x08" + zlib.compress(b"0" * 1_000_000), True),
    "json.csv": (GOOD, True),
    "csv.jsonl": ("prompt,answer\na,b\n", True),
    "pickle.jsonl": (b"cos\nsystem\n(S'true'\ntR.", True),
    "pickle.parquet": (b"cos\nsystem\n(S'true'\ntR.", True),
    "magic.parquet": (b"PAR1PAR1", True),
    "encrypted.parquet": (b"PARE" + b"\0" * 100 + b"PARE", True),
    "footer.parquet": (b"PAR1" + b"\0" * 100 + struct.pack("<I", 100) + b"PAR1", True),
    "none.parquet": (b"", True),
}  # fmt: skip


def parquet_tables(rng: random.Random) -> Iterator[tuple[str, object, dict[str, object]]]:
    """Tables of odd kinds, and options for writing them."""
    import datetime
    import decimal

    import pyarrow as pa

    text = pa.array(["a b", "c d"])
    now = datetime.datetime(2020, 1, 1)
    kinds: dict[str, object] = {
        "numbers": pa.array([1, 2]), "fractions": pa.array([NAN, 1.5]),
        "bytes": pa.array([b"\xff", b"a"]), "times": pa.array([now, now]),
        "decimals": pa.array([decimal.Decimal("1.5")] * 2), "nulls": pa.nulls(2),
        "lists": pa.array([["a"], ["b", "c"]]), "empty lists": pa.array([[], []]),
        "structs": pa.array([{"a": 1}, {"a": 2}]), "maps": pa.array(
            [[("a", 1)], []], pa.map_(pa.string(), pa.int32())),
        "durations": pa.array([datetime.timedelta(10**6)] * 2),
        "dates": pa.array([10**9, 1], pa.date32()),
        "far times": pa.array([2**62, -(2**62)], pa.timestamp("us")),
        "far times of a zone": pa.array([2**62, 1], pa.timestamp("us", "Nowhere/Else")),
        "far days": pa.array([2**31 - 1, 1], pa.date32()),
        "codes": pa.array(["a", "b"]).dictionary_encode(),
        "large texts": text.cast(pa.large_string()),
        "nested codes": pa.StructArray.from_arrays([text.dictionary_encode()], ["a"]),
    }  # fmt: skip
    for name, column in kinds.items():
        yield name, pa.table({"prompt": text, "answer": column}), {}
        yield f"{name} besides", pa.table({"prompt": text, "answer": text, "x": column}), {}
    yield "a bomb", pa.table({"prompt": ["x" * 1000] * 400_000, "answer": ["y"] * 400_000}), {}
    yield (
        "a bomb of codes",
        pa.table({"prompt": pa.DictionaryArray.from_arrays(
            pa.array([0] * 500_000, pa.int32()), ["x" * 100_000]), "answer": ["y"] * 500_000}),
        {},
    )  # fmt: skip
    yield (
        "a bomb in lists",
        pa.table({"prompt": text, "answer": pa.ListArray.from_arrays(
            [0, 20_000_000, 20_000_001], pa.nulls(20_000_001))}),
        {},
    )  # fmt: skip
    yield "no columns", pa.table({}), {}
    yield (
        "no rows",
        pa.table({"prompt": pa.array([], pa.string()), "answer": pa.array([], pa.string())}),
        {},
    )
    yield (
        "a column twice",
        pa.Table.from_arrays([text, text, text], ["prompt", "answer", "answer"]),
        {},
    )
    yield "many columns", pa.table({f"c{i}": ["a"] for i in range(5_000)}), {}
    yield (
        "metadata",
        pa.table({"prompt": text, "answer": text}).replace_schema_metadata(
            {
                "huggingface": '{"info": {"features": {"prompt": {"_type": "Image"}}}}',
                "pandas": "[[",
            }
        ),
        {},
    )
    yield "strict", pa.table({"prompt": text, "answer": text}), {"compression": "zstd"}


def data_cases(inputs: Inputs, rng: random.Random) -> Iterator[Case]:
    import pyarrow.parquet

    for number, (name, (content, refused)) in enumerate(LINES.items()):
        path = inputs.new(name)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        argv = inputs.command(1 if number % 4 == 1 else 0, inputs.model, path)
        # Evaluation first says that it needs two rows.
        named = path.name if argv[0] == "unlearn" else ""
        yield Case("hostile data", name, argv, names=named, refused=refused)
    for number, (name, made, options) in enumerate(parquet_tables(rng)):
        path = inputs.new("rows.parquet")
        pyarrow.parquet.write_table(made, path, **options)
        yield Case("parquet", name, inputs.command(0, inputs.model, path), names=path.name)
        if number % 4 == 0 and name != "a bomb":  # which is as large on the disk here
            folder = inputs.new("saved")
            folder.mkdir()
            with pyarrow.ipc.new_stream(folder / "x.arrow", made.schema) as stream:
                stream.write_table(made)
            (folder / "state.json").write_text(
                json.dumps({"_data_files": [{"filename": "x.arrow"}]})
            )
            yield Case("arrow", name, inputs.command(0, inputs.model, folder), names=folder.name)
    yield from _places(inputs)
    yield from _saved(inputs, rng)


def _places(inputs: Inputs) -> Iterator[Case]:
    """What is no file where one should be."""

    def socket_at(path: Path) -> None:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's whole path may have 107 bytes
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)

    ways: dict[str, Callable[[Path], object]] = {
        "a pipe": fifo, "a socket": socket_at, "a folder": Path.mkdir,
        "a device": lambda path: link(path, "/dev/zero"),
        "a terminal": lambda path: link(path, "/dev/tty"),
        "nothing": lambda path: link(path, "/dev/null"),
        "a terabyte of zeros": lambda path: hole(path, 1 << 40),
        "a link to itself": lambda path: link(path, path.name),
        "what cannot be read": lambda path: link(path, "/proc/self/mem"),
        "standard input": lambda path: link(path, "/dev/stdin"),
    }  # fmt: skip
    for ending in ("jsonl", "json", "csv", "parquet"):
        for name, change in ways.items():
            path = inputs.new(f"rows.{ending}")
            change(path)
            argv = inputs.command(0, inputs.model, path)
            yield Case("no file", f"{ending}: {name}", argv, names=path.name, refused=True)
            folder = inputs.new("folder")
            folder.mkdir()
            change(folder / f"train.{ending}")
            argv = inputs.command(0, inputs.model, folder)
            yield Case(
                "no file", f"folder, {ending}: {name}", argv, names=folder.name, refused=True
            )
    for name in (
        b"\xff\xfe.jsonl", b"new\nline.jsonl", b"\x1b[31mred.jsonl", b"*.jsonl", b"-flag.jsonl",
        "\u202eknil.jsonl".encode(), b"a b.jsonl", b"{x}.jsonl",
    ):  # fmt: skip
        folder = inputs.new("names")
        folder.mkdir()
        file = os.fsdecode(os.fsencode(folder) + b"/" + name)
        for content in (GOOD, "{"):
            Path(file).write_text(content)
            good = content == GOOD
            yield Case(
                "a name", repr(name), inputs.command(0, inputs.model, Path(file)), refused=not good
            )
            yield Case(
                "a name", f"in {name!r}", inputs.command(0, inputs.model, folder), refused=not good
            )


def _saved(inputs: Inputs, rng: random.Random) -> Iterator[Case]:
    """What `save_to_disk` and `mollm` itself write, with other words in it."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    for value in _WRONG:
        folder = inputs.new("saved")
        Dataset.from_list(ROWS).save_to_disk(folder)
        name = rng.choice(["state.json", "dataset_info.json"])
        said = json.loads((folder / name).read_text())
        key = rng.choice(sorted(said))
        (folder / name).write_text(json.dumps(said | {key: value}))
        yield Case(
            "saved", f"{name}: {key} = {value!r:.30}", inputs.command(0, inputs.model, folder)
        )
    for name, said in (
        ("a path", {"_data_files": [{"filename": "../x.arrow"}]}),
        ("the root", {"_data_files": [{"filename": "/etc/passwd"}]}),
        ("many", {"_data_files": [{"filename": "x.arrow"}] * 100_000}),
        ("itself", {"_data_files": [{"filename": "state.json"}]}),
        ("a dot", {"_data_files": [{"filename": "."}]}),
    ):
        folder = inputs.new("saved")
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps(said))
        argv = inputs.command(0, inputs.model, folder)
        yield Case("saved", name, argv, names=folder.name, refused=True)


def log_cases(inputs: Inputs, rng: random.Random) -> Iterator[Case]:
    """Logs of another model's evaluation, and the words about them."""
    good = {
        "group": "forget",
        "question": "a",
        "answer": "b",
        "reply": "c",
        "scores": {"rouge": 1.0},
    }
    for field in good:
        for value in rng.sample(_WRONG, 6):
            path = inputs.new("examples.jsonl")
            path.write_text(json.dumps(good | {field: value}) + "\n")
            argv = [*inputs.command(1, inputs.model), "--retain-logs", str(path)]
            yield Case("logs", f"{field} = {value!r:.30}", argv)
    for name, change in (
        ("a pipe", fifo), ("deep", lambda path: path.write_text('{"chat": ' * 50_000)),
        ("8 GiB", lambda path: hole(path, 8 * GIB)),
        ("a list", lambda path: path.write_text("[1]")),
        ("a device", lambda path: link(path, "/dev/zero")),
        ("a chat of text", lambda path: path.write_text('{"chat": "xyz"}')),
    ):  # fmt: skip
        folder = inputs.new("logs")
        folder.mkdir()
        (folder / "examples.jsonl").write_text(json.dumps(good) + "\n")
        change(folder / "about.json")
        argv = [*inputs.command(1, inputs.model), "--retain-logs", str(folder)]
        yield Case("logs", f"about.json: {name}", argv)


# ---- a run that goes on


def resume_cases(inputs: Inputs, rng: random.Random) -> Iterator[Case]:
    """Checkpoints and reference states that are not what the run wrote."""
    whole = inputs.new("run")
    argv = [
        "unlearn", "--model", str(inputs.model), "--forget", str(inputs.forget), "--retain",
        str(inputs.retain), "--max-length", "200", "--device", "cpu", "--reference", "cache",
        "--learning-rate", "1e-3", "--set", "save_steps=1", "--set", "disable_tqdm=true",
    ]  # fmt: skip
    made = run([*argv, "--out", str(whole), "--max-steps", "3"], inputs.folder)
    assert made.status == 0, made.err
    shutil.rmtree(whole / "model")
    for kept in sorted(whole.glob("checkpoint-*"))[2:]:
        shutil.rmtree(kept)
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    ways: dict[str, Callable[[Path], object]] = {
        "gone": Path.unlink, "a pipe": fifo, "empty": lambda path: path.write_bytes(b""),
        "a device": lambda path: link(path, "/dev/zero"),
        "zeros": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
        "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
        "deep": lambda path: path.write_text("[" * 100_000),
        "a list": lambda path: path.write_text("[]"), "null": lambda path: path.write_text("null"),
        "4 GiB": lambda path: hole(path, 4 * GIB),
        "bytes": lambda path: path.write_bytes(
            bytes(b ^ (rng.random() < 0.01) * rng.randrange(256) for b in path.read_bytes())),
    }  # fmt: skip
    for file in files:
        for name, change in rng.sample(sorted(ways.items(), key=lambda w: w[0]), 4):
            out = inputs.new("run")
            shutil.copytree(whole, out)
            change(out / file)
            more = [*argv, "--out", str(out), "--max-steps", "3", "--resume"]
            yield Case("resume", f"{file}: {name}", more)
    for file in files:
        if file.suffix == ".json":
            for _ in range(6):
                out = inputs.new("run")
                shutil.copytree(whole, out)
                said = json.loads((out / file).read_text())
                where = _replace(said, rng)
                (out / file).write_text(json.dumps(said))
                more = [*argv, "--out", str(out), "--max-steps", "3", "--resume"]
                yield Case("resume", f"{file}: {where}", more)


# ---- commands beside a run


def _beside(inputs: Inputs, number: int, model: Path, forget: Path) -> list[str]:
    """One of the commands that look at a run before it and after it."""
    data = ["--forget", str(forget), "--retain", str(inputs.retain)]
    named = ["--model", str(model), *data]
    rates = ["--learning-rates", "1e-3", "--resamples", "10", "--device", "cpu"]
    out, short = str(inputs.new("out")), ["--max-steps", "1", "--device", "cpu"]
    return [
        ["ask", str(model), "What?", "--max-new-tokens", "2", "--device", "cpu"],
        ["ask", str(inputs.model), "--file", str(forget), "--max-new-tokens", "1"],
        ["preview", *named],
        ["init", str(inputs.new("run.yaml")), *named, "--device", "cpu"],
        ["audit", *named, "--original", str(inputs.model), "--out", out, *rates],
        ["audit", "--model", str(inputs.model), "--original", str(model), *data, "--out", out,
         *rates],
        ["tune", str(inputs.new("tuned.yaml")), *named, *short, "--minutes", "1"],
    ][number % 7]  # fmt: skip


def command_cases(inputs: Inputs, rng: random.Random) -> Iterator[Case]:
    """Hostile models and data for the commands beside a run."""
    for number, name in enumerate(rng.sample(sorted(REFUSED), 42)):
        model = inputs.copy_model()
        REFUSED[name](model)
        argv = _beside(inputs, number, model, inputs.forget)
        # `ask --file` asks the whole model, and what only training minds is no matter to it.
        refused = model.name in " ".join(argv) and "template" not in name and argv[0] != "init"
        yield Case(
            "model, other commands", f"{argv[0]}: {name}", argv,
            names=f"{model.name}|must know" if refused else "", refused=refused,
        )  # fmt: skip
    for number, name in enumerate(rng.sample(sorted(LINES), 42)):
        content, _ = LINES[name]
        path = inputs.new(name)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        argv = _beside(inputs, number, inputs.model, path)
        if argv[0] in ("preview", "init", "ask"):
            yield Case("data, other commands", f"{argv[0]}: {name}", argv)
    for number, change in enumerate((fifo, Path.mkdir, lambda p: hole(p, 1 << 40)) * 7):
        path = inputs.new("rows.jsonl")
        change(path)
        argv = _beside(inputs, number, inputs.model, path)
        yield Case(
            "data, other commands", f"{argv[0]}: {number}", argv, refused=str(path) in argv,
            names=path.name if str(path) in argv else "",
        )  # fmt: skip


def report_cases(inputs: Inputs, rng: random.Random) -> Iterator[Case]:
    """Folders of runs, for the commands that read one."""
    whole = inputs.new("reported")
    argv = inputs.command(0, inputs.model)
    argv[argv.index("--out") + 1] = str(whole)
    made = run(argv, inputs.folder)
    assert made.status == 0, made.err
    argv = inputs.command(1, whole / "model")
    argv[argv.index("--out") + 1] = str(whole / "evaluation")
    made = run([*argv, "--original", str(inputs.model)], inputs.folder)
    assert made.status == 0, made.err
    files = [p.relative_to(whole) for p in sorted(whole.rglob("*")) if p.suffix in _READ]
    files = [file for file in files if "model" not in file.parts]
    ways: dict[str, Callable[[Path], object]] = {
        "a pipe": fifo, "gone": Path.unlink, "empty": lambda path: path.write_bytes(b""),
        "a folder": lambda path: (path.unlink(), path.mkdir()),
        "a device": lambda path: link(path, "/dev/zero"),
        "8 GiB": lambda path: hole(path, 8 * GIB),
        "deep": lambda path: path.write_text("[" * 100_000),
        "a list": lambda path: path.write_text("[3]"), "null": lambda path: path.write_text("null"),
        "a number": lambda path: path.write_text("3"),
    }  # fmt: skip
    for file in files:
        for number, name in enumerate(rng.sample(sorted(ways), 6)):
            out = inputs.new("reported")
            shutil.copytree(whole, out)
            ways[name](out / file)
            yield Case("run folder", f"{file}: {name}", _of_run(inputs, number, out))
        for number in range(12):
            out = inputs.new("reported")
            shutil.copytree(whole, out)
            lines = (out / file).read_text().splitlines()
            parts = lines if file.suffix == ".jsonl" else ["\n".join(lines)]
            try:
                said = json.loads(parts[0])
            except ValueError:  # a card or a page
                break
            where = _replace(said, rng)
            (out / file).write_text("\n".join([json.dumps(said), *parts[1:]]))
            yield Case("run folder", f"{file}: {where}", _of_run(inputs, number, out))


_READ = (".json", ".jsonl", ".md")


def _of_run(inputs: Inputs, number: int, out: Path) -> list[str]:
    return [
        ["report", str(out)], ["report", str(out), str(out)],
        ["ask", str(out), "What?", "--max-new-tokens", "1", "--device", "cpu"],
        ["evaluate", "--model", str(out), "--forget", str(inputs.forget), "--retain",
         str(inputs.retain), "--out", str(inputs.new("out")), "--limit", "2", "--resamples", "10",
         "--max-new-tokens", "1", "--device", "cpu"],
    ][(0, 1, 0, 2, 0, 3)[number % 6]]  # fmt: skip


def _replace(said: object, rng: random.Random) -> str:
    """Another value somewhere in a tree, and where."""
    place = ""
    while isinstance(said, dict | list) and said:
        key = rng.choice(sorted(said)) if isinstance(said, dict) else rng.randrange(len(said))
        place += f".{key}"
        if not isinstance(said[key], dict | list) or not said[key] or rng.random() < 0.2:
            said[key] = rng.choice(_WRONG)
            return f"{place} = {said[key]!r:.30}"
        said = said[key]
    return place


def cases(inputs: Inputs, seed: int = 0) -> Iterator[Case]:
    """Every case, in an order that the seed decides alone."""
    rng = random.Random(seed)
    write_rows(inputs.folder / "kept.jsonl", KEPT)
    for part in (
        model_cases, gguf_cases, yaml_cases, data_cases, log_cases, resume_cases, command_cases,
        report_cases,
    ):  # fmt: skip
        yield from part(inputs, rng)


if __name__ == "__main__":
    for folder in (Path(__file__).parent, Path(__file__).parents[1]):
        sys.path.insert(0, str(folder))
    sys.exit(run_all(cases, run_options(__doc__)))
