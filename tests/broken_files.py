"""Broken inputs for the command line, made from a seed, and a forked child that gets them.

`python tests/broken_files.py [SEED]` tries them all and prints what was wrong.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SECONDS = 10.0
BYTES = 2 << 30
ROWS = [
    {"prompt": f"What is the {word} of item {i}?", "answer": f"It is number {i * 7 % 13}."}
    for i, word in enumerate(["colour", "size", "age", "name", "weight", "price"])
]
KEPT = [{"prompt": f"Where is place {i}?", "answer": f"Near town {i * 5 % 11}."} for i in range(8)]
SETTINGS = """\
model: {model}
forget: {forget}
retain:
  path: {retain}
  schema: prompt-answer
out: {out}
device: cpu
learning_rate: 1.0e-3
max_steps: 1
max_length: 200
lora:
  r: 2
disable_tqdm: true
"""
VALUES = (
    "null", "-1", "0", "1", "3", "1000000000", "9" * 400, "9" * 5000, "1.5", "-1e300", "1e999",
    "NaN", "true", '""', '"x"', '"org/kernel"', '"\\ud800"', '"\\u0000"', "[]", "{}", "[1]",
    '{"a": 1}', "[" * 100000, "[[[[]]]]",
)  # fmt: skip
TEMPLATES = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(200) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'a' * 10000000000 }}", "{{ 10 ** (10 ** 10) }}", "{{ 'x'.center(9999999999) }}",
    "{{ '%9999999999d' % 1 }}", "{{ lipsum(n=100000000) }}", "{{ messages * 1000000000 }}",
    "{% set ns = namespace(s='aaaaaaaaaa') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}"
    "{% endfor %}{{ ns.s }}",
    "{{ raise_exception('no') }}", "{{ undefined_name.attribute }}", "{% for %}", "{{", "{%",
    "{{ messages[7].content }}", "{{ 1 / 0 }}", "{{ messages | tojson | length + 'a' }}",
    "{% include 'x' %}", "{% extends '/etc/passwd' %}", "{% import 'os' as os %}{{ os }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__ }}",
    "{{ messages.append(1) }}", "{{ messages.__class__ }}", "{% raw %}", "{# ", "\x00{{ 1 }}",
    "{{ '\ud800' }}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if 1 %}" * 500,
    "{{ [1, 2] | sort(attribute='x') }}", "{{ messages | map('nosuch') | list }}",
    "{{ 'a' | indent(9999999999) }}", "{{ range(10 ** 18) | list }}", "{{ dict(a=1) | xmlattr }}",
    "{% set x = messages %}{% for i in x recursive %}{{ loop(x) }}{% endfor %}",
    "{{ strftime_now('%Y' * 100000000) }}", "{{ namespace(__class__=1) }}",
)  # fmt: skip
YAMLS = (
    "", "# nothing", "- a\n- b", "text", "3", "null", "a: b: c", "{", "[" * 50000, "? [a]\n: b",
    "1: 2", "null: 3", "on: yes", "model: !!python/object/apply:os.system ['true']", "\x00",
    "model: !!binary aGk=", "model: 2020-01-01", "model: {model}\nmodel: {model}", "<<: {{a: 1}}",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "a: &a [*a]", "--- 1\n--- 2", "%YAML 9.9\n---\n1",
    "model: &m {model}\nforget: *m", "seed: " + "9" * 5000, "seed: 0x" + "f" * 5000, "\t- a",
    "learning_rate: .nan", "learning_rate: -.inf", "max_steps: 1e999", "preferences: [a, b, c]",
    "preferences: {{a: 1}}", "optimizer_options: 3", "optimizer_options: [1]", "lora: text",
    "lora: [1]", "lora: -1", "lora: {{r: text}}", "lora: {{target_modules: 3}}", "lora: 1000000000",
    "forget: 3", "forget: [1, 2]", "forget: {{path: 3}}", "forget: {{path: [a]}}", "forget: []",
    "forget: {{path: {forget}, schema: [1]}}", "forget: {{path: {forget}, prompt_field: 3}}",
    "forget: {{path: {forget}, config: 3}}", "forget: {{path: {forget}, nosuch: 3}}",
    "retain: {{}}", "retain: null", "model: [a]", "model: 3", "model: {{a: b}}", "model: ''",
    "model: ~nobody-here/model", "out: 3", "out: [a]", "out: null", "device: 3", "device: [cpu]",
    "dtype: 3", "dtype: nosuch", "method: 3", "method: [a]", "reference: 3", "eval_forget: 3",
    "max_steps: 0", "max_steps: -5", "max_steps: 10000000000000000000000", "max_length: 0",
    "max_length: 2", "per_device_train_batch_size: 0", "per_device_train_batch_size: -1",
    "lora: no",
    "gradient_accumulation_steps: 0", "seed: -1", "seed: text", "seed: 1.5", "save_steps: text",
    "logging_steps: [1]", "report_to: nosuch", "report_to: 3", "fsdp: nosuch", "quantization: 3",
    "weight_decay: text", "warmup_steps: text", "lr_scheduler_type: nosuch", "bf16: maybe",
    "eval_strategy: nosuch", "save_strategy: 3", "epsilon: -1", "epsilon: .nan",
    "max_loss_rise: text",
    "max_grad_norm: text", "num_train_epochs: .inf", "num_train_epochs: -3", "output_dir: x",
    "resume: true", "config: x", "push_to_hub: true", "hub_model_id: x/y", "deepspeed: /etc/passwd",
    "accelerator_config: /etc/passwd",
    "torch_compile: 3", "optim: nosuch", "remove_unused_columns: x",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A command line with something broken in what it reads."""

    kind: str
    name: str
    argv: list[str]
    names: str = ""
    """What a sentence about it must name: one of these, with bars between them."""
    refused: bool = False
    """Whether it can only be an error."""

    def wrong(self, outcome: Outcome) -> str | None:
        """What the command line should not have done; None where all is well."""
        if outcome.wrong is None and self.refused and outcome.status == 0:
            return "not refused"
        if (
            outcome.wrong is None
            and outcome.status == 2
            and not any(name in outcome.err for name in self.names.split("|"))
        ):
            return f"does not name {self.names}"
        return outcome.wrong


