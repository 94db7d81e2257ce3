"""Multi-objective unlearning for language models: `from mollm import MOLLMOptimizer`."""

from mollm.diagnostics import StepReport
from mollm.optimizer import MOLLMOptimizer

__version__ = "0.1.0"

__all__ = ["MOLLMOptimizer", "StepReport"]
