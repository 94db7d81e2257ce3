"""What processes of a training step send each other, counted in calls and in sockets.

For tests/planning/test_traffic.py: a small Llama, a step of a MOLLMTrainer at a time.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import traceback
from collections import Counter
from pathlib import Path

import launch
import torch
import torch.distributed as dist
import training_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from mollm.data.records import Record
from mollm.distributed.sharding import local
from mollm.system import precision
from mollm.training.memory import plan_settings

SIZES = {
    "vocab_size": 1024,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
STEPS = 3
"""The first two also check that copies agree."""
KINDS = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
}
_BYTES_SENT = 200
"""Where Linux has tcpi_bytes_sent in its tcp_info."""


def config(tied):
    return LlamaConfig(**SIZES, tie_word_embeddings=tied)


class Calls(TorchDispatchMode):
    """Counts the bytes of the whole tensors of collectives, by kind."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and func._opname in KINDS:
            sizes = [t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.bytes[KINDS[func._opname]] += max(sizes)
        return func(*args, **(kwargs or {}))


def sent():
    """Bytes that this process's TCP sockets have sent."""
    total = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed by now, or of another family
            if os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(number))) as one:
                    told = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
                    total += struct.unpack_from("Q", told, _BYTES_SENT)[0]
    return total


class CountLastStep(TrainerCallback):
    """What the last step sent."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == STEPS - 1:
            dist.barrier()
            self.calls = Calls()
            self.calls.__enter__()
            self.before = sent()

    def on_step_end(self, args, state, control, **_):
        if state.global_step == STEPS:
            self.calls.__exit__(None, None, None)
            dist.barrier()
            self.sent = sent() - self.before


def count(folder, layout, key, dtype):
    # Enough rows to relearn as many as a step sees.
    training_processes.FORGET = [Record(f"Who wrote book {n}?", "Ada") for n in range(24)]
    options = dict(training_processes.OPTIONS[key])
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(options.pop("tied", False)))
    with precision.computing_in(dtype):
        made = training_processes.trainer(
            folder,
            layout,
            model=model,
            steps=STEPS,
            compute_dtype=dtype,
            eval_strategy="no",
            **options,
        )
        counting = CountLastStep()
        made.add_callback(counting)
        made.train()
        adapter = None if made._wrapped is None else made._wrapped.peft_config["default"]
        settings = plan_settings(made.args, adapter, longest=64, objectives=made.objectives)
        held = {
            "parameters": made._base.parameters(),
            "reference model": tensors_of(made._passes.objectives.reference),
            "optimizer state": [t for slot in made.optimizer.state.values() for t in slot.values()],
        }
    return {
        "settings": settings,
        "calls": dict(counting.calls.bytes),
        "sent": counting.sent,
        "held": {name: bytes_of(tensors) for name, tensors in held.items()},
    }


def tensors_of(reference):
    """Of a copy its parameters, of a cache the head that it keeps; an adapter's has none."""
    if not isinstance(reference, torch.nn.Module):
        return []
    return [*reference.parameters(), *dict(reference.named_buffers(recurse=False)).values()]


def bytes_of(tensors):
    """Of the parts that this process holds."""
    return sum(local(t).nbytes for t in tensors if isinstance(t, torch.Tensor) and t.ndim)


def _work(folder, cases):
    found = {}
    for case in cases:
        try:
            found[case] = count(Path(folder) / "-".join(case), *case)
        except Exception:
            found[case] = {"failed": traceback.format_exc()}
            break
    return found


def run(world, folder, cases):
    """What every process counted, by case."""
    return launch.in_processes(_work, world, folder, str(folder), cases)