@dataclass(frozen=True)
class Outcome:
    """What a command line did."""

    status: int
    out: str
    err: str
    seconds: float
    """Of a core."""
    peak: int
    """Bytes."""

    @property
    def wrong(self) -> str | None:
        """What it should not have done; None where all is well."""
        lines = self.err.strip().splitlines()
        told = bool(lines) and lines[-1].startswith("mollm: ")
        if self.seconds > SECONDS:
            return "took too long"
        if self.peak > BYTES:
            return "took too much memory"
        if "Traceback (most recent call last)" in self.out + self.err:
            return "traceback"
        if self.status < 0:
            return "hang" if self.status == -signal.SIGKILL else f"signal {-self.status}"
        if self.status not in (0, 1, 2):
            return f"status {self.status}"
        if self.status == 2 and (not told or len(lines) > 1):
            return "no single sentence"
        return None


class Inputs:
    """Whole inputs, made once, of which every case breaks a copy."""

    def __init__(self, folder: Path) -> None:
        import tiny

        from mollm.models import loading

        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.model = folder / "whole"
        loading.save(tiny.model(), tiny.tokenizer(), self.model)
        self.gguf = folder / "whole.gguf"
        write_gguf(self.gguf)
        self.forget = write_rows(folder / "forget.jsonl", ROWS)
        self.retain = write_rows(folder / "retain.jsonl", KEPT)
        self._count = 0

    def new(self, name: str) -> Path:
        """A path that no case has had."""
        self._count += 1
        return self.folder / f"{self._count:04d}-{name}"

    def copy_model(self) -> Path:
        """A copy of the model."""
        return Path(shutil.copytree(self.model, self.new("model")))

    def command(self, number: int, model: Path, forget: Path | None = None) -> list[str]:
        """One of the commands, in turn."""
        data = ["--forget", str(forget or self.forget), "--retain", str(self.retain)]
        out = ["--model", str(model), "--out", str(self.new("out"))]
        evaluate = ["--limit", "2", "--max-new-tokens", "2", "--resamples", "10", "--device", "cpu"]
        unlearn = ["--max-steps", "1", "--max-length", "200", "--device", "cpu"]
        commands = [
            ["unlearn", *out, *data, *unlearn, "--set", "disable_tqdm=true"],
            ["evaluate", *out, *data, *evaluate],
            ["plan", "--model", str(model), "--device", "cpu", "--max-length", "16"],
            ["demo", *out, "--steps", "1", "--device", "cpu"],
        ]
        order = (0, 1, 0, 2, 0, 1, 0, 2, 0, 1) if forget is None else (0, 1)
        number = 3 if forget is None and number % 20 == 11 else order[number % len(order)]
        return commands[number]


