"""MOLLMTrainer: unlearning in the shape that users of transformers and TRL know."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

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
from transformers.trainer_utils import SaveStrategy, TrainOutput

from mollm import checkpoint, machine, models
from mollm.chat import Batch, ChatFormat, Tokens, collate
from mollm.data import Record, Role, check_overlap, content_hash, load_records
from mollm.data_batches import PairSampler, RowSampler, encode_records
from mollm.errors import UsageError
from mollm.folder import clear_unfinished, complete
from mollm.model_card import model_card
from mollm.optimizer import MOLLMOptimizer
from mollm.references import cache_name, make_reference
from mollm.step import OBJECTIVES, accumulate, forget_side, retain_side, totals_of
from mollm.trainer_callbacks import DivergenceStop, LossBar
from mollm.trainer_config import DTYPES, MOLLMConfig
from mollm.unlearn import StepRecord, pairs, record_of, write_history

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Data: TypeAlias = str | Path | Mapping[str, Any] | Sequence[Record] | Dataset

logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"
_TRAINING = "training"


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

    One process; `examples/` has loops for several.

    Args:
        model: A model folder, a .gguf file, a hub name, or a causal language model.
        args: A MOLLMConfig.
        forget_dataset: What to forget: a path or hub name, keyword arguments of
            `mollm.data.load_records` by name (`path` for its source), a list of
            `mollm.data.Record`, or a `datasets.Dataset`.
        retain_dataset: What to keep.
        eval_dataset: Sets "forget" and "retain", or one of them, to evaluate on.
        processing_class: The tokenizer; needed where the model is not given by name.
        callbacks: More callbacks.
        peft_config: A `peft.LoraConfig`, to train an adapter in place of the weights. QLoRA, on a
            quantized model that is given as a module, has not been tested.

    Raises:
        UsageError: Anything about the data, the model or the output folder that the user can put
            right; found out before the model trains.
    """

    control: TrainerControl
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
        if args.world_size > 1:
            raise UsageError(
                f"MOLLMTrainer must run in one process, but {args.world_size} were started: see "
                "examples/ for loops with several."
            )
        records = {"forget": _records(forget_dataset, "forget")}
        records["retain"] = _records(retain_dataset, "retain")
        records |= _eval_records(eval_dataset, args)
        overlap = check_overlap(records["forget"], records["retain"]).note
        source = models.find_model(model) if isinstance(model, str) else None
        tokenizer = processing_class
        if tokenizer is None:
            if source is None:
                raise UsageError(
                    "processing_class must be given where the model is not given by name, but got "
                    "None: pass its tokenizer."
                )
            tokenizer = models.load_tokenizer(source)
        self._chat = ChatFormat(tokenizer)
        self._check_length(model, args)
        encoded = {
            name: encode_records(rows, self._chat, max_length=args.max_length, name=name)
            for name, rows in records.items()
        }
        self.notes = tuple(
            dict.fromkeys([*([overlap] if overlap else []), *_all_notes(encoded.values())])
        )
        """What the user should know about the data."""
        for note in self.notes:
            logger.warning(note)
        self._rows = {name: each.rows for name, each in encoded.items()}
        self._data = {
            name: {"source": r[0].source or "records", "rows": len(r), "sha256": content_hash(r)}
            for name, r in records.items()
        }
        if isinstance(model, str):
            assert source is not None, "a model by name has a source"
            model, _ = models.load(source, args.device, DTYPES[args.dtype])
        self._base: PreTrainedModel = model.to(args.device)
        self._fingerprint = checkpoint.fingerprint(self._base)
        set_seed(args.seed)  # an adapter begins at random
        self._wrapped = None if peft_config is None else _adapted(self._base, peft_config)
        if self._wrapped is None and args.freeze_embeddings:
            models.freeze_embeddings(self._base)
        if args.gradient_checkpointing:
            _checkpoint_activations(self._base, args.gradient_checkpointing_kwargs)
        self.history: list[StepRecord] = []
        """A record of every step."""
        self._divergence = DivergenceStop(self.history)
        super().__init__(
            model=self._wrapped or self._base,
            args=args,
            data_collator=self._batch,
            train_dataset=self._rows["forget"],
            eval_dataset=[self._rows[name] for name in _evaluated(self._rows)] or None,
            processing_class=tokenizer,
            callbacks=[self._divergence, *(callbacks or [])],
        )
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(LossBar)
        self._reference = make_reference(
            args.reference,
            self._base,
            self._wrapped,
            self._rows_for_reference(),
            folder=self._folder
            / cache_name(self._base, self._rows_for_reference(), self._fingerprint),
            batch_size=args.per_device_eval_batch_size,
            pad_id=self._chat.pad_id,
        )
        self._logged = 0  # steps that are in a log
        self._tokens = 0  # since then
        self._since = time.perf_counter()

    # ---- before the first step

    def _check_length(self, model: str | PreTrainedModel, args: MOLLMConfig) -> None:
        config = models.load_config(model)[0] if isinstance(model, str) else model.config
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and args.max_length > context:
            args.max_length = context

    def _rows_for_reference(self) -> list[Tokens]:
        names = [
            name for name in self._rows if "retain" in name or self.args.chosen_method.compares
        ]
        return [row for name in names for row in self._rows[name]]

    @property
    def _folder(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def about(self) -> dict[str, Any]:
        """What a checkpoint must agree with, to be resumed from."""
        adapter = None
        if self._wrapped is not None:
            config = self._wrapped.peft_config[self._wrapped.active_adapter]
            adapter = f"LoRA of rank {config.r} on {sorted(config.target_modules)}"
        return {
            "version": machine.versions().get("mollm"),
            "model": self._fingerprint,
            "adapter": adapter,
            "forget data": self._data["forget"]["sha256"],
            "retain data": self._data["retain"]["sha256"],
            "method": self.args.method,
        }

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
                RowSampler(self._rows[name], self.args.rows_per_step, seed=seed, name=name)
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
                another method; nothing has been changed then.
        """
        found = self._find_checkpoint(resume_from_checkpoint)
        self._begin()
        if found is not None:
            self._resume(found)
        self.is_in_train = True
        self._base.train()
        handler, args = self.callback_handler, self.args
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(handler, name, getattr(self, name))
        self.control = handler.on_train_begin(args, self.state, self.control)
        self.control = handler.on_epoch_begin(args, self.state, self.control)
        self._since, self._tokens = time.perf_counter(), 0
        while self.state.global_step < self.state.max_steps:
            epoch = self._sampler.forget.epoch
            self._train_step()
            last = self.state.global_step == self.state.max_steps
            over = self._sampler.forget.epoch > epoch
            if over or last or self.control.should_epoch_stop:
                self.control = handler.on_epoch_end(args, self.state, self.control)
            self._log_evaluate_save()
            if self.control.should_training_stop:
                break
            if over:
                self.control = handler.on_epoch_begin(args, self.state, self.control)
        return self._end()

    def _begin(self) -> None:
        self._sampler = self._make_sampler()
        self.optimizer = self.lr_scheduler = None
        self.create_optimizer()
        steps = self.args.max_steps
        if steps <= 0:
            rows = self.args.num_train_epochs * len(self._rows["forget"])
            steps = math.ceil(rows / self.args.rows_per_step)
        self.create_scheduler(num_training_steps=steps)
        self.state = TrainerState()
        self.state.max_steps = steps
        self.state.num_train_epochs = math.ceil(self.args.num_train_epochs)
        self.state.train_batch_size = self.args.per_device_train_batch_size
        self.state.compute_steps(self.args, steps)
        self.state.is_local_process_zero = self.state.is_world_process_zero = True
        self.history.clear()
        self._logged = 0
        set_seed(self.args.seed)
        clear_unfinished(self._folder)

    def _train_step(self) -> None:
        args, handler, optimizer = self.args, self.callback_handler, self.optimizer
        self.control = handler.on_step_begin(args, self.state, self.control)
        forget, retain = next(self._sampler)
        optimizer.zero_grad()
        parts: list[dict[str, Tensor]] = []
        size = args.per_device_train_batch_size
        for start in range(0, args.rows_per_step, size):
            if start:
                self.control = handler.on_substep_end(args, self.state, self.control)
            parts.append(
                accumulate(
                    self._base,
                    self._reference,
                    optimizer,
                    self._batch(forget[start : start + size]),
                    self._batch(retain[start : start + size]),
                    forget_loss=args.chosen_method.forget_loss,
                    totals=(totals_of(forget), totals_of(retain)),
                )
            )
        if args.max_grad_norm > 0:
            optimizer.aggregate()
            clip_grad_norm_(self._base.parameters(), args.max_grad_norm)
        self.control = handler.on_pre_optimizer_step(args, self.state, self.control)
        optimizer.step()
        self.control = handler.on_optimizer_step(args, self.state, self.control)
        rate = float(optimizer.param_groups[0]["lr"])
        self.lr_scheduler.step()
        losses = {name: sum(float(part[name]) for part in parts) for name in OBJECTIVES}
        self.history.append(record_of(self.state.global_step, rate, losses, optimizer))
        self._tokens += sum(len(row.ids) for row in (*forget, *retain))
        self.state.global_step += 1
        drawn = self.state.global_step * args.rows_per_step
        self.state.epoch = drawn / len(self._rows["forget"])
        self.control = handler.on_step_end(args, self.state, self.control)

    def _log_evaluate_save(self) -> None:
        handler = self.callback_handler
        if self.control.should_log and self._logged < len(self.history):
            self.log(self._means())
        if self.control.should_evaluate:
            better = self._is_best(self.evaluate())
            if self.args.save_strategy == SaveStrategy.BEST:
                self.control.should_save = better
        if self.control.should_save and self.stopped_because is None:
            self._save_checkpoint()
            self.control = handler.on_save(self.args, self.state, self.control)

    def _means(self) -> dict[str, float]:
        """What the steps since the last log did, on average."""
        some = self.history[self._logged :]

        def mean(values: Sequence[float]) -> float:
            return sum(values) / len(values)

        logs = {"loss": mean([sum(record.losses.values()) for record in some])}
        for name in OBJECTIVES:
            logs |= {
                f"{name}_loss": mean([record.losses[name] for record in some]),
                f"norm_{name}": mean([record.norms[name] for record in some]),
                f"weight_{name}": mean([record.weights[name] for record in some]),
                f"conflict_{name}": mean([record.conflicts.get(name, False) for record in some]),
            }
        for i, j in pairs():
            a, b = OBJECTIVES[i], OBJECTIVES[j]
            logs[f"cosine_{a}_{b}"] = mean([record.cosines[f"{a}·{b}"] for record in some])
        now = time.perf_counter()
        logs |= {
            "pareto_gap": mean([record.pareto_gap for record in some]),
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
            self._load_best_model()
        write_history(self.history, self._folder / "history.jsonl")
        self.create_model_card()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
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
        rows = {role: self._rows[name] for name, role in _evaluated(self._rows).items()}
        if eval_dataset is not None:
            rows = {
                role: encode_records(
                    _records(data, _role(role)), self._chat, max_length=self.args.max_length
                ).rows
                for role, data in eval_dataset.items()
            }
        if not rows:
            raise UsageError(
                "eval_dataset must hold a set 'forget' or 'retain', but there is none: give one to "
                "the trainer or to evaluate()."
            )
        losses: dict[str, float] = {}
        with models.in_evaluation_mode(self._base):
            if "forget" in rows:
                losses["forget"] = self._evaluate_forget(rows["forget"])
            if "retain" in rows:
                losses["kl"], losses["retain"] = self._evaluate_retain(rows["retain"])
        metrics = {f"{metric_key_prefix}_{name}_loss": loss for name, loss in losses.items()}
        metrics[f"{metric_key_prefix}_loss"] = sum(losses.values())
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _evaluate_forget(self, rows: Sequence[Tokens]) -> float:
        method, totals = self.args.chosen_method, totals_of(rows)
        parts = [
            forget_side(self._base, self._reference, batch, method.forget_loss, totals).double()
            for batch in self._eval_batches(rows)
        ]
        return float(torch.stack(parts).sum())

    def _evaluate_retain(self, rows: Sequence[Tokens]) -> tuple[float, float]:
        totals = totals_of(rows)
        parts = [
            torch.stack(retain_side(self._base, self._reference, batch, totals)).double()
            for batch in self._eval_batches(rows)
        ]
        kl, retain = torch.stack(parts).sum(0).tolist()
        return kl, retain

    def _eval_batches(self, rows: Sequence[Tokens]) -> list[Batch]:
        size = self.args.per_device_eval_batch_size
        return [self._batch(rows[start : start + size]) for start in range(0, len(rows), size)]

    def _is_best(self, metrics: Mapping[str, float]) -> bool:
        name = self.args.metric_for_best_model
        if name is None:
            return False
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name not in metrics:
            raise UsageError(
                f"metric_for_best_model must be one of {', '.join(metrics)}, but got {name!r}."
            )
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
        with complete(folder) as stage:
            checkpoint.save_weights(self._base, self._wrapped, stage)
            self.processing_class.save_pretrained(stage)
            training = {
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.lr_scheduler.state_dict(),
                "sampler": self._sampler.state_dict(),
                "history": [asdict(record) for record in self.history],
                "logged": self._logged,
                "random": checkpoint.random_state(),
            }
            checkpoint.save_tree(training, stage, _TRAINING)
            self.state.save_to_json(str(stage / _STATE))
            checkpoint.describe(stage, self.about)
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
        state = checkpoint.load_tree(folder, _TRAINING)
        self._sampler.load_state_dict(state["sampler"])
        checkpoint.load_weights(self._base, self._wrapped, folder)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])
        self.history[:] = [StepRecord(**record) for record in state["history"]]
        self._logged = state["logged"]
        steps = self.state.max_steps
        self.state = TrainerState.load_from_json(str(folder / _STATE))
        self.state.max_steps = steps
        self.state.compute_steps(self.args, steps)
        checkpoint.set_random_state(state["random"])

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint).name
        checkpoint.load_weights(self._base, self._wrapped, self._folder / best)

    # ---- what is left

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model, or its adapter, and the tokenizer, for `from_pretrained`."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_weights(self._base, self._wrapped, folder)
        self.processing_class.save_pretrained(folder)

    def export(self, output_dir: str | Path) -> None:
        """Writes the whole model as safetensors, an adapter merged into it, and the tokenizer.

        The trainer's own model stays as it is; to merge takes the memory of a second one.
        """
        model = self._base
        if self._wrapped is not None:
            model = copy.deepcopy(self._wrapped).merge_and_unload()
        models.save(model, self.processing_class, Path(output_dir))

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Writes README.md into `output_dir`, see `mollm.model_card`."""
        (self._folder / "README.md").write_text(self.model_card(), encoding="utf-8")

    def model_card(self) -> str:
        """Data with hashes, settings, and the weights of every step, as Markdown."""
        return model_card(
            base_model=self._base.name_or_path or type(self._base).__name__,
            data=self._data,
            settings={
                **self.args.told(),
                "adapter": self.about["adapter"],
                "steps": self.state.global_step,
            },
            history=self.history,
            versions=machine.versions("peft"),
            notes=self.notes,
        )


def _records(data: Data, role: Role) -> list[Record]:
    if isinstance(data, Mapping):
        options: dict[str, Any] = dict(data)
        if "path" not in options:
            raise UsageError(
                f"the {role} data must be given by a path, but got only "
                f"{', '.join(options) or 'nothing'}: add path."
            )
        try:
            return load_records(options.pop("path"), role=role, **options)
        except TypeError as error:
            raise UsageError(
                f"the {role} data must be given by path, schema, prompt_field, answer_field, "
                f"config and split, but got {', '.join(options)}."
            ) from error
    if isinstance(data, Sequence) and not isinstance(data, str):
        if not data:
            raise UsageError(f"the {role} data must hold at least one row, but it holds none.")
        return list(data)
    return load_records(data, role=role)


def _role(name: str) -> Role:
    if name == "forget":
        return "forget"
    if name == "retain":
        return "retain"
    raise UsageError(f"eval_dataset must hold 'forget' and 'retain' alone, but got {name!r}.")


def _eval_records(
    eval_dataset: Mapping[str, Data] | None, args: MOLLMConfig
) -> dict[str, list[Record]]:
    if not eval_dataset:
        if args.eval_strategy != "no":
            raise UsageError(
                f"eval_dataset must be given for the eval_strategy {args.eval_strategy.value}, but "
                "got none: give sets to forget and to retain."
            )
        return {}
    return {f"eval {name}": _records(data, _role(name)) for name, data in eval_dataset.items()}


def _evaluated(names: Mapping[str, Any]) -> dict[str, str]:
    return {name: name.removeprefix("eval ") for name in names if name.startswith("eval ")}


def _all_notes(encoded: Any) -> list[str]:
    return [note for each in encoded for note in each.notes]


def _adapted(model: PreTrainedModel, config: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    if not isinstance(config, LoraConfig) or config.use_dora:
        raise UsageError(
            f"peft_config must be a LoraConfig without DoRA, but got {type(config).__name__}."
        )
    tied = model.config.tie_word_embeddings
    wrapped = get_peft_model(model, copy.deepcopy(config))
    layer = models.head(model)
    adapted = hasattr(layer, "get_delta_weight")
    if adapted and config.lora_dropout > 0:
        raise UsageError(
            f"lora_dropout must be 0 where the head is adapted, but got {config.lora_dropout}: "
            "leave the head out of target_modules, or the dropout."
        )
    if tied and (adapted or hasattr(layer, "modules_to_save")):
        raise UsageError(
            "an adapter must leave the head alone where it shares its matrix with the embeddings, "
            f"but got target_modules {config.target_modules} and modules_to_save "
            f"{config.modules_to_save}: take it out."
        )
    return wrapped


def _checkpoint_activations(model: PreTrainedModel, options: Mapping[str, Any] | None) -> None:
    # Releases before 5.20 know it by the older name alone.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    # Reentrant checkpoints pass no gradient on to adapters behind an input that asks for none.
    model.enable_input_require_grads()
