"""Multi-objective unlearning for language models: `from mollm import MOLLMOptimizer`."""

from typing import TYPE_CHECKING, Any

from mollm.diagnostics import StepReport
from mollm.optimizer import MOLLMOptimizer

if TYPE_CHECKING:
    from mollm.trainer import MOLLMTrainer
    from mollm.trainer_config import MOLLMConfig

__version__ = "0.1.0"

__all__ = ["MOLLMConfig", "MOLLMOptimizer", "MOLLMTrainer", "StepReport"]


def __getattr__(name: str) -> Any:
    # These two need transformers, whose import takes seconds.
    if name == "MOLLMTrainer":
        from mollm.trainer import MOLLMTrainer

        return MOLLMTrainer
    if name == "MOLLMConfig":
        from mollm.trainer_config import MOLLMConfig

        return MOLLMConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