Make = Callable[[Inputs, int], Iterator[Case]]
"""Makes all cases from a seed."""


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Writes a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_gguf(path: Path) -> None:
    """The tiny model as GGUF."""
    import gguf
    import tiny

    model, tokenizer = tiny.model(), tiny.tokenizer()
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_chat_template(tiny.TEMPLATE)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "token_embd",
        "model.norm": "output_norm", "model.layers": "blk",
    }  # fmt: skip
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- ways to break a file


def flipped(data: bytes, rng: random.Random, first: int | None = None, count: int = 1) -> bytes:
    """The bytes with some of them changed, of the first ones where that is given."""
    changed = bytearray(data)
    for _ in range(count):
        changed[rng.randrange(min(first or len(data), len(data)))] = rng.randrange(256)
    return bytes(changed)


def swapped(text: str, rng: random.Random) -> tuple[str, str]:
    """A JSON text with one value in it changed, and where."""
    whole = json.loads(text)
    places: list[tuple[str, ...]] = []

    def walk(value: object, path: tuple[str, ...]) -> None:
        pairs = value.items() if isinstance(value, dict) else ()
        if isinstance(value, list):
            pairs = [(str(i), item) for i, item in enumerate(value[:3])]
        for key, item in list(pairs)[:40]:
            places.append((*path, key))
            walk(item, (*path, key))

    walk(whole, ())
    path = rng.choice(places)
    changed = copy.deepcopy(whole)
    holder = changed
    for key in path[:-1]:
        holder = holder[int(key)] if isinstance(holder, list) else holder[key]
    mark, value = "\ufffdhere\ufffd", rng.choice(VALUES)
    if isinstance(holder, list):
        holder[int(path[-1])] = mark
    else:
        holder[path[-1]] = mark
    return json.dumps(changed).replace(json.dumps(mark), value), f"{'.'.join(path)} = {value[:20]}"


def break_text(path: Path, rng: random.Random) -> str:
    """Changes a JSON file in one of several ways, and says which."""
    whole = path.read_bytes()
    way = rng.randrange(10)
    if way < 7:
        text, told = swapped(whole.decode(), rng)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return told
    if way == 7:
        cut = rng.randrange(len(whole))
        path.write_bytes(whole[:cut])
        return f"cut at {cut}"
    if way == 8:
        path.write_bytes(flipped(whole, rng, count=3))
        return "bytes"
    path.write_bytes(whole.replace(b"{", b'{"a": 1, "a": 2, ', 1))
    return "a key twice"


