"""MOLLMTrainer: unlearning in the shape that users of transformers and TRL know."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import (
    GenerationConfig,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    set_seed,
)
from transformers.trainer_utils import SaveStrategy, TrainOutput

from mollm.data.chat import Batch, ChatFormat, Tokens, collate, ends_of, vocabulary_of
from mollm.data.encoding import encode_records
from mollm.data.samplers import PairSampler, RowSampler
from mollm.data.sets import read_data, records_of, role_of
from mollm.distributed import processes
from mollm.errors import UsageError
from mollm.methods.method import OBJECTIVES
from mollm.models import forward, four_bits, loading
from mollm.models.adapters import adapted, checkpoint_activations, merged
from mollm.models.precision import DTYPES
from mollm.optim.optimizer import MOLLMOptimizer
from mollm.system import machine
from mollm.system.folders import clear_unfinished, complete, replace_text
from mollm.training import checkpoint, fsdp, serialization
from mollm.training.callbacks import DivergenceStop, LossBar
from mollm.training.config import MOLLMConfig
from mollm.training.history import StepRecord, means_of, record_of, write_history
from mollm.training.model_card import model_card
from mollm.training.objectives import Objectives, totals_of
from mollm.training.reference_model import CachedReference, cache_name, make_reference
from mollm.training.step import accumulate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mollm.data.sets import Data

logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"
_TRAINING = "training"
_DECISIONS = tuple(
    f"should_{what}" for what in ("training_stop", "epoch_stop", "save", "evaluate", "log")
)
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
    that are never added up, must see the same rows however it is cut into micro-batches, and goes
    on bit for bit after it was killed. `train` therefore runs the few lines of such a loop and
    drives the same `TrainerState`, `TrainerControl` and callbacks.

    Logs hold, as means over the steps since the last one: `forget_loss`, `kl_loss`, `retain_loss`,
    `loss` (their sum), for each objective `norm_*`, `weight_*` and `conflict_*` (the share of
    updates that did not descend on it), `cosine_*_*`, `pareto_gap`, and `tokens_per_second`.
    Evaluation gives `eval_forget_loss` on the forget part of `eval_dataset`, `eval_kl_loss` and
    `eval_retain_loss` on its retain part, and `eval_loss`, their sum; each can be
    `metric_for_best_model`.

    Several processes, started by torchrun or `accelerate launch`, make the step that one would make
    with all of their rows, each on its share of them. Each holds a copy of the model, or with
    `fsdp` in `args` a part of it; see `mollm.distributed.processes`. Callbacks run on all of
    them, the first one logs and writes, and `output_dir` must be a folder that all of them see. A
    run can be resumed with another number of processes.

    Args:
        model: A model folder, a .gguf file, a hub name, or a causal language model.
        args: A MOLLMConfig.
        forget_dataset: What to forget: a path or hub name, keyword arguments of
            `mollm.data.load_records` by name (`path` for its source), a list of
            `mollm.data.Record` or of dicts, or a `datasets.Dataset` or `IterableDataset`.
        retain_dataset: What to keep.
        eval_dataset: Sets "forget" and "retain", or one of them, to evaluate on.
        processing_class: The tokenizer; needed where the model is not given by name.
        callbacks: More callbacks.
        peft_config: A `peft.LoraConfig`, to train an adapter in place of the weights; with
            `quantization` in `args`, or a model in 4 bits given as a module, that is QLoRA.

    Raises:
        UsageError: Anything about the data, the model or the output folder that the user can put
            right; found out before the model trains.
    """

    control: TrainerControl
    _fingerprint: str
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: MOLLMConfig,
        *,
        forget_dataset: Data,
        retain_dataset: Data,
        eval_dataset: Mapping[str, Data] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any | None = None,
    ) -> None:
        args.refuse_four_bits_without(peft_config)
        if not eval_dataset and args.eval_strategy != "no":
            raise UsageError(
                f"eval_dataset must be given for the eval_strategy {args.eval_strategy.value}, but "
                "got none: give sets to forget and to retain."
            )
        # Of a model that is cut into parts, the first process alone reads the weights.
        from_first = args.sharding is not None and isinstance(model, str)
        with processes.agreeing():
            tokenizer = self._prepare(
                model, args, processing_class, (forget_dataset, retain_dataset, eval_dataset)
            )
        read = not (from_first and processes.rank())
        prints = processes.each(checkpoint.fingerprint(self._base) if read else None)
        self._fingerprint = prints[0 if from_first else processes.rank()]
        with processes.agreeing():
            set_seed(args.seed)  # an adapter begins at random
            self._wrapped = None if peft_config is None else adapted(self._base, peft_config)
            if self._wrapped is None and args.freeze_embeddings:
                forward.freeze_embeddings(self._base)
            if args.gradient_checkpointing:
                checkpoint_activations(self._base, args.gradient_checkpointing_kwargs)
            rows = self._rows_for_reference(args)
            folder = Path(args.output_dir) / cache_name(self._base, rows, self._fingerprint)
            reference = make_reference(args.reference, self._base, self._wrapped, folder=folder)
        self._objectives = Objectives(self._base, reference, args.forget_loss)
        if args.sharding is not None:
            hybrid = args.sharding == "hybrid_shard"
            fsdp.shard(self._objectives, args.device, hybrid=hybrid, from_first=from_first)
        self.history: list[StepRecord] = []
        """A record of every step."""
        self._divergence = DivergenceStop(self.history)
        super().__init__(
            model=self._wrapped or self._base,
            args=args,
            data_collator=self._batch,
            train_dataset=self._data.rows["forget"],
            eval_dataset=list(self._data.evaluated.values()) or None,
            processing_class=tokenizer,
            callbacks=[self._divergence, *(callbacks or [])],
        )
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(LossBar)
        self._refuse_unlike_processes()
        if isinstance(reference, CachedReference):
            reference.fill(
                rows,
                self._objectives.states,
                device=args.device,
                batch_size=args.per_device_eval_batch_size,
                pad_id=self._chat.pad_id,
            )
        self._logged = 0  # steps that are in a log
        self._tokens = 0  # since then
        self._since = time.perf_counter()

    # ---- before the first step

    def _prepare(
        self,
        model: str | PreTrainedModel,
        args: MOLLMConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        data: tuple[Data, Data, Mapping[str, Data] | None],
    ) -> PreTrainedTokenizerBase:
        """Reads the data and then loads the model; returns the tokenizer."""
        source = loading.find_model(model) if isinstance(model, str) else None
        if tokenizer is None:
            if source is None:
                raise UsageError(
                    "processing_class must be given where the model is not given by name, but got "
                    "None: pass its tokenizer."
                )
            tokenizer = loading.load_tokenizer(source)
        config = loading.load_config(model)[0] if isinstance(model, str) else model.config
        self._chat = ChatFormat(
            tokenizer,
            template_kwargs=args.chat_template_kwargs,
            system_prompt=args.system_prompt,
            vocabulary=vocabulary_of(config),
            ends=ends_of(_generation_config(model, source)),
        )
        context = getattr(config, "max_position_embeddings", None)
        if context is not None:
            args.max_length = min(args.max_length, context)
        self._data = read_data(*data, self._chat, args.max_length, args.train_on_turns)
        if args.eval_strategy != "no" and type(self).evaluate is MOLLMTrainer.evaluate:
            _check_metric(_metric_of(args), _metrics_on(self._data.evaluated))
        self.notes = self._data.notes
        """What the user should know about the data."""
        for note in self.notes:
            if processes.rank() == 0:
                logger.warning(note)
        # A model that will be cut into parts may be too large for the device as a whole.
        device = args.device if args.sharding is None else torch.device("cpu")
        self._base: PreTrainedModel
        if isinstance(model, str):
            assert source is not None, "a model by name has a source"
            self._base = _loaded(source, config, args, device)
        else:
            _refuse_four_bits(model, args)
            self._base = model.to(device)
        return tokenizer

    def _rows_for_reference(self, args: MOLLMConfig) -> list[Tokens]:
        rows, compares = self._data.rows, args.chosen_method.compares
        return [row for name in rows if "retain" in name or compares for row in rows[name]]

    @property
    def _folder(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def about(self) -> dict[str, Any]:
        """What a checkpoint must agree with, to be resumed from."""
        adapter = None
        if self._wrapped is not None:
            config = self._wrapped.peft_config[self._wrapped.active_adapter]
            adapter = (
                f"LoRA of rank {config.r} and alpha {config.lora_alpha} on "
                f"{sorted(config.target_modules)}"
            )
        base = self.args.for_optimizer().get("base", "adamw")
        base = getattr(base, "func", base)  # of a functools.partial
        return {
            "version": machine.versions().get("mollm"),
            "dtype": str(self._base.dtype).removeprefix("torch."),
            "model": self._fingerprint,
            "adapter": adapter,
            "freeze_embeddings": self._wrapped is None and self.args.freeze_embeddings,
            "optimizer": base if isinstance(base, str) else getattr(base, "__name__", repr(base)),
            "forget data": self._data.facts["forget"]["sha256"],
            "retain data": self._data.facts["retain"]["sha256"],
            "method": self.args.method,
            "train_on_turns": self.args.train_on_turns,
            **self._chat.identity,
        }

    def _refuse_unlike_processes(self) -> None:
        first, *others = processes.each(self.about)
        unlike = [name for name in first if any(one[name] != first[name] for one in others)]
        if unlike:
            raise UsageError(
                f"all processes must be given the same {' and '.join(unlike)}, but they were not."
            )

    @property
    def stopped_because(self) -> str | None:
        """Why the last run was stopped early, if its losses diverged."""
        return self._divergence.reason

    def create_optimizer(self, model: Any = None) -> MOLLMOptimizer:
        """MOLLMOptimizer over what trains; weight decay leaves biases and norms alone."""
        decayed = set(self.get_decay_parameter_names(self._base))
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, p in self._base.named_parameters():
            if p.requires_grad:
                groups[name in decayed].append(p)
        self.optimizer = optimizer = MOLLMOptimizer(
            [
                {"params": params, "weight_decay": self.args.weight_decay if decay else 0.0}
                for decay, params in groups.items()
                if params
            ],
            objectives=OBJECTIVES,
            **self.args.for_optimizer(),
        )
        return optimizer

    def _make_sampler(self) -> PairSampler[Tokens]:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return PairSampler(
            *(
                RowSampler(self._data.rows[name], self.args.rows_per_step, seed=seed, name=name)
                for name in ("forget", "retain")
            )
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
        with processes.agreeing():
            found = self._find_checkpoint(resume_from_checkpoint)
        self._begin()
        if found is not None:
            self._resume(found)
        self.is_in_train = True
        self._base.train()
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self._tell("on_train_begin")
        self._tell("on_epoch_begin")
        self._since, self._tokens = time.perf_counter(), 0
        while self.state.global_step < self.state.max_steps:
            epoch = self._sampler.forget.epoch
            self._train_step()
            last = self.state.global_step == self.state.max_steps
            over = self._sampler.forget.epoch > epoch
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
            counts = processes.total(torch.tensor(asked, device=self.args.device)).tolist()
            for name, count in zip(_DECISIONS, counts, strict=True):
                setattr(self.control, name, count > 0)

    def _begin(self) -> None:
        self._sampler = self._make_sampler()
        self.optimizer = self.lr_scheduler = None
        self.create_optimizer()
        steps = self.args.max_steps
        if steps <= 0:
            rows = self.args.num_train_epochs * len(self._data.rows["forget"])
            steps = math.ceil(rows / self.args.rows_per_step)
        self.create_scheduler(num_training_steps=steps)
        self._take_state(TrainerState(), steps)
        self.history.clear()
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
        forget, retain = next(self._sampler)  # of all processes
        totals = totals_of(forget), totals_of(retain)
        mine = [rows[processes.rank() :: args.world_size] for rows in (forget, retain)]
        optimizer.zero_grad()
        parts: list[Tensor] = []
        for number in range(args.gradient_accumulation_steps):
            if number:
                self._tell("on_substep_end")
            start = number * args.per_device_train_batch_size
            some = slice(start, start + args.per_device_train_batch_size)
            batches = (self._batch(rows[some]) for rows in mine)
            last = number == args.gradient_accumulation_steps - 1
            part = accumulate(self._objectives, optimizer, *batches, totals=totals, last=last)
            parts.append(torch.stack(list(part.values())))
        losses = processes.total(torch.stack(parts).double().sum(0))
        if args.max_grad_norm > 0:
            optimizer.aggregate()
            clip_grad_norm_(self._base.parameters(), args.max_grad_norm)
        self._tell("on_pre_optimizer_step")
        optimizer.step()
        self._tell("on_optimizer_step")
        rate = float(optimizer.param_groups[0]["lr"])
        self.lr_scheduler.step()
        named = dict(zip(OBJECTIVES, losses.tolist(), strict=True))
        self.history.append(record_of(self.state.global_step, rate, named, optimizer))
        self._tokens += sum(len(row.ids) for row in (*forget, *retain))
        self.state.global_step += 1
        drawn = self.state.global_step * args.rows_per_step
        self.state.epoch = drawn / len(self._data.rows["forget"])
        self._tell("on_step_end")

    def _log_evaluate_save(self) -> None:
        if self.control.should_log and self._logged < len(self.history):
            self.log(self._means())
        if self.control.should_evaluate:
            better = self._is_best(self.evaluate())
            if self.args.save_strategy == SaveStrategy.BEST:
                self.control.should_save = better
        if self.control.should_save and self.stopped_because is None:
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
        if processes.rank() == 0:
            write_history(self.history, self._folder / "history.jsonl")
            self.create_model_card()
        self._tell("on_train_end")
        self.is_in_train = False
        total = [sum(record.losses.values()) for record in self.history]
        loss = sum(total) / max(1, len(total))
        return TrainOutput(self.state.global_step, loss, {"train_loss": loss})

    # ---- evaluation

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
                role: encode_records(
                    records_of(data, role_of(role)),
                    self._chat,
                    max_length=self.args.max_length,
                    train_on_turns=self.args.train_on_turns,
                ).rows
                for role, data in eval_dataset.items()
            }
        if not rows:
            raise UsageError(
                "eval_dataset must hold a set 'forget' or 'retain', but there is none: give one to "
                "the trainer or to evaluate()."
            )
        losses: dict[str, float] = {}
        with forward.in_evaluation_mode(self._base):
            for role in sorted(rows):
                losses |= self._evaluate(role, rows[role])
        metrics = {f"{metric_key_prefix}_{name}_loss": loss for name, loss in losses.items()}
        metrics[f"{metric_key_prefix}_loss"] = sum(losses.values())
        self.log(dict(metrics))
        self._tell("on_evaluate", metrics)
        return metrics

    def _evaluate(self, role: str, rows: Sequence[Tokens]) -> dict[str, float]:
        size, totals = self.args.per_device_eval_batch_size, totals_of(rows)
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        sums: dict[str, Tensor] = {}
        for some, mine in processes.shares(batches):
            losses = self._objectives(**{role: self._batch(some)}, totals=(totals, totals))
            for name, loss in losses.items():
                known = sums.setdefault(name, torch.zeros_like(loss, dtype=torch.float64))
                if mine:
                    known += loss
        return {name: float(processes.total(value)) for name, value in sums.items()}

    def _is_best(self, metrics: Mapping[str, float]) -> bool:
        name = _metric_of(self.args)
        if name is None:
            return False
        _check_metric(name, metrics)
        value, best = metrics[name], self.state.best_metric
        better = best is None or (value > best if self.args.greater_is_better else value < best)
        if better:
            self.state.best_metric = value
            self.state.best_global_step = self.state.global_step
        return better

    # ---- checkpoints; nothing is ever read with pickle

    def _save_checkpoint(self, model: Any = None, trial: Any = None) -> None:
        folder = self._folder / f"{checkpoint.PREFIX}{self.state.global_step}"
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder)
        with processes.on_the_first(complete(folder)) as stage:
            checkpoint.save_weights(self._base, self._wrapped, stage)
            training = {
                "optimizer": processes.gathered(self.optimizer.state_dict()),
                "scheduler": self.lr_scheduler.state_dict(),
                "sampler": self._sampler.state_dict(),
                "history": [asdict(record) for record in self.history],
                "logged": self._logged,
                "random": processes.each(checkpoint.random_state()),
            }
            if stage is not None:
                self.processing_class.save_pretrained(stage)
                serialization.save_tree(training, stage, _TRAINING)
                self.state.save_to_json(str(stage / _STATE))
                checkpoint.describe(stage, self.about)
        if processes.rank() == 0:
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
            folder = Path(asked)
        checkpoint.check(folder, self.about)
        return folder

    def _resume(self, folder: Path) -> None:
        with processes.agreeing():
            state = serialization.load_tree(folder, _TRAINING)
            with serialization.told_as_damage(folder):
                reached = TrainerState.load_from_json(str(folder / _STATE))
            checkpoint.load_weights(self._base, self._wrapped, folder)
        self._sampler.load_state_dict(state["sampler"])
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.load_state_dict(processes.placed_state(state["optimizer"], params))
        self.lr_scheduler.load_state_dict(state["scheduler"])
        self.history[:] = [StepRecord(**record) for record in state["history"]]
        self._logged = state["logged"]
        self._take_state(reached, self.state.max_steps)
        if processes.rank() < len(state["random"]):
            checkpoint.set_random_state(state["random"][processes.rank()])

    # ---- what is left

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model, or its adapter, and the tokenizer, for `from_pretrained`."""
        folder = Path(output_dir or self.args.output_dir)
        first = processes.rank() == 0
        if first:
            folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_weights(self._base, self._wrapped, folder if first else None)
        if first:
            self.processing_class.save_pretrained(folder)
        processes.wait()

    def export(self, output_dir: str | Path) -> None:
        """Writes the whole model as safetensors, an adapter merged into it, and the tokenizer.

        The trainer's own model stays as it is; to merge takes the memory of a second one. All
        processes must call it, and the first one writes.
        """
        model = merged(self._base, self._wrapped, parts=self.args.sharding is not None)
        if model is not None:
            loading.save(model, self.processing_class, Path(output_dir))
        processes.wait()

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Writes README.md into `output_dir`, see `mollm.training.model_card`."""
        replace_text(self._folder / "README.md", self.model_card())

    def model_card(self) -> str:
        """Data with hashes, settings, and the weights of every step, as Markdown."""
        return model_card(
            base_model=self._base.name_or_path or type(self._base).__name__,
            data=self._data.facts,
            settings={
                **self.args.told(),
                "adapter": self.about["adapter"],
                "steps": self.state.global_step,
            },
            history=self.history,
            versions=machine.versions(
                "peft", *(["bitsandbytes"] if self.args.quantization else [])
            ),
            notes=self.notes,
        )


