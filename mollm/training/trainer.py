"""MOLLMTrainer: unlearning in the shape that users of transformers and TRL know."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    set_seed,
)
from transformers.trainer_utils import SaveStrategy, TrainOutput, speed_metrics

from mollm.data.chat import Batch, ChatFormat, Tokens, collate, context_of, ends_of, vocabulary_of
from mollm.data.encoding import encode_records
from mollm.data.preview import Preview, preview_of
from mollm.data.records import ROLES, Record
from mollm.data.samplers import EndlessBatches, JointSampler
from mollm.data.sets import (
    AUTO,
    TrainingData,
    named_sets,
    of_role,
    read_data,
    records_of,
    role_of,
    sets_to_evaluate,
)
from mollm.distributed import processes
from mollm.distributed.watch import blaming_the_dead, watch
from mollm.errors import UsageError
from mollm.evaluation.preview import with_likelihoods
from mollm.methods.method import GENERATED, REFUSALS
from mollm.models import forward, loading
from mollm.models.adapters import (
    adapted,
    adapter_settings,
    adapter_told,
    check_adapter,
    checkpoint_activations,
    merged,
    named,
    not_finite,
    trained_tensors,
)
from mollm.models.blocks import find_blocks
from mollm.models.checks import check_finite
from mollm.models.logits import check_logits, logit_transform, set_logit_transform
from mollm.optim.optimizer import MOLLMOptimizer
from mollm.report.audit_file import audit_of, with_audit
from mollm.report.page import REPORT_FILE, write_report
from mollm.report.run_file import run_of, write_run
from mollm.system import machine
from mollm.system.folders import (
    check_writable,
    clear_unfinished,
    complete,
    replace_text,
    staged,
)
from mollm.system.parsing import user_path
from mollm.system.precision import computing_in
from mollm.system.terminal import progress
from mollm.system.units import GIB
from mollm.training import checkpoint, fsdp, serialization
from mollm.training.adapting import Adaptation, trained_of
from mollm.training.alternatives import (
    longest_generated,
    needs_generated_answers,
    with_generated_answers,
    with_known_answers,
)
from mollm.training.best import check_metric, note_if_best
from mollm.training.callbacks import DivergenceStop, LossBar, LossLines
from mollm.training.config import NOT_REPORTED, MOLLMConfig
from mollm.training.given_model import (
    check_without_weights,
    freeze,
    loaded,
    refuse_four_bits,
    refuse_kept_parts,
    taken,
)
from mollm.training.history import (
    StepRecord,
    means_of,
    nan_to_none,
    record_of,
    skipped_in,
    write_history,
)
from mollm.training.hub import upload
from mollm.training.idle_settings import (
    idle_notes,
    refuse_idle_of_model,
    refuse_idle_rounding,
)
from mollm.training.idle_weights import note_on_idle_weights
from mollm.training.memory import check_run
from mollm.training.model_card import model_card
from mollm.training.objectives import Objectives
from mollm.training.own_retain import make_retain_data, note_on, rows_to_make
from mollm.training.passes import Passes
from mollm.training.reference_model import CachedReference, cache_name, make_reference
from mollm.training.replies import ReplySamples
from mollm.training.schedule import options_of, scheduler_state, take_schedule
from mollm.training.setting_roles import fixed_settings, free_settings, plain
from mollm.training.targets import MOST_ROWS, StopRule, StopWhen, measured

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mollm.data.sets import Data, Sets

logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"
_TRAINING = "training"
_OF_THE_BEST = ("metric_for_best_model", "greater_is_better")
_DECISIONS = tuple(
    f"should_{what}" for what in ("training_stop", "epoch_stop", "save", "evaluate", "log")
)
_STAND_IN = Record("", "What the model will say of its own accord.", is_text=True)
"""For the rows that are yet to be made."""
_WITHIN_A_STEP = ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step")


class MOLLMTrainer(Trainer):  # type: ignore[misc]
    """Makes a causal language model forget some answers and keep others.

        trainer = MOLLMTrainer(
            "path/to/model",
            MOLLMConfig(output_dir="runs/forget", max_steps=100),
            forget_dataset="forget.jsonl",
            retain_dataset="retain.jsonl",
        )
        trainer.train()
        trainer.export("runs/forget/model")

    Arguments, callbacks, `report_to`, logs, evaluation, checkpoints and schedulers are those of
    `transformers.Trainer`. The loop is its own. That of transformers runs one loss over one stream
    of batches and loads checkpoints with pickle; here a step has two streams and three gradients
    that are never summed, it must see the same examples however it is cut into micro-batches, and a
    killed run must resume bit-exactly. `train` therefore runs the few lines of such a loop and
    drives the same `TrainerState`, `TrainerControl` and callbacks.

    Logs hold, as means over the steps since the last one: `forget_loss`, `kl_loss`, `retain_loss`,
    `loss` (their sum), for each objective `grad_norm_*`, `objective_weight_*` and `conflict_*` (the
    share of updates that did not descend on it), `cosine_*_*`, `pareto_gap`, `tokens_per_second`.
    Evaluation gives `eval_forget_loss` on the forget part of `eval_dataset`, `eval_kl_loss` and
    `eval_retain_loss` on its retain part, and `eval_loss`, their sum; each can be
    `metric_for_best_model`.

    Several processes, started by torchrun or `accelerate launch`, make the step that one would make
    with all of their rows, each on its share of them. Each holds a copy of the model, or with
    `fsdp` in `args` a part of it; see `mollm.distributed.processes`. Callbacks run on all of
    them, the first one logs and writes, and `output_dir` must be a folder that all of them see. A
    run can be resumed with another number of processes.

    Args:
        model: A model folder, a .gguf file, a hub name, or a causal language model. Of a
            `peft.PeftModel` the adapter trains, and the original is the model with that adapter as
            it is given; what `torch.compile` made runs as it was before.
        args: A MOLLMConfig; without one, that of the defaults, with the `output_dir`
            "trainer_output" as in transformers.
        forget_dataset: What to forget: a path or hub name, keyword arguments of
            `mollm.data.load_records` by name (`path` for its source), a list of
            `mollm.data.Record` or of dicts, or a `datasets.Dataset` or `IterableDataset`. Several
            such sets by name become objectives of their own, "forget_alice" and so on.
        retain_dataset: What to keep: one set, or several by name. For "auto" the model makes rows
            itself, see `mollm.training.own_retain`; they are kept in `output_dir`.
        eval_dataset: Sets "forget" and "retain", or one of them, to evaluate on.
        processing_class: The tokenizer; needed where the model is not given by name.
        callbacks: More callbacks.
        peft_config: A `peft.LoraConfig`, to train an adapter in place of the weights; with
            `quantization` in `args`, or a model in 4 bits given as a module, that is QLoRA.
            Dropout is off in every model, but for `lora_dropout`.

    Raises:
        UsageError: Anything about the data, the model or the output folder that the user can put
            right; found out before the model trains.
    """

    control: TrainerControl
    _data: TrainingData
    _generates: bool
    _own_retain: tuple[str, ...] = ()
    _fingerprint: str
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: MOLLMConfig | None = None,
        *,
        forget_dataset: Sets,
        retain_dataset: Sets,
        eval_dataset: Mapping[str, Sets] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any | None = None,
    ) -> None:
        args = MOLLMConfig() if args is None else args
        if not isinstance(args, MOLLMConfig):
            raise UsageError(
                f"args must be a mollm.MOLLMConfig, but got {type(args).__name__}: MOLLMConfig "
                "takes the fields of TrainingArguments, and a few more."
            )
        self._given = _place_of(model)
        model, self._wrapped, notes = taken(model, peft_config, args)
        if self._wrapped is None:
            args.require_adapter_if_quantized(peft_config)
        args.refuse_streaming_with(self._wrapped or peft_config)
        args.refuse_method_with(self._wrapped or peft_config, as_given=self._wrapped is not None)
        trains_adapter = self._wrapped is not None or peft_config is not None
        refuse_idle_of_model(args, adapter=trains_adapter, as_module=not isinstance(model, str))
        if not eval_dataset and args.eval_strategy != "no":
            raise UsageError(
                f"eval_dataset must be given for the eval_strategy {args.eval_strategy.value}, but "
                "got none: give sets to forget and to retain."
            )
        data = forget_dataset, retain_dataset, eval_dataset
        with computing_in(args.compute_dtype):
            self._set_up(model, args, data, processing_class, callbacks, peft_config, notes)

    # ---- before the first step

    def _set_up(
        self,
        model: str | PreTrainedModel,
        args: MOLLMConfig,
        data: tuple[Sets, Sets, Mapping[str, Sets] | None],
        processing_class: PreTrainedTokenizerBase | None,
        callbacks: list[TrainerCallback] | None,
        peft_config: Any | None,
        notes: Sequence[str],
    ) -> None:
        # Of a model that is cut into parts, the first process alone reads the weights.
        from_first = args.sharding is not None and isinstance(model, str)
        with processes.raise_on_all_ranks():
            source, tokenizer = self._find(model, args, processing_class, peft_config)
            config = self._speak(model, source, args, tokenizer)
            to_forget = self._rows_for_own_retain(model, source, config, args, data, peft_config)
        if to_forget:
            data = (
                data[0],
                self._make_retain(model, source, config, args, data[1], to_forget),
                data[2],
            )
        self.retain_dataset = data[1]
        """What is retained, with the file that was made in place of "auto"."""
        watch()  # not before, for its threads would be copied where a tokenizer is tried out
        as_given = self._wrapped is not None
        with processes.raise_on_all_ranks():
            self._prepare(model, source, config, args, data, peft_config, notes)
        method = args.chosen_method
        read = not (from_first and processes.rank())
        found = processes.all_gather(logit_transform(self._base) if read else None)
        set_logit_transform(self._base, found[0 if from_first else processes.rank()])
        mine = checkpoint.fingerprint(self._base, with_adapter=as_given) if read else None
        self._fingerprint = processes.all_gather(mine)[0 if from_first else processes.rank()]
        with processes.raise_on_all_ranks():
            self._choose_what_trains(args, peft_config)
        if self._generates:
            self._generate_answers(args)
        options = args.chosen_options
        with processes.raise_on_all_ranks():
            named = _names_of_blocks(self._base) if args.streams and read else []
        named = processes.all_gather(named)[0 if from_first else processes.rank()]
        blocks = [self._base.get_submodule(name) for name in named]
        with processes.raise_on_all_ranks():
            rows = self._rows_for_reference(args)
            folder = Path(args.output_dir) / cache_name(self._base, rows, self._fingerprint)
            reference = make_reference(
                args.reference,
                self._base,
                self._wrapped,
                folder=folder,
                with_adapter=as_given,
                of=self._fingerprint,
                layer=options.get("layer"),
            )
            refuse_kept_parts(reference, args)
        objectives = Objectives(
            self._base,
            reference,
            args.forget_loss,
            method.retain_loss and method.bound(method.retain_loss, options),
            layer=options.get("layer"),
        )
        forget, retain = self._data.named("forget"), self._data.named("retain")
        self._passes = Passes(objectives, args, self._batch, forget, retain, blocks)
        if args.sharding is not None:
            hybrid = args.sharding == "hybrid_shard"
            fsdp.shard(objectives, args.device, hybrid=hybrid, from_first=from_first)
        self._original = {} if method.finish is None else trained_of(self._base)
        self.history: list[StepRecord] = []
        """A record of every step."""
        self.more_facts: dict[str, Any] = {}
        """What run.json is to hold besides, such as the command."""
        self._samples = ReplySamples(self._base, self._chat, self._data, args.sample_replies)
        self._divergence = DivergenceStop(self.history, self._data.named("retain"))
        self._target = self._stop_rule(args)
        self._changes: list[dict[str, Any]] = []  # of settings, where the run was resumed
        self._last_rows: dict[str, list[Tokens]] | None = None
        super().__init__(
            model=self._wrapped or self._base,
            args=args,
            data_collator=self._batch,
            train_dataset=self._longest,
            eval_dataset=list(self._data.evaluated.values()) or None,
            processing_class=tokenizer,
            callbacks=[
                self._divergence,
                *([] if self._target is None else [self._target]),
                *(callbacks or []),
            ],
        )
        if self.pop_callback(ProgressCallback) is not None:
            shown = LossBar(self.objectives) if sys.stderr.isatty() else LossLines(self.history)
            self.add_callback(shown)
        self._refuse_unlike_processes()
        if isinstance(reference, CachedReference):
            reference.fill(
                rows,
                objectives.states,
                device=args.device,
                batch_size=args.per_device_eval_batch_size,
                pad_id=self._chat.pad_id,
            )
        self._logged = 0  # steps that are in a log
        self._tokens = 0  # since then
        self._since = time.perf_counter()

    def _choose_what_trains(self, args: MOLLMConfig, peft_config: Any | None) -> None:
        """Puts an adapter around the model, or freezes what the method leaves as it is."""
        method, options = args.chosen_method, args.chosen_options
        set_seed(args.seed)  # an adapter begins at random
        if peft_config is not None:
            self._wrapped = adapted(self._base, peft_config)
        if self._wrapped is None:
            freeze(self._base, args)
        if "layer" in options:
            forward.check_layer(self._base, options["layer"])
        if method.freeze is not None and self._wrapped is None:
            method.bound(method.freeze, options)(self._base)
        if not any(p.requires_grad for p in self._base.parameters()):
            raise UsageError(
                "a model must have weights that train, but all of this one are frozen: "
                "unfreeze some, or give peft_config."
            )
        if args.gradient_checkpointing:
            checkpoint_activations(self._base, args.gradient_checkpointing_kwargs)

    def _generate_answers(self, args: MOLLMConfig) -> None:
        """Asks the original for the alternative answers that the data lack."""
        self._data = with_generated_answers(
            self._data,
            self._base,
            self._chat,
            folder=Path(args.output_dir),
            samples=args.chosen_options["samples"],
            seed=self._seed_of(args),
            max_length=args.max_length,
            of=self._fingerprint,
            long_rows=args.long_rows,
        )
        self._note(self._data.notes)

    def _find(
        self,
        model: str | PreTrainedModel,
        args: MOLLMConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        peft_config: Any | None,
    ) -> tuple[loading.Source | None, PreTrainedTokenizerBase]:
        """Where the model is, if it is given by name, and its tokenizer."""
        if peft_config is not None:
            check_adapter(peft_config)
        if processes.rank() == 0:
            check_writable(Path(args.output_dir))
        source = loading.find_model(model) if isinstance(model, str) else None
        if tokenizer is not None:
            return source, tokenizer
        if source is None:
            raise UsageError(
                "processing_class must be given where the model is not given by name, but got "
                "None: pass its tokenizer."
            )
        return source, loading.load_tokenizer(source)

    def _speak(
        self,
        model: str | PreTrainedModel,
        source: loading.Source | None,
        args: MOLLMConfig,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Any:
        """Settles how the model is spoken to; gives its configuration."""
        config = loading.load_config(model)[0] if isinstance(model, str) else model.config
        self._chat = ChatFormat(
            tokenizer,
            template_kwargs=args.chat_template_kwargs,
            system_prompt=args.system_prompt,
            prompt_format=args.prompt_format,
            vocabulary=vocabulary_of(config),
            ends=ends_of(
                getattr(model, "generation_config", None)
                if source is None
                else loading.load_generation_config(source)
            ),
        )
        args.max_length = int(min(args.max_length, context_of(config)))
        return config

    def _rows_for_own_retain(
        self,
        model: str | PreTrainedModel,
        source: loading.Source | None,
        config: Any,
        args: MOLLMConfig,
        data: tuple[Sets, Sets, Mapping[str, Sets] | None],
        peft_config: Any | None,
    ) -> list[Record]:
        """What retain data of the model's own must not repeat; nothing where none are asked for.

        The other data, the memory and what trains are looked at here, before the model takes its
        time.
        """
        if AUTO not in named_sets(data[1], "retain").values():
            return []
        if args.sharding is not None:
            raise UsageError(
                f"retain must be data where processes hold parts of the model, but got {AUTO!r}: "
                "let one process make them in a run of a few steps, and give its file."
            )
        forget, retain, evaluate = data
        self._read((forget, _in_place_of_auto(retain, [_STAND_IN]), evaluate), args)
        self._check_memory(model, config, args, peft_config, step=False)
        if source is not None:
            check_without_weights(source, args, peft_config)
        return [
            record for name in self._data.named("forget") for record in self._data.records[name]
        ]

    def _make_retain(
        self,
        model: str | PreTrainedModel,
        source: loading.Source | None,
        config: Any,
        args: MOLLMConfig,
        retain: Sets,
        forget: Sequence[Record],
    ) -> Sets:
        """The sets to retain with a file in place of "auto", made by the first process."""
        path = None
        with processes.raise_on_all_ranks():
            if processes.rank() == 0:
                if isinstance(model, str):
                    assert source is not None, "a model by name has a source"
                    original = loaded(source, config, args, args.device, self._chat.tokenizer)
                else:
                    original = model.to(args.device)
                count = 0 if args.disable_tqdm else rows_to_make(forget)
                with progress(count, "Making retain data") as done:
                    path = make_retain_data(
                        original,
                        self._chat,
                        forget,
                        folder=Path(args.output_dir),
                        seed=self._seed_of(args),
                        max_length=args.max_length,
                        of=checkpoint.fingerprint(original, with_adapter=self._wrapped is not None),
                        done=done,
                    )
        made = processes.all_gather(path)[0]
        assert made is not None, "the first process has made it"
        self._own_retain = (note_on(made),)
        return _in_place_of_auto(retain, str(made))

    def _prepare(
        self,
        model: str | PreTrainedModel,
        source: loading.Source | None,
        config: Any,
        args: MOLLMConfig,
        data: tuple[Sets, Sets, Mapping[str, Sets] | None],
        peft_config: Any | None,
        notes: Sequence[str],
    ) -> None:
        """Reads the data and then loads the model."""
        self._read(data, args)
        self.notes: tuple[str, ...] = ()
        """What the user should know about the data."""
        told = (*self._own_retain, *self._relearning_notes(args), *notes, *idle_notes(args))
        self._note((*self._data.notes, *told))
        self._planned = self._check_memory(model, config, args, peft_config)
        # A model that will be cut into parts may be too large for the device as a whole.
        device = args.device if args.sharding is None else torch.device("cpu")
        self._base: PreTrainedModel
        if isinstance(model, str):
            assert source is not None, "a model by name has a source"
            check_without_weights(source, args, peft_config)
            self._base = loaded(source, config, args, device, self._chat.tokenizer)
        else:
            refuse_four_bits(model, args)
            self._base = model.to(device)
            check_finite(self._base, model.name_or_path or type(model).__name__)
            check_logits(self._base)

    def _read(self, data: tuple[Sets, Sets, Mapping[str, Sets] | None], args: MOLLMConfig) -> None:
        """Reads the data, and refuses settings that do not go with them."""
        self._data = read_data(
            *data, self._chat, args.max_length, args.train_on_turns, args.long_rows
        )
        preferred = args.chosen_method.alternatives
        self._generates = preferred == GENERATED and needs_generated_answers(
            self._data, args.method_options, sharded=args.sharding is not None
        )
        if preferred is not None and not self._generates:
            self._data = with_known_answers(
                self._data,
                self._chat,
                refusals=preferred == REFUSALS,
                seed=self._seed_of(args),
                max_length=args.max_length,
                long_rows=args.long_rows,
            )
        args.for_optimizer(self.objectives)  # refuses preferences of others
        if args.eval_strategy != "no" and type(self).evaluate is MOLLMTrainer.evaluate:
            check_metric(args, self._data.evaluated)

    def _check_memory(
        self,
        model: str | PreTrainedModel,
        config: Any,
        args: MOLLMConfig,
        peft_config: Any | None,
        *,
        step: bool = True,
    ) -> float | None:
        given = None if self._wrapped is None else next(iter(self._wrapped.peft_config.values()))
        return check_run(
            model,
            config,
            args,
            peft_config or given,
            longest=self._longest_row(args),
            objectives=self.objectives,
            step=step,
        )

    def _longest_row(self, args: MOLLMConfig) -> int:
        """Tokens of the longest row, an alternative answer that is yet to be made up included."""
        rows = [row for some in self._data.rows.values() for row in some]
        pairs = [row.alternative for row in rows if row.alternative is not None]
        longest = max(len(row.ids) for row in [*rows, *pairs])
        if self._generates:
            longest = min(args.max_length, longest + longest_generated(args.max_length))
        return longest

    def _note(self, notes: Sequence[str]) -> None:
        for note in notes:
            if note not in self.notes:
                self.notes = (*self.notes, note)
                if processes.rank() == 0:
                    logger.warning(note)

    @property
    def objectives(self) -> tuple[str, ...]:
        """Their names: a loss on each set to forget, KL, and a loss on each set to retain."""
        return (*self._data.named("forget"), "kl", *self._data.named("retain"))

    @property
    def _longest(self) -> list[Tokens]:
        """The set to forget by which epochs are counted."""
        return max((self._data.rows[name] for name in self._data.named("forget")), key=len)

    def _relearning_notes(self, args: MOLLMConfig) -> list[str]:
        seen = args.rows_per_step["forget"]
        return [
            f"the {name} data has {len(self._data.rows[name])} rows, no more than a step sees, so "
            "that relearning is simulated on the rows of the step itself."
            for name in self._data.named("forget")
            if args.relearn_steps and len(self._data.rows[name]) <= seen
        ]

    def _rows_for_reference(self, args: MOLLMConfig) -> list[Tokens]:
        rows, compares = self._data.rows, args.chosen_method.compares
        kept = [n for n in rows if compares or of_role(n) == "retain"]
        some = [row for name in kept for row in rows[name]]
        return some + [row.alternative for row in some if row.alternative is not None]

    @property
    def _folder(self) -> Path:
        return Path(self.args.output_dir)

    def _what_trains(self) -> str:
        """How many tensors of the model, and which."""
        trains = sorted(n for n, p in self._base.named_parameters() if p.requires_grad)
        digest = hashlib.sha256("\n".join(trains).encode()).hexdigest()[:8]
        return f"{len(trains)} of {sum(1 for _ in self._base.parameters())} tensors ({digest})"

    @property
    def resume_signature(self) -> dict[str, Any]:
        """What a checkpoint must agree with, to be resumed from."""
        options = self.args.for_optimizer(self.objectives)
        fixed = fixed_settings(self.args.all_settings(), options)
        sets = [*self._data.named("forget"), *self._data.named("retain")]
        del fixed["dtype"]  # of the model as it is, below
        adapter = {} if self._wrapped is None else adapter_settings(self._wrapped)
        return {
            "version": machine.versions().get("mollm"),
            "dtype": str(self._base.dtype).removeprefix("torch."),
            "model": self._fingerprint,
            "adapter": None if self._wrapped is None else "LoRA",
            **{f"adapter {name}": value for name, value in adapter.items()},
            "objectives": list(self.objectives),
            **fixed,
            "freeze_embeddings": self._wrapped is None and self.args.freeze_embeddings,
            "weights that train": self._what_trains(),
            **{n: plain(v) for n, v in self._chat.identity.items() if n not in fixed},
            # Last: these change with most of what stands above, which is then named in their place.
            **{f"{name} data": self._data.facts[name]["sha256"] for name in sets},
            **{f"{name} data as tokens": _hash_of(self._data.rows[name]) for name in sets},
        }

    @property
    def _free_settings(self) -> dict[str, Any]:
        """What a run that resumes may change."""
        evaluated = {f"{n} data": f["sha256"] for n, f in self._data.facts.items() if " " in n}
        return free_settings(self.args.all_settings()) | evaluated

    def _refuse_unlike_processes(self) -> None:
        first, *others = processes.all_gather(self.resume_signature)
        unlike = [name for name in first if any(one[name] != first[name] for one in others)]
        if unlike:
            raise UsageError(
                f"all processes must be given the same {' and '.join(unlike)}, but they were not."
            )

    def _stop_rule(self, args: MOLLMConfig) -> StopWhen | None:
        if args.stop_when is None:
            return None
        return StopWhen(StopRule.of(args.stop_when), self.look)

    def look(self) -> dict[str, float]:
        """Mean likelihood of the answers of each role, and the share of their tokens that are the
        likeliest: of the first 64 rows to evaluate on, else of those to train on."""
        rows: dict[str, list[Tokens]] = {
            role: [
                row
                for name in self._data.looked_at(role)
                for row in self._data.rows[name][:MOST_ROWS]
            ]
            for role in ROLES
        }
        size = self.args.per_device_eval_batch_size
        return measured(self._base, rows, self._chat.pad_id, size)

    @property
    def target_told(self) -> str | None:
        """How the last run ended with regard to `stop_when`, in a sentence."""
        return None if self._target is None else self._target.told

    @property
    def stop_reason(self) -> str | None:
        """Why the last run is no success: its losses diverged, or its weights are not finite."""
        return self._divergence.reason

    def create_optimizer(self, model: Any = None) -> MOLLMOptimizer:
        """MOLLMOptimizer over what trains; weight decay leaves biases and norms alone."""
        decayed = set(self.get_decay_parameter_names(self._base))
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, p in self._base.named_parameters():
            if p.requires_grad:
                groups[name in decayed].append(p)
        weight_decay = self.args.optimizer_options.get("weight_decay", self.args.weight_decay)
        self.optimizer = optimizer = MOLLMOptimizer(
            [
                {"params": params, "weight_decay": weight_decay if decay else 0.0}
                for decay, params in groups.items()
                if params
            ],
            **self.args.for_optimizer(self.objectives),
        )
        refuse_idle_rounding(self.args, optimizer)
        return optimizer

    @property
    def _data_seed(self) -> int:
        return self._seed_of(self.args)

    @staticmethod
    def _seed_of(args: MOLLMConfig) -> int:
        return int(args.seed if args.data_seed is None else args.data_seed)

    def _make_sampler(self) -> JointSampler[Tokens]:
        return JointSampler(
            {
                name: EndlessBatches(self._data.rows[name], count, seed=self._data_seed, name=name)
                for role, count in self.args.rows_per_step.items()
                for name in self._data.named(role_of(role))
            }
        )

    def _batch(self, rows: Sequence[Tokens]) -> Batch:
        return collate(rows, self._chat.pad_id, self.args.padding_side).to(self.args.device)

    # ---- the loop

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Runs to the last step.

        Args:
            resume_from_checkpoint: A checkpoint to go on from, or True for the last one in
                `output_dir`.

        Raises:
            UsageError: There is no such checkpoint, or it is of another model, of other data or of
                another method or optimizer, or damaged; the model has not been changed then.
        """
        with blaming_the_dead(), computing_in(self.args.compute_dtype):
            return self._train(resume_from_checkpoint)

    def _train(self, resume_from_checkpoint: str | bool | None) -> TrainOutput:
        before: dict[str, Any] = {}
        with processes.raise_on_all_ranks():
            found = self._find_checkpoint(resume_from_checkpoint)
            if found is not None:
                before = checkpoint.check(found, self.resume_signature)
        self._begin()
        self._ask()
        if found is not None:
            self._resume(found, before)
        self._divergence.first = len(self.history)
        self.is_in_train = True
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self._tell("on_train_begin")
        self._tell("on_epoch_begin")
        self._since, self._tokens = time.perf_counter(), 0
        while self.state.global_step < self.state.max_steps:
            epoch = math.floor(self._epochs)
            self._train_step()
            last = self.state.global_step == self.state.max_steps
            over = math.floor(self._epochs) > epoch
            if over or last or self.control.should_epoch_stop:
                self._tell("on_epoch_end")
            self._log_evaluate_save()
            if self.control.should_training_stop:
                break
            if over:
                self._tell("on_epoch_begin")
        return self._end()

    def _tell(self, event: str, *args: Any) -> None:
        """Runs the callbacks for an event; what one process's ask for is done on all."""
        told = getattr(self.callback_handler, event)
        self.control = told(self.args, self.state, self.control, *args)
        if self.args.world_size > 1 and event not in _WITHIN_A_STEP:
            asked = [float(getattr(self.control, name)) for name in _DECISIONS]
            counts = processes.all_reduce_sum(torch.tensor(asked, device=self.args.device)).tolist()
            for name, count in zip(_DECISIONS, counts, strict=True):
                setattr(self.control, name, count > 0)

    def _begin(self) -> None:
        self._sampler = self._make_sampler()
        self.optimizer = self.lr_scheduler = None
        self.create_optimizer()
        steps = self.args.max_steps
        if steps <= 0:
            rows = self.args.num_train_epochs * len(self._longest)
            steps = math.ceil(rows / self.args.rows_per_step["forget"])
        self.create_scheduler(num_training_steps=steps)
        self._groups = [options_of(group) for group in self.optimizer.param_groups]
        self._take_state(TrainerState(), steps)
        self.history.clear()
        self._adaptation = Adaptation(
            self.args, self.objectives, self.optimizer, self._base, self._original
        )
        self._changes.clear()
        self._samples.forget_all()
        self._started = time.time()
        self._last_rows = None
        self._logged = 0
        set_seed(self.args.seed + processes.rank())  # each draws its own dropout
        if processes.rank() == 0:
            clear_unfinished(self._folder)

    def _take_state(self, state: TrainerState, steps: int) -> None:
        self.state = state
        state.max_steps = steps
        state.num_train_epochs = math.ceil(self.args.num_train_epochs)
        state.train_batch_size = self.args.per_device_train_batch_size
        state.compute_steps(self.args, steps)
        state.is_local_process_zero = self.is_local_process_zero()
        state.is_world_process_zero = self.is_world_process_zero()

    def _train_step(self) -> None:
        args, optimizer = self.args, self.optimizer
        self._tell("on_step_begin")
        rows = self._last_rows = next(self._sampler)  # of all processes
        optimizer.zero_grad()
        losses = self._accumulate(rows)
        gate = args.chosen_method.gate
        if gate is not None:
            optimizer.change_gradients(gate)
        if args.max_grad_norm > 0:
            optimizer.aggregate()
            clip_grad_norm_(self._base.parameters(), args.max_grad_norm)
        self._tell("on_pre_optimizer_step")
        optimizer.step()
        self._tell("on_optimizer_step")
        rate = float(optimizer.param_groups[0]["lr"])
        self.lr_scheduler.step()
        self.history.append(record_of(self.state.global_step, rate, losses, optimizer))
        self._adaptation.after(self.history[-1], self._epochs)
        self._tokens += sum(len(row.ids) for some in rows.values() for row in some)
        self.state.global_step += 1
        self.state.epoch = self._epochs
        self._tell("on_step_end")

    def _accumulate(self, rows: Mapping[str, list[Tokens]]) -> dict[str, float]:
        """Takes the gradients of all objectives on the rows of a step; returns the losses."""
        relearning = None
        if self.args.relearn_steps:
            known, step = self._data.rows, self.state.global_step
            relearning = self._passes.relearnt(known, rows, seed=self._data_seed, step=step)
        return self._passes.accumulate(
            self.optimizer, rows, relearning, lambda: self._tell("on_substep_end")
        )

    @property
    def _epochs(self) -> float:
        return self._epochs_at(self.state.global_step)

    def _epochs_at(self, step: int) -> float:
        drawn: int = step * self.args.rows_per_step["forget"]
        return drawn / len(self._longest)

    def _log_evaluate_save(self) -> None:
        if self.control.should_log and self._logged < len(self.history):
            self.log(self._means())
        if self.control.should_evaluate:
            better = note_if_best(self.args, self.state, self.evaluate())
            if self.args.save_strategy == SaveStrategy.BEST:
                self.control.should_save = better
        if self.control.should_save and self.state.global_step >= self.state.max_steps:
            self._look_at_the_end()  # so that no checkpoint is left of a run that failed
        if self.control.should_save and self.stop_reason is None:
            self._save_checkpoint()
            self._tell("on_save")

    def _means(self) -> dict[str, float]:
        """What the steps since the last log did, on average."""
        some, now = self.history[self._logged :], time.perf_counter()
        logs = {
            **means_of(some),
            "skipped_steps": self.optimizer.skipped_steps,
            "learning_rate": some[-1].lr,
            "tokens_per_second": self._tokens / (now - self._since),
        }
        self._logged, self._tokens, self._since = len(self.history), 0, now
        return logs

    def _end(self) -> TrainOutput:
        self.optimizer.zero_grad()
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None:
            checkpoint.load_weights(self._base, self._wrapped, self._folder / Path(best).name)
        self._adaptation.finish()
        self._look_at_the_end()
        if len(self.history) > skipped_in(self.history):
            idle = note_on_idle_weights(self._base, self.optimizer)
            self._note([] if idle is None else [idle])
        total = [sum(record.losses.values()) for record in self.history]
        loss = sum(total) / max(1, len(total))
        made = self.state.global_step - self._divergence.first
        rows = made * self.args.rows_per_step["forget"]
        summary = speed_metrics("train", self._started, num_samples=rows, num_steps=made)
        summary["train_loss"] = loss
        self.log(dict(summary))
        if self.stop_reason is None:
            self._ask()
        with processes.raise_on_all_ranks():
            if processes.rank() == 0:
                write_history(self.history, self._folder / "history.jsonl")
                self.create_model_card()
                self._write_report()
        self._tell("on_train_end")
        self.is_in_train = False
        return TrainOutput(self.state.global_step, loss, summary)

    def _ask(self) -> None:
        """Has the model answer some questions, on the first process."""
        if self.args.sample_replies and processes.rank() == 0:
            self._samples.ask()

    def _look_at_the_end(self) -> None:
        if self.stop_reason is None:
            self._divergence.at_the_end(self._losses_now(), self._broken(), self.args.max_loss_rise)

    @torch.no_grad()
    def _losses_now(self) -> dict[str, float] | None:
        """The losses after the last step, on its own rows, if there was one."""
        if self._last_rows is None:
            return None
        with forward.in_evaluation_mode(self._base):
            return self._passes.mean_losses(self._last_rows)

    def _broken(self) -> list[str]:
        """Names of the weights that are not finite, on any process."""
        mine = not_finite(trained_tensors(self._base, self._wrapped))
        return list(dict.fromkeys(name for names in processes.all_gather(mine) for name in names))

    # ---- evaluation

    def preview(self, rows: int = 2, *, known: bool = False) -> Preview:
        """What this run trains on, row for row, see `mollm.preview`.

        Args:
            rows: How many rows of each set to show.
            known: Whether to compute the likelihood of answers to forget. Not where processes hold
                parts of the model.
        """
        found = preview_of(self._data, self._chat, self.args.max_length, rows)
        if not known or self.args.sharding is not None:
            return found
        with computing_in(self.args.compute_dtype):
            return with_likelihoods(found, self._data, self._chat, self._base)

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Mapping[str, Data] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The losses on data to evaluate on, as means over all of its answer tokens.

        Args:
            eval_dataset: Sets "forget" and "retain", or one of them; default those of the trainer.
            ignore_keys: Has no meaning here.
            metric_key_prefix: Before every name.

        Raises:
            UsageError: There is nothing to evaluate on, or the data cannot be read; other data
                do not go with a cached reference.
        """
        rows = self._data.evaluated
        if eval_dataset is not None:
            rows = {
                name: encode_records(
                    records_of(data, role_of(name)),
                    self._chat,
                    max_length=self.args.max_length,
                    train_on_turns=self.args.train_on_turns,
                ).rows
                for role, sets in eval_dataset.items()
                for name, data in sets_to_evaluate(role, sets).items()
            }
        if not rows:
            raise UsageError(
                "eval_dataset must hold a set 'forget' or 'retain', but there is none: give one to "
                "the trainer or to evaluate()."
            )
        with forward.in_evaluation_mode(self._base), computing_in(self.args.compute_dtype):
            losses = self._passes.mean_losses(rows)
        metrics = {f"{metric_key_prefix}_{name}_loss": loss for name, loss in losses.items()}
        metrics[f"{metric_key_prefix}_loss"] = sum(losses.values())
        self.log(dict(metrics))
        self._tell("on_evaluate", metrics)
        return metrics

    # ---- checkpoints; nothing is ever read with pickle

    def _save_checkpoint(self, model: Any = None, trial: Any = None) -> None:
        broken = self._broken()
        if broken:
            self._divergence.refuse_weights(broken)
            self.control.should_training_stop = True
            return
        folder = self._folder / f"{checkpoint.PREFIX}{self.state.global_step}"
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder)
        weights = checkpoint.whole_weights(self._base, self._wrapped)
        training = {
            "optimizer": processes.gathered(self.optimizer.state_dict()),
            "groups": self._groups,
            "scheduler": scheduler_state(self.lr_scheduler),
            "sampler": self._sampler.state_dict(),
            "history": [asdict(record) for record in self.history],
            "changes": self._changes,
            "logged": self._logged,
            "random": processes.all_gather(checkpoint.random_state()),
        }
        with processes.raise_on_all_ranks():
            if processes.rank() == 0:
                with complete(folder) as stage:
                    checkpoint.write_weights(self._base, self._wrapped, weights, stage)
                    self.processing_class.save_pretrained(stage)
                    serialization.save_tree(training, stage, _TRAINING)
                    self.state.save_to_json(str(stage / _STATE))
                    checkpoint.describe(stage, self.resume_signature, self._free_settings)
                best = self.state.best_model_checkpoint
                checkpoint.keep_last(self._folder, self.args.save_total_limit, best)

    def _find_checkpoint(self, asked: str | bool | None) -> Path | None:
        if not asked:
            return None
        if asked is True:
            found = checkpoint.checkpoints(self._folder)
            if not found:
                raise UsageError(
                    f"{self._folder} must hold a checkpoint to resume from, but it holds none: "
                    "train from the start."
                )
            folder = found[-1]
        else:
            folder = user_path(asked)
        return folder

    def _resume(self, folder: Path, before: Mapping[str, Any]) -> None:
        """Takes over a checkpoint; nothing is changed before all of it has been looked at."""
        with processes.raise_on_all_ranks(), serialization.corrupt_checkpoint_errors(folder):
            state = serialization.load_tree(folder, _TRAINING)
            reached = TrainerState.load_from_json(str(folder / _STATE))
            history = [StepRecord(**record) for record in state["history"]]
            if len(history) != reached.global_step:
                raise ValueError(f"{len(history)} of {reached.global_step} steps are recorded")
            if not (isinstance(state["random"], list) and state["random"]):
                raise ValueError("no random numbers are in it")
            if not_finite(serialization.tensors_of(state["optimizer"])):
                raise ValueError("the optimizer's state is not finite")
            if reached.global_step > self.state.max_steps:
                raise UsageError(
                    f"max_steps must be at least the {reached.global_step} steps of {folder}, but "
                    f"got {self.state.max_steps}."
                )
            self._sampler.load_state_dict(state["sampler"])
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            self.optimizer.load_state_dict(processes.placed_state(state["optimizer"], params))
            self._take_options(state["groups"])
            take_schedule(self.lr_scheduler, state["scheduler"], self.optimizer)
            checkpoint.load_weights(self._base, self._wrapped, folder)
            self.history[:] = history
            for record in history:
                self._adaptation.after(record, self._epochs_at(record.step))
            self._changes[:] = state["changes"]
            self._logged = state["logged"]
            self._take_state(reached, self.state.max_steps)
            if processes.rank() < len(state["random"]):
                checkpoint.set_random_state(state["random"][processes.rank()])
        self._note_changes(before)

    def _take_options(self, before: Sequence[Mapping[str, Any]]) -> None:
        """Options of the optimizer that are others now than when the checkpoint's run began."""
        for group, then, now in zip(self.optimizer.param_groups, before, self._groups, strict=True):
            group.update({name: now[name] for name in now if then.get(name) != now[name]})

    def _note_changes(self, before: Mapping[str, Any]) -> None:
        now = self._free_settings
        unlike = [
            name for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)
        ]
        for name in unlike:
            if name not in NOT_REPORTED:
                change = {"step": self.state.global_step, "setting": name}
                change |= {"was": before.get(name), "is": now.get(name)}
                self._changes.append(change)
                if processes.rank() == 0:
                    logger.warning(
                        f"resumed at step {self.state.global_step} with {name} {now.get(name)}, "
                        f"which was {before.get(name)}."
                    )
        if any(name in _OF_THE_BEST or name.endswith(" data") for name in unlike):
            # Metrics of before are of something else.
            self.state.best_metric = self.state.best_global_step = None
            self.state.best_model_checkpoint = None

    # ---- what is left

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model, or its adapter, and the tokenizer, for `from_pretrained`.

        A whole model takes away what would be loaded in its place: other files of weights and an
        `adapter_config.json`.
        """
        folder = user_path(output_dir or self.args.output_dir)
        broken = self._broken()
        weights = checkpoint.whole_weights(self._base, self._wrapped)
        with processes.raise_on_all_ranks():
            _refuse_broken(broken)
            if processes.rank() == 0:
                old = loading.WEIGHT_FILES if self._wrapped is None else None
                with staged(folder, instead_of=old) as stage:
                    checkpoint.write_weights(self._base, self._wrapped, weights, stage)
                    self.processing_class.save_pretrained(stage)

    def export(self, output_dir: str | Path) -> None:
        """Writes the whole model as safetensors, an adapter merged into it, and the tokenizer.

        The trainer's own model stays as it is; to merge takes the memory of a second one. All
        processes must call it, and the first one writes. What would be loaded in place of these
        weights goes from the folder: other files of weights and an `adapter_config.json`.

        Raises:
            UsageError: A weight is not finite; nothing is written.
        """
        model = merged(self._base, self._wrapped, parts=self.args.sharding is not None)
        with processes.raise_on_all_ranks():
            if model is not None:
                _refuse_broken(not_finite(model.state_dict()))
                loading.save(model, self.processing_class, user_path(output_dir))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "After unlearning with mollm",
        with_report: bool = False,
    ) -> str | None:
        """Uploads the whole model with its card, and returns where they are.

        They take the place of the weights at the top of the repository, whose history keeps them.

        All processes must call it, and the first one uploads; the others get None.

        Args:
            repo_id: The repository, made where there is none, such as ann/my-model.
            private: Whether a new repository is private; None for what the account has as default.
            token: Of the hub; None for that of `hf auth login`.
            commit_message: Of the commit.
            with_report: Whether report.html goes up too, without replies and command: those
                repeat what was to be forgotten.

        Raises:
            UsageError: A weight is not finite, there is no report, or the hub refuses.
        """
        from mollm.report.page import write_public_report

        url = None
        with tempfile.TemporaryDirectory(prefix="mollm-push-") as name:
            folder = Path(name) / "model"
            self.export(folder)
            with processes.raise_on_all_ranks():
                if processes.rank() == 0:
                    run = run_of(str(self._folder))
                    card = with_audit(self.model_card(), None if run is None else audit_of(run))
                    (folder / "README.md").write_text(card, encoding="utf-8")
                    if with_report:
                        write_public_report(self._folder, folder / REPORT_FILE)
                    url = upload(
                        folder,
                        repo_id,
                        private=private,
                        token=token,
                        commit_message=commit_message,
                    )
        return url

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Writes README.md into `output_dir`, see `mollm.training.model_card`."""
        replace_text(self._folder / "README.md", self.model_card())

    def _write_report(self) -> None:
        """Writes run.json and, with the package jinja2, report.html into `output_dir`."""
        write_run(nan_to_none(self._facts()), self._folder)
        if find_spec("jinja2") is not None:
            write_report([self._folder], self._folder / REPORT_FILE)

    def _facts(self) -> dict[str, Any]:
        """What run.json says of this run."""
        card = self._card()
        return {
            **card,
            "model": self._given,
            "label": card["base_model"],
            "steps": self.state.global_step,
            "resumed_at": self._divergence.first,
            "skipped_steps": skipped_in(self.history),
            "device": machine.device_name(self.args.device),
            "processes": self.args.world_size,
            "seconds": round(time.time() - self._started, 1),
            "peak_memory_gib": round(machine.peak_memory(self.args.device) / GIB, 2),
            "planned_gib": None if self._planned is None else round(self._planned / GIB, 2),
            "evaluations": [log for log in self.state.log_history if "eval_loss" in log],
            "replies": self._samples.rows(),
            "commit": machine.commit(),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **self.more_facts,
        }

    def model_card(self) -> str:
        """Data with hashes, settings, and the weights of every step, as Markdown."""
        return model_card(history=self.history, **self._card())

    def _card(self) -> dict[str, Any]:
        ending = self.target_told
        return {
            "base_model": self._base.name_or_path or type(self._base).__name__,
            "changes": self._changes,
            "failure": self.stop_reason,
            "data": self._data.facts,
            "settings": {
                **self.args.reported_settings(),
                **({} if self._wrapped is None else adapter_told(self._wrapped)),
                "steps": self.state.global_step,
            },
            "versions": machine.versions(
                "peft", *(["bitsandbytes"] if self.args.quantization else [])
            ),
            "notes": [*self.notes, *([] if ending is None else [f"stop_when: {ending}"])],
        }