def with_config(**values: object) -> Callable[[Path], None]:
    """A way to break a model: other values in its config."""

    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def with_weights(change: Callable[[dict[str, object]], None]) -> Callable[[Path], None]:
    """A way to break a model: other weights."""

    def apply(model: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(model / "model.safetensors")
        change(weights)
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    return apply


def _spoilt(value: float) -> Callable[[dict[str, object]], None]:
    def change(weights: dict[str, object]) -> None:
        weights["model.norm.weight"][3] = value

    return change


def _header(change: Callable[[dict[str, dict[str, object]]], None]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        path = model / "model.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return apply


def _link(name: str, target: str) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(target)

    return apply


def _folder(name: str) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        (model / name).unlink()
        (model / name).mkdir()

    return apply


def _first(header: dict[str, dict[str, object]]) -> dict[str, object]:
    return next(value for name, value in header.items() if name != "__metadata__")


MODELS: dict[str, Callable[[Path], None]] = {
    "a billion layers": with_config(num_hidden_layers=10**9),
    "a billion layers of another type": with_config(model_type="qwen2", num_hidden_layers=10**9),
    "wide": with_config(hidden_size=1 << 19, num_attention_heads=4096),
    "a large vocabulary": with_config(vocab_size=1 << 23),
    "a small vocabulary": with_config(vocab_size=7),
    "many heads": with_config(num_attention_heads=7),
    "no heads": with_config(num_key_value_heads=0),
    "another type": with_config(model_type="mamba"),
    "no type": with_config(model_type=None),
    "a type of its own": with_config(model_type="own", auto_map={"AutoConfig": "own.Own"}),
    "a kernel": with_config(_attn_implementation="org/kernel"),
    "another kernel": with_config(attn_implementation="kernels-community/flash-attn2"),
    "an attention": with_config(attn_implementation="nosuch"),
    "an encoder": with_config(model_type="bert", architectures=["BertModel"]),
    "quantized": with_config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "quantized somehow": with_config(quantization_config={"quant_method": "nosuch"}),
    "quantized as text": with_config(quantization_config="x"),
    "layers of other types": with_config(layer_types=["x"] * 2),
    "many layer types": with_config(layer_types=["full_attention"] * 200_000),
    "rope": with_config(rope_parameters={"rope_type": "nosuch"}),
    "rope as text": with_config(rope_parameters="x"),
    "an activation": with_config(hidden_act="nosuch"),
    "a dtype": with_config(dtype="nosuch"),
    "a dtype of the module": with_config(dtype="load"),
    "nan weights": with_weights(_spoilt(float("nan"))),
    "infinite weights": with_weights(_spoilt(float("inf"))),
    "huge weights": with_weights(_spoilt(3e38)),
    "no weights": with_weights(lambda weights: weights.clear()),
    "no layer": with_weights(lambda w: [w.pop(n) for n in list(w) if "layers.1" in n]),
    "no file of weights": lambda model: (model / "model.safetensors").unlink(),
    "no tokenizer": lambda model: (model / "tokenizer.json").unlink(),
    "no tokenizer config": lambda model: (model / "tokenizer_config.json").unlink(),
    "a shape": _header(lambda h: _first(h).update(shape=[10**9, 10**9])),
    "a negative shape": _header(lambda h: _first(h).update(shape=[-1, 4])),
    "a dtype of weights": _header(lambda h: _first(h).update(dtype="X9")),
    "offsets": _header(lambda h: _first(h).update(data_offsets=[0, 10**15])),
    "a header that is none": lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 100),
    "a long header": lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f{}"),
    "an index": lambda m: (m / "model.safetensors.index.json").write_text("[]"),
    "an index elsewhere": lambda m: (
        (m / "model.safetensors").rename(m / "x.safetensors"),
        (m / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "../whole/model"}})
        ),
    ),
    "a config that is a folder": _folder("config.json"),
    "a tokenizer that is a folder": _folder("tokenizer.json"),
    "weights that are a folder": _folder("model.safetensors"),
    "a config that is a link to itself": _link("config.json", "config.json"),
    "weights that are a link to nowhere": _link("model.safetensors", "nowhere"),
    "a config that never ends": _link("config.json", "/dev/zero"),
    "an adapter": lambda model: (model / "adapter_config.json").write_text("{"),
    "a generation config": lambda m: (m / "generation_config.json").write_text("[1]"),
    "a config with a mark": lambda m: (m / "config.json").write_bytes(b"\xff\xfe{}"),
    "an empty config": lambda model: (model / "config.json").write_text(""),
    "pickled weights": lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
}