def _loaded(
    source: loading.Source, config: Any, args: MOLLMConfig, device: torch.device
) -> PreTrainedModel:
    if args.sharding is not None and getattr(config, "quantization_config", None):
        raise UsageError(
            f"fsdp must be left out for a model whose weights are quantized, but got "
            f"{args.sharding} for {source.label}: let each process hold a copy."
        )
    dtype = DTYPES[args.dtype]
    if args.sharding is not None and processes.rank() > 0:
        return loading.load_without_weights(source, dtype)
    return loading.load(source, device, dtype, args.quantization)[0]


def _generation_config(model: str | PreTrainedModel, source: loading.Source | None) -> Any:
    """That of the model, or None where it has none."""
    if source is None:
        return getattr(model, "generation_config", None)
    if source.gguf_file:
        return None
    try:
        return GenerationConfig.from_pretrained(
            source.location, local_files_only=source.is_local, trust_remote_code=False
        )
    except OSError:
        return None


def _refuse_four_bits(model: PreTrainedModel, args: MOLLMConfig) -> None:
    if args.quantization:
        raise UsageError(
            f"quantization must be left out for a model that is given as a module, but got "
            f"{args.quantization}: load that in 4 bits, or give its name."
        )
    if args.sharding is not None and any(map(four_bits.in_four_bits, model.parameters())):
        raise UsageError(
            f"fsdp must be left out for a model in 4 bits, but got {args.sharding}: let each "
            "process hold a copy."
        )


def _metric_of(args: MOLLMConfig) -> str | None:
    """By which the best checkpoint is told, as `evaluate` names it."""
    name: str | None = args.metric_for_best_model
    return name if name is None or name.startswith("eval_") else f"eval_{name}"


def _metrics_on(roles: Collection[str]) -> list[str]:
    losses = {"forget": ("forget",), "retain": ("kl", "retain")}
    return [*(f"eval_{loss}_loss" for role in sorted(roles) for loss in losses[role]), "eval_loss"]


def _check_metric(name: str | None, known: Collection[str]) -> None:
    if name is not None and name not in known:
        raise UsageError(
            f"metric_for_best_model must be one of {', '.join(known)}, but got {name!r}."
        )
