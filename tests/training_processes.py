"""What tests/distributed/test_processes.py runs in two and in four processes, and once more in one.

Every case trains a tiny Llama with a MOLLMTrainer and returns what the test compares.
"""

from __future__ import annotations

import traceback
from pathlib import Path

import launch
import tiny
import torch
from transformers import TrainerCallback

from mollm import MOLLMConfig, MOLLMTrainer
from mollm.data.records import Record
from mollm.distributed import processes
from mollm.errors import UsageError
from mollm.models import forward, loading
from mollm.system import precision

FORGET = [Record(f"Who wrote book {n}?", "Ada " * (n % 3 + 1)) for n in range(10)]
RETAIN = [Record(f"How many legs has animal {n}?", "four " * (n % 4 + 1)) for n in range(12)]
ROWS = 8

SHARDED = {"fsdp": "full_shard", "hsdp": "hybrid_shard"}
OPTIONS = {
    "adamw": {},
    "in micro-batches": {"per_device_train_batch_size": 1},
    "clipped": {"max_grad_norm": 0.05, "optimizer_options": {"base": "sgd"}},
    "checkpointed": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "checkpointed reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "head trains": {"freeze_embeddings": False, "reference": "cache"},
    "tied head": {"tied": True, "freeze_embeddings": False},
    "cached": {"reference": "cache"},
    "streamed": {
        "optimizer_options": {"gradient_memory": "streamed"},
        "per_device_train_batch_size": 1,
        "tied": True,
        "freeze_embeddings": False,
    },
    "streamed body": {
        "optimizer_options": {"gradient_memory": "streamed"},
        "per_device_train_batch_size": 1,
    },
    "streamed by blocks": {
        "optimizer_options": {"gradient_memory": "streamed", "gram": "blocks"},
        "per_device_train_batch_size": 1,
    },
    "some parameters": {"trainable_parameters": [".mlp."], "relearn_steps": 1},
    "streamed, some parameters": {
        "optimizer_options": {"gradient_memory": "streamed"},
        "trainable_parameters": ["layers.1.", "model.norm"],
    },
    "npo": {"method": "npo"},
    "means": {"optimizer_options": {"momentum": "per-objective"}},
    "lora": {"lora": {"target_modules": "all-linear"}},
    "lora checkpointed": {
        "lora": {"target_modules": ["q_proj", "lm_head"]},
        "gradient_checkpointing": True,
    },
    "lora cached": {"lora": {"modules_to_save": ["lm_head"]}, "reference": "cache"},
    "several sets": {"several": True, "preferences": {"kl": 20, "retain_b": 2}},
    "relearning": {"relearn_steps": 2, "per_device_train_batch_size": 2},
    "relearning with lora": {"relearn_steps": 2, "lora": {"target_modules": "all-linear"}},
}


class StopAfter(TrainerCallback):
    """Asks for the end on one process alone."""

    def __init__(self, step, rank):
        self.step = step
        self.rank = rank

    def on_step_end(self, args, state, control, **_):
        if processes.rank() == self.rank and state.global_step >= self.step:
            control.should_training_stop = True