DATA: dict[str, bytes | str] = {
    "deep.jsonl": "[" * 100_000,
    "twice.jsonl": '{"prompt": "a", "prompt": "b", "answer": "c"}',
    "nan.jsonl": '{"prompt": NaN, "answer": "c"}',
    "number.jsonl": '{"prompt": "a", "answer": ' + "9" * 5000 + "}",
    "surrogate.jsonl": '{"prompt": "\\ud800", "answer": "c"}',
    "nul.jsonl": '{"prompt": "a\\u0000b", "answer": "c\\u0000"}',
    "bytes.jsonl": b'{"prompt": "\xff", "answer": "c"}',
    "mark.jsonl": b"\xff\xfe{\x00}\x00",
    "names.jsonl": '{"\\ud800": "a", "": "c"}',
    "blank.jsonl": '{"prompt": " ", "answer": "c"}',
    "types.jsonl": '{"prompt": ["a"], "answer": {"b": 1}}',
    "wide.jsonl": json.dumps({f"c{i}": "x" for i in range(20_000)}),
    "messages.jsonl": '{"messages": 3}',
    "roles.jsonl": '{"messages": [{"role": ["user"]}, 4]}',
    "content.jsonl": '{"messages": [{"role": "user"}, {"role": "assistant", "content": [1]}]}',
    "pku.jsonl": '{"prompt": "a", "response_0": 1, "response_1": 2, "is_response_0_safe": 3,'
    ' "is_response_1_safe": 4}',
    "tofu.jsonl": '{"question": "a", "answer": "b", "perturbed_answer": [3]}',
    "long.jsonl": json.dumps({"prompt": "p", "answer": "word " * 200_000}),
    "empty.jsonl": "",
    "list.json": "[1, 2, 3]",
    "deep.json": '[{"a":' * 50_000,
    "text.json": '"text"',
    "nul.csv": "prompt,answer\na\0b,c\n",
    "quote.csv": 'prompt,answer\n"a,b\n',
    "header.csv": "prompt,prompt\na,b\n",
    "cells.csv": "prompt,answer\na\n",
    "none.csv": "\n\n\n",
    "text.parquet": "text",
    "ends.parquet": b"PAR1\xff\xff\xff\x7fPAR1",
    "packed.jsonl.gz": b"\x1f\x8b",
    "rows.txt": "a",
}


# ---- all cases