def _names_of_blocks(model: PreTrainedModel) -> list[str]:
    """By which a process that has only the model's layout finds them too."""
    names = {module: name for name, module in model.named_modules()}
    return [names[block] for block in find_blocks(model)]


def _place_of(model: str | Path | PreTrainedModel) -> str | None:
    """Where the original is, for those who compare with it; None where it was given as a module."""
    if not isinstance(model, str | Path):
        return None
    path = user_path(model)
    return str(path.resolve()) if path.exists() else str(model)


def _in_place_of_auto(retain: Sets, made: Data) -> Sets:
    """The sets to retain with these data in place of "auto"."""
    if retain == AUTO:
        return made
    sets = named_sets(retain, "retain")
    named = {name.removeprefix("retain_"): one for name, one in sets.items()}
    return {name: made if one == AUTO else one for name, one in named.items()}


def _refuse_broken(names: Sequence[str]) -> None:
    if names:
        raise UsageError(
            f"a model must have finite weights to be written, but {named(names)} are not: go back "
            "to the last checkpoint, with a lower learning rate."
        )


def _hash_of(rows: Sequence[Tokens]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.ids, row.labels]).encode())
        if row.alternative is not None:
            digest.update(json.dumps([row.alternative.ids, row.alternative.labels]).encode())
    return digest.hexdigest()