def trainer(
    out,
    layout="one",
    *,
    model=None,
    steps=2,
    tied=False,
    lora=None,
    dtype=torch.float64,
    several=False,
    **options,
):
    """A trainer whose steps see the same rows whatever the number of processes."""
    world = processes.world_size()
    size = min(options.pop("per_device_train_batch_size", ROWS), ROWS // world)
    peft_config = None
    if lora is not None:
        import peft

        peft_config = peft.LoraConfig(**({"r": 4, "target_modules": ["q_proj"]} | lora))
    settings = {
        "use_cpu": True,
        "learning_rate": 1e-2,
        "max_steps": steps,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": ROWS // world // size,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": steps,
        "save_strategy": "no",
        "logging_steps": 2,
        "disable_tqdm": True,
        "max_length": 128,
        "fsdp": SHARDED.get(layout),
    }
    sets = [{"a": rows[:6], "b": rows[6:]} if several else rows for rows in (FORGET, RETAIN)]
    return MOLLMTrainer(
        tiny.model(tie_word_embeddings=tied).to(dtype) if model is None else model,
        MOLLMConfig(output_dir=str(out), **(settings | options)),
        forget_dataset=sets[0],
        retain_dataset=sets[1],
        eval_dataset={"forget": FORGET[:3], "retain": RETAIN[:5]},
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )


def weights(made):
    tensors = processes.gathered(forward.own_tensors(made._base))
    return {n: None if t is None else t.detach().clone() for n, t in tensors.items()}


def found(made):
    """What all processes must agree on, and what the first one alone knows."""
    return {
        "weights": weights(made),
        "history": [record.as_dict() for record in made.history],
        "evaluated": [log for log in made.state.log_history if "eval_loss" in log],
    }


def train(out, layout, key):
    made = trainer(out, layout, **OPTIONS[key])
    made.train()
    return found(made)


def read(out, layout, key):
    """A model given by name, whose weights the processes of one in parts are sent."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    tied = OPTIONS[key].get("tied", False)
    if processes.rank() == 0:
        made = tiny.model(tie_word_embeddings=tied, rope_parameters=rope)
        loading.save(made, tiny.tokenizer(), out / "tiny")
    processes.barrier()
    load, loaded = loading.load, []
    loading.load = lambda *args: loaded.append(args) or load(*args)
    made = trainer(out, layout, model=str(out / "tiny"), **OPTIONS[key])
    loading.load = load
    made.train()
    return {**found(made), "loaded": len(loaded)}


def exported(out, layout, key):
    from transformers import AutoModelForCausalLM

    made = trainer(out / "run", layout, dtype=torch.float32, **OPTIONS[key])
    made.train()
    made.export(out / "model")
    read = AutoModelForCausalLM.from_pretrained(out / "model")
    after = weights(made)
    return {"exported": read.state_dict(), "after": after}


SAVING = {"steps": 3, "save_strategy": "steps", "save_steps": 2}


def resumed(out, layout, key):
    """Goes on from the checkpoint that another number of processes left after two steps."""
    made = trainer(out, layout, **(OPTIONS[key] | SAVING))
    other = "one" if processes.world_size() > 1 else layout
    made.train(resume_from_checkpoint=str(out.parent / f"left-{other}-{key}" / "checkpoint-2"))
    return found(made)


def left(out, layout, key):
    """A run that leaves checkpoints."""
    made = trainer(out, layout, **(OPTIONS[key] | SAVING))
    made.train()
    return found(made)


def continued(out, layout, key):
    """A run, and the same from its checkpoint after two steps, in as many processes."""
    whole = trainer(out / "whole", layout, **(OPTIONS[key] | SAVING))
    whole.train()
    again = trainer(out / "again", layout, **(OPTIONS[key] | SAVING))
    again.train(resume_from_checkpoint=str(out / "whole" / "checkpoint-2"))
    return {"whole": found(whole), "again": found(again)}


def stopped(out, layout, key):
    """The last process alone asks for the end after its second step."""
    made = trainer(out, layout, steps=5)
    made.add_callback(StopAfter(2, processes.world_size() - 1))
    made.train()
    return {"steps": made.state.global_step}


def mistaken(out, layout, key):
    """The last process alone cannot read the data."""
    broken = [] if processes.rank() == processes.world_size() - 1 else RETAIN
    try:
        MOLLMTrainer(
            tiny.model(),
            MOLLMConfig(output_dir=str(out), use_cpu=True),
            forget_dataset=FORGET,
            retain_dataset=broken,
            processing_class=tiny.tokenizer(),
        )
    except UsageError as error:
        return {"error": str(error)}
    return {"error": None}


def unlike(out, layout, key):
    """The last process has a model of its own."""
    try:
        MOLLMTrainer(
            tiny.model(seed=processes.rank()),
            MOLLMConfig(output_dir=str(out), use_cpu=True, reference="cache"),
            forget_dataset=FORGET,
            retain_dataset=RETAIN,
            processing_class=tiny.tokenizer(),
        )
    except UsageError as error:
        return {"error": str(error)}
    return {"error": None}


def in_bfloat16(out, layout, key):
    """Layers compute in bfloat16; the weights are float32."""
    with precision.computing_in("bfloat16"):
        made = trainer(out, layout, dtype=torch.float32, **OPTIONS[key])
        made.train()
    return {**found(made), "dtypes": {str(p.dtype) for p in made._base.parameters()}}


def read_in_bfloat16(out, layout, key):
    """As on a processor with bfloat16."""
    with precision.computing_in("bfloat16"):
        return read(out, layout, key)


KINDS = {
    "train": train,
    "read": read,
    "read_in_bfloat16": read_in_bfloat16,
    "exported": exported,
    "resumed": resumed,
    "left": left,
    "continued": continued,
    "stopped": stopped,
    "mistaken": mistaken,
    "unlike": unlike,
    "in_bfloat16": in_bfloat16,
}
_PLAIN = ("adamw", "in micro-batches", "clipped", "cached", "lora")
COPIES = (*_PLAIN, "streamed", "streamed by blocks", "several sets", "relearning")
PARTS = tuple(key for key in OPTIONS if key != "streamed")
RESUMED = (("copies", "lora"), ("fsdp", "means"), ("fsdp", "lora"), ("fsdp", "streamed body"))


def cases_for(world):
    """(kind, layout, key)."""
    if world == 4:
        return [
            ("train", "copies", "adamw"),
            ("train", "copies", "in micro-batches"),
            ("train", "copies", "several sets"),
            ("train", "hsdp", "adamw"),
            ("train", "hsdp", "relearning"),
            ("train", "hsdp", "streamed by blocks"),
            ("train", "fsdp", "streamed body"),
            ("continued", "fsdp", "streamed body"),
            ("read", "hsdp", "adamw"),
            ("stopped", "copies", "adamw"),
        ]
    return [
        *(("train", "copies", key) for key in COPIES),
        *(("train", "fsdp", key) for key in PARTS),
        *(("read", "fsdp", key) for key in ("tied head", "cached", "lora", "streamed body")),
        *(("exported", "fsdp", key) for key in ("tied head", "lora")),
        *((kind, *case) for kind in ("resumed", "left") for case in RESUMED),
        ("continued", "copies", "streamed"),
        ("continued", "fsdp", "streamed body"),
        ("continued", "fsdp", "streamed by blocks"),
        ("stopped", "copies", "adamw"),
        ("mistaken", "copies", "adamw"),
        ("unlike", "copies", "adamw"),
        *(("in_bfloat16", "fsdp", key) for key in ("adamw", "lora cached", "head trains")),
        ("read_in_bfloat16", "fsdp", "adamw"),
    ]


def run_case(folder, case):
    kind, layout, key = case
    try:
        return KINDS[kind](folder / "-".join(case), layout, key)
    except Exception:
        return {"failed": traceback.format_exc()}


def _work(folder, cases):
    results = {}
    for case in cases:
        with precision.computing_in("float32"):
            results[case] = run_case(folder, case)
        if "failed" in results[case]:
            break  # the other processes may be waiting in another place
    return results


def run(world, folder, cases=None):
    """What every process found, by case."""
    return launch.in_processes(_work, world, folder, Path(folder), cases or cases_for(world))
