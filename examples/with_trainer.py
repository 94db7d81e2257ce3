"""A Trainer subclass of transformers: one process, or several under torchrun.

torchrun --standalone --nproc-per-node 8 examples/with_trainer.py --model path/to/model
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from common import batches, load_model, options
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from mollm import MOLLMOptimizer


class Unlearning(Trainer):
    def create_optimizer(self, model: nn.Module | None = None) -> MOLLMOptimizer:
        params = [p for p in self.model.parameters() if p.requires_grad]
        # Kept apart: Accelerate wraps `self.optimizer`, which hides the objectives.
        self.mollm = self.optimizer = MOLLMOptimizer(params, lr=self.args.learning_rate)
        return self.mollm

    def get_train_dataloader(self) -> Iterator[Any]:
        args = self.args
        return batches(self.processing_class, args.device, args.process_index, args.world_size)

    def training_step(self, model: nn.Module, inputs: Any, *_: Any) -> Tensor:
        losses = model(*inputs)
        self.mollm.backward(losses, model)
        self.log({name: loss.item() for name, loss in losses.items()})
        return sum(losses.values()).detach()


class Report(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.is_world_process_zero:
            print(given["optimizer"].optimizer.last_step)


def main(argv: Sequence[str] | None = None) -> None:
    args = options(argv)
    settings = TrainingArguments(
        output_dir="runs/with_trainer",
        max_steps=args.steps,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        max_grad_norm=0,  # to clip, end training_step with self.mollm.aggregate()
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    model, tokenizer = load_model(args.model)
    Unlearning(model, settings, processing_class=tokenizer, callbacks=[Report()]).train()


if __name__ == "__main__":
    main()
