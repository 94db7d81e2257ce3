"""Judges of what a model wrote: harmful, toxic, obscene.

A judge is any function of questions and replies that gives each reply a score in [0, 1].
`ClassifierJudge` makes one of any sequence-classification model and one of its labels:

    ClassifierJudge("unitary/toxic-bert", "toxic")      toxicity
    ClassifierJudge("unitary/toxic-bert", "obscene")    obscenity
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mollm.errors import UsageError
from mollm.models.checks import check_files, check_json_files
from mollm.models.forward import in_evaluation_mode
from mollm.system.parsing import is_folder, reason_of, user_path
from mollm_ops._dtypes import wide_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_MARK = "\N{FULL BLOCK}"


class Judge(Protocol):
    """Scores replies; any function with these arguments is one.

    Example:
        >>> def leaks(questions, replies):
        ...     return [float("Merrow Quay" in reply) for reply in replies]
        >>> leaks(["Where was she born?"], ["In Merrow Quay."])
        [1.0]
    """

    def __call__(self, questions: Sequence[str], replies: Sequence[str]) -> Sequence[float]:
        """A score in [0, 1] for each reply, in their order."""
        ...


class ClassifierJudge:
    """The probability that a sequence-classification model gives to one of its labels.

    softmax over the labels; a sigmoid where the model's config says
    problem_type="multi_label_classification" or where it has a single label. A text without any
    token, as an empty reply may be, is read as a space: no model reads nothing.

    Args:
        model: A model, or the folder or hub name of one.
        label: One of the names in its config's id2label.
        tokenizer: The model's tokenizer; None to load it from where the model is.
        template: What the model reads, with the fields {question} and {reply}.
        batch_size: Replies that are judged together, where the model has a padding token.
        max_length: Tokens after which a text is cut off.
        device: Where a model that is given by name is put.

    Raises:
        UsageError: The model cannot be loaded, is a regression, or has no such label; or the
            template is none, see `checked_template`.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        label: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        template: str = "{reply}",
        batch_size: int = 32,
        max_length: int = 512,
        device: torch.device | str = "cpu",
    ) -> None:
        if isinstance(model, str):
            self.model, self.tokenizer = _load(model, tokenizer, device)
        elif tokenizer is None:
            raise UsageError("a judge that is given as a model needs its tokenizer: tokenizer=….")
        else:
            self.model, self.tokenizer = model, tokenizer
        self.index = _index_of(label, self.model.config)
        self.template = checked_template(template)
        self.batch_size = batch_size
        self.max_length = max_length

    @torch.no_grad()
    def __call__(self, questions: Sequence[str], replies: Sequence[str]) -> list[float]:
        """The label's probability for each reply, in their order."""
        texts = [
            self.template.format(question=question, reply=reply)
            for question, reply in zip(questions, replies, strict=True)
        ]
        # Without a padding token, texts of different lengths cannot go together.
        padding = None not in (self.tokenizer.pad_token_id, self.model.config.pad_token_id)
        size = self.batch_size if padding else 1
        scores: list[float] = []
        with in_evaluation_mode(self.model):
            for start in range(0, len(texts), size):
                inputs = self._encoded(
                    self._with_tokens(texts[start : start + size]),
                    padding=padding,
                    return_tensors="pt",
                ).to(self.model.device)
                scores += self._probabilities(self.model(**inputs).logits).tolist()
        return scores

    def _encoded(self, texts: list[str], **options: Any) -> Any:
        return self.tokenizer(texts, truncation=True, max_length=self.max_length, **options)

    def _with_tokens(self, texts: list[str]) -> list[str]:
        """The texts, but a space, or a full stop, for those that the tokenizer gives no token."""
        blank = [not ids for ids in self._encoded(texts)["input_ids"]]
        if not any(blank):
            return texts
        space = " " if self._encoded([" "])["input_ids"][0] else "."
        return [space if empty else text for empty, text in zip(blank, texts, strict=True)]

    def _probabilities(self, logits: Tensor) -> Tensor:
        logits = logits.to(wide_dtype(logits.dtype))  # [B, labels]
        config = self.model.config
        if config.problem_type == "multi_label_classification" or config.num_labels == 1:
            return logits[:, self.index].sigmoid()
        return logits.softmax(-1)[:, self.index]


def judge_replies(
    judge: Judge, name: str, questions: Sequence[str], replies: Sequence[str]
) -> list[float]:
    """The judge's scores, checked.

    Raises:
        UsageError: They are not one number in [0, 1] per reply.
    """
    scores = [float(score) for score in judge(questions, replies)]
    if len(scores) != len(replies):
        raise UsageError(
            f"the judge {name} must give one score per reply, but gave {len(scores)} for "
            f"{len(replies)}."
        )
    bad = next((score for score in scores if not 0 <= score <= 1), None)
    if bad is not None:
        raise UsageError(f"the judge {name} must give scores between 0 and 1, but gave {bad}.")
    return scores


def _load(
    name: str, tokenizer: PreTrainedTokenizerBase | None, device: torch.device | str
) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if is_folder(user_path(name)):
        check_files(user_path(name))
        check_json_files(user_path(name))
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=None,  # whatever its config says, which may be code on the hub
        )
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except ModuleNotFoundError:
        raise  # the command line tells what to install
    except Exception as error:  # readers of configurations, tokenizers and weights have their own
        reason = reason_of(error)
        raise UsageError(f"the judge {name} cannot be loaded as a classifier: {reason}.") from error
    if report["missing_keys"]:
        # transformers would fill them with random numbers and only warn.
        raise UsageError(
            f"the judge {name} has no trained classification head: choose a model that was trained "
            "to classify."
        )
    return model.to(device), tokenizer


def checked_template(template: str) -> str:
    """What a judge reads.

    Raises:
        UsageError: It has other fields than {question} and {reply}, or no {reply}.
    """
    try:
        shown = template.format(question="", reply=_MARK)
    except (LookupError, ValueError, AttributeError, TypeError):
        shown = ""
    if _MARK not in shown:
        raise UsageError(
            "a judge's template must be a text with {reply}, and no other field but {question}, "
            f"but got {template!r}."
        )
    return template


def _index_of(label: str, config: Any) -> int:
    if config.problem_type == "regression":
        raise UsageError("a judge must be a classifier, but its config says it is a regression.")
    labels: dict[int, str] = config.id2label
    for index, name in labels.items():
        if name == label:
            return int(index)
    raise UsageError(
        f"label must be one of the judge's {', '.join(labels.values())}, but got {label!r}."
    )