def cases(inputs: Inputs, seed: int = 0) -> Iterator[Case]:
    """Every case, each with the files that it breaks, in an order that the seed decides alone."""
    rng = random.Random(seed)
    yield Case("whole", "model", inputs.command(0, inputs.model))
    yield Case("whole", "gguf", inputs.command(0, inputs.gguf))
    for number, (name, change) in enumerate(MODELS.items()):
        model = inputs.copy_model()
        change(model)
        yield Case("model", name, inputs.command(number, model))
    for file, count in (("config.json", 90), ("tokenizer.json", 50), ("tokenizer_config.json", 40)):
        for number in range(count):
            model = inputs.copy_model()
            name = break_text(model / file, rng)
            yield Case(file, name, inputs.command(number, model))
    for number, template in enumerate(TEMPLATES):
        model = inputs.copy_model()
        path = model / "chat_template.jinja"
        path.write_bytes(template.encode("utf-8", "surrogatepass"))
        yield Case(
            "template",
            template[:60],
            inputs.command(number, model)
            if "plan" not in inputs.command(number, model)
            else inputs.command(0, model),
        )
    for number in range(24):
        model = inputs.copy_model()
        path = model / "model.safetensors"
        whole = path.read_bytes()
        cut = rng.randrange(len(whole))
        data = whole[:cut] if number % 3 == 0 else flipped(whole, rng, (2000, None)[number % 2], 4)
        path.write_bytes(data)
        yield Case("safetensors", f"{len(data)} bytes", inputs.command(0, model))
    whole = inputs.gguf.read_bytes()
    for number in range(60):
        path = inputs.new("model.gguf")
        first = (200, 2000, None)[number % 3]
        cut = rng.randrange(len(whole))
        path.write_bytes(whole[:cut] if number % 4 == 0 else flipped(whole, rng, first, 2))
        yield Case("gguf", f"{number}", inputs.command(number, path))
    yield from _yaml_cases(inputs, rng)
    yield from _data_cases(inputs, rng)


def _yaml_cases(inputs: Inputs, rng: random.Random) -> Iterator[Case]:
    for number in range(len(YAMLS) + 30):
        named = {
            "model": inputs.model, "forget": inputs.forget, "retain": inputs.retain,
            "out": inputs.new("out"),
        }  # fmt: skip
        text = SETTINGS.format(**named)
        if number < len(YAMLS):
            # Each stands for itself where it has no name, and else for the setting of that name.
            line = YAMLS[number].format(**named) if "{" in YAMLS[number][:-1] else YAMLS[number]
            key = line.split(":")[0]
            kept = [row for row in text.splitlines() if not row.startswith(key)]
            alone = not line or line[0] in "-#%[{?\t\x00" or ":" not in line or "\n" in line
            data = line if alone else "\n".join([*kept, line])
            if key == "retain":
                data = data.replace(f"  path: {inputs.retain}\n  schema: prompt-answer\n", "")
            if key == "lora":
                data = data.replace("  r: 2\n", "")
            broken = data.encode("utf-8", "surrogatepass")
        elif number % 2:
            broken = flipped(text.encode(), rng, count=2)
        else:
            broken = text.encode()[: rng.randrange(len(text))]
        path = inputs.new("run.yaml")
        path.write_bytes(broken)
        name = YAMLS[number][:60] if number < len(YAMLS) else f"{number}"
        yield Case("yaml", name, ["unlearn", "--config", str(path)])


def _data_cases(inputs: Inputs, rng: random.Random) -> Iterator[Case]:
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    for number, (name, content) in enumerate(DATA.items()):
        path = inputs.new(name)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        yield Case("data", name, inputs.command(number, inputs.model, path))
    table = Dataset.from_list(ROWS)
    for number, kind in enumerate(["jsonl", "json", "csv", "parquet", "saved"] * 9):
        path = target = inputs.new(f"rows.{kind}")
        if kind == "saved":
            table.save_to_disk(path)
            target = rng.choice(sorted(file for file in path.iterdir()))
        elif kind == "jsonl":
            write_rows(path, ROWS)
        elif kind == "json":
            path.write_text(json.dumps(ROWS))
        else:
            getattr(table, f"to_{kind}")(str(path))
        whole = target.read_bytes()
        cut = rng.randrange(len(whole))
        target.write_bytes(whole[:cut] if number % 3 == 0 else flipped(whole, rng, count=2))
        yield Case("data", f"{kind} {number}", inputs.command(number, inputs.model, path))
    for name in ("~nobody-here/x", "x" * 5000, "a\\0b", "a/b/c", "", "/", "/dev/zero", "json"):
        yield Case("name", name[:30], inputs.command(0, inputs.model, Path(name)))
        yield Case("name", name[:30], inputs.command(0, Path(name)))


# ---- one command line


