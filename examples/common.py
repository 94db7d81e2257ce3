"""What the examples share: a model, the samples that ship with mollm, and the options."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import mollm
from mollm import CopyReference, Objectives
from mollm.data import load_records
from mollm.data.chat import ChatFormat, collate
from mollm.data.encoding import encode_records
from mollm.data.samplers import EndlessBatches
from mollm.models.loading import find_model, load

SAMPLES = Path(mollm.__file__).parent / "samples"


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a model folder; without it, a tiny random Llama is made")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-5)
    return parser.parse_args(argv)


def load_model(name: str | None) -> tuple[Objectives, PreTrainedTokenizerFast]:
    """The model with its losses, its original, and its tokenizer, on the CPU in float32."""
    model, tokenizer = load(find_model(name), torch.device("cpu")) if name else tiny_llama()
    return Objectives(model, CopyReference(model)), tokenizer


def tiny_llama() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    tokens = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)), tokenizer


def batches(
    tokenizer: PreTrainedTokenizerFast, device: torch.device, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Without end, a batch to forget and one to retain: this process's part of eight rows each."""
    chat, samplers, share = ChatFormat(tokenizer), [], {"rank": rank, "world_size": world_size}
    for role, name in (("forget", "authors-forget.jsonl"), ("retain", "authors-retain.jsonl")):
        rows = encode_records(load_records(SAMPLES / name, role=role), chat, max_length=512).rows
        samplers.append(EndlessBatches(rows, 8, seed=0, name=role, **share))
    for pair in zip(*samplers, strict=True):
        forget, retain = (vars(collate(rows, chat.pad_id).to(device)) for rows in pair)
        yield forget, retain
