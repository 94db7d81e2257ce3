"""Metrics of unlearning, and `evaluate`, which computes them for a model."""

from mollm.evaluation.benchmarks import general_benchmarks
from mollm.evaluation.evaluate import evaluate
from mollm.evaluation.judges import ClassifierJudge, GenerativeJudge, Judge
from mollm.evaluation.records import Record, read_records
from mollm.evaluation.suite import Row, Suite, load_suite, load_tofu
from mollm.evaluation.summary import Estimate, Evaluation, summarize

__all__ = [
    "ClassifierJudge",
    "Estimate",
    "Evaluation",
    "GenerativeJudge",
    "Judge",
    "Record",
    "Row",
    "Suite",
    "evaluate",
    "general_benchmarks",
    "load_suite",
    "load_tofu",
    "read_records",
    "summarize",
]