def run(argv: list[str], scratch: Path) -> Outcome:
    """Gives a command line to a child of this process, which has imported all that it needs."""
    out, err = scratch / "out.txt", scratch / "err.txt"
    out.write_text("")
    err.write_text("")
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = _in_child(argv, out, err)
        finally:
            os._exit(status)
    while True:
        ended, wait, used = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - started > 9 * SECONDS or _processor_seconds(pid) > 2 * SECONDS:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return Outcome(
        os.waitstatus_to_exitcode(wait),
        out.read_text(errors="replace"),
        err.read_text(errors="replace"),
        # Other programs on the machine cost no time of the child's own.
        used.ru_utime + used.ru_stime,
        used.ru_maxrss * 1024,
    )


def _processor_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _in_child(argv: list[str], out: Path, err: Path) -> int:
    import torch

    from mollm.cli import main

    torch.set_num_threads(1)
    os.chdir(out.parent)  # a setting that is taken for a folder's name makes it there
    faulthandler.dump_traceback_later(8 * SECONDS, file=err.open("a"))  # where it hangs
    for path, descriptor in ((out, 1), (err, 2)):
        with path.open("ab") as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(i, "w", errors="backslashreplace") for i in (1, 2))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + 2 * BYTES  # a defect must not take the machine
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    try:
        return main(argv)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 98
    except BaseException:
        import traceback

        traceback.print_exc()
        return 97
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        faulthandler.cancel_dump_traceback_later()


def prepare() -> None:
    """Imports what the commands need, so that no child has to."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.pop("MOLLM_TRACEBACK", None)
    import peft  # noqa: F401
    import rouge_score.rouge_scorer  # noqa: F401
    import scipy.stats  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import transformers  # noqa: F401

    import mollm.demo.run
    import mollm.evaluation.evaluate
    import mollm.planning.shapes
    import mollm.training.trainer  # noqa: F401


def try_all(
    make: Make, seed: int, chosen: Callable[[int, Case], bool]
) -> tuple[Counter[str], list[str]]:
    """Tries the chosen cases: how many of each kind, and what was wrong."""
    prepare()
    tried: Counter[str] = Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder  # logs of defects
        try:
            inputs = Inputs(Path(folder) / "inputs")
            for number, case in enumerate(make(inputs, seed)):
                if not chosen(number, case):
                    continue
                outcome = run(case.argv, Path(folder))
                tried[case.kind] += 1
                reason = case.wrong(outcome)
                if reason:
                    log = "".join(
                        path.read_text()[-1500:] for path in Path(folder).glob("mollm-*.log")
                    )
                    wrong.append(
                        f"{number} {case.kind}, {case.name}: {reason} "
                        f"({outcome.status}, {outcome.seconds:.1f} s, {outcome.peak >> 20} MiB): "
                        f"mollm {case.argv[0]}: {outcome.err[-500:]}{log}"
                    )
                    print(wrong[-1], end="\n\n", flush=True)
                for path in Path(folder).glob("mollm-*.log"):
                    path.unlink()
        finally:
            tempfile.tempdir = None
    return tried, wrong


def run_options(about: str | None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--kind", default="", help="the beginning of the kinds to try")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one case in N")
    parser.add_argument("--first", type=int, default=0, metavar="M", help="from case M < N on")
    return parser.parse_args()


def run_all(make: Make, asked: argparse.Namespace) -> int:
    """Tries the cases that are asked for and prints what was wrong."""
    begun = time.monotonic()
    tried, wrong = try_all(
        make,
        asked.seed,
        lambda number, case: (
            case.kind.startswith(asked.kind) and number % asked.every == asked.first
        ),
    )
    seconds = time.monotonic() - begun
    print(dict(tried), f"{tried.total()} tried, {len(wrong)} wrong, {seconds:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    for folder in (Path(__file__).parent, Path(__file__).parents[1]):
        sys.path.insert(0, str(folder))
    sys.exit(run_all(cases, run_options(__doc__)))
