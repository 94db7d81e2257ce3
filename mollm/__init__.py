"""Multi-objective unlearning for language models: `from mollm import MOLLMOptimizer`."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# transformers fetches kernels from the hub, which are code, for a model whose config asks for it.
# It reads this once, where it is imported: before any other module of this package.
os.environ.setdefault("USE_HUB_KERNELS", "NO")

if TYPE_CHECKING:
    from mollm.data import Record, load_records
    from mollm.errors import UsageError
    from mollm.evaluation.preview import preview
    from mollm.models.blocks import find_blocks
    from mollm.optim.optimizer import MOLLMOptimizer
    from mollm.optim.step_report import StepReport
    from mollm.training.config import MOLLMConfig
    from mollm.training.objectives import Objectives
    from mollm.training.reference_model import CopyReference
    from mollm.training.trainer import MOLLMTrainer

__version__ = "0.1.0"

__all__ = [
    "CopyReference",
    "MOLLMConfig",
    "MOLLMOptimizer",
    "MOLLMTrainer",
    "Objectives",
    "Record",
    "StepReport",
    "UsageError",
    "find_blocks",
    "load_records",
    "preview",
]

_HOME = {
    "CopyReference": "mollm.training.reference_model",
    "MOLLMConfig": "mollm.training.config",
    "MOLLMOptimizer": "mollm.optim.optimizer",
    "MOLLMTrainer": "mollm.training.trainer",
    "Objectives": "mollm.training.objectives",
    "Record": "mollm.data",
    "StepReport": "mollm.optim.step_report",
    "UsageError": "mollm.errors",
    "find_blocks": "mollm.models.blocks",
    "load_records": "mollm.data",
    "preview": "mollm.evaluation.preview",
}


def __getattr__(name: str) -> Any:
    # Loaded when asked for: Torch takes seconds, and `mollm --help` needs none of it.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
