"""How figures are read: what each is about, and which way is good."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mollm.evaluation.registry import GROUPS

if TYPE_CHECKING:
    from mollm.evaluation.summary import Estimate

THEMES = ("forgotten", "kept", "privacy", "fluency", "judged")
UP, DOWN = "↑", "↓"
_ALONE = {
    "exact_memorization": ("forgotten", DOWN),
    "extraction_strength": ("forgotten", DOWN),
    "forget_quality": ("forgotten", UP),
    "model_utility": ("kept", UP),
    "privleak": ("privacy", "→ 0"),
    **dict.fromkeys(
        ("verbmem_f", "knowmem_f", "wmdp_bio", "wmdp_cyber", "wmdp_chem"), ("forgotten", DOWN)
    ),
    **dict.fromkeys((f"rwku_forget_{level}" for level in (1, 2, 3)), ("forgotten", DOWN)),
    "lume_task": ("forgotten", UP),
    **{
        f"lume_{task}_{split}_{kind}": how
        for split, how in (("forget", ("forgotten", DOWN)), ("retain", ("kept", UP)))
        for task in (1, 2, 3)
        for kind in ("sc", "qa")
    },
    **dict.fromkeys(("knowmem_r", "mmlu", "rwku_neighbor_1", "rwku_neighbor_2"), ("kept", UP)),
}
_FORGOTTEN = {"probability": DOWN, "rouge_l": DOWN, "truth_ratio": UP, "kl": ""}
_KEPT = {"probability": UP, "rouge_l": UP, "truth_ratio": UP, "kl": DOWN}
_FLUENCY = ("repetition", "perplexity")


@dataclass(frozen=True)
class Reading:
    """What a figure is about, and where it should go."""

    theme: str
    """One of THEMES."""
    good: str
    """UP, DOWN, "→ 0" or "→ 0.5" for a figure that has a best value, "" where no way is good."""
    to_original: bool = False
    """Whether it is a distance from the original, whose own is 0: nothing can be better."""

    def verdict(self, before: float, after: float) -> str:
        """Whether a figure became "better" or "worse"; "" where neither."""
        if not self.good or self.to_original or before == after:
            return ""
        if self.good in (UP, DOWN):
            better = (after > before) == (self.good == UP)
        else:
            best = float(self.good.removeprefix("→ "))
            better = abs(after - best) < abs(before - best)
        return "better" if better else "worse"


def reading_of(name: str) -> Reading:
    """How the figure of that name is read; one of a judge is better where it is less."""
    if name in _ALONE:
        return Reading(*_ALONE[name])
    if name.endswith("_relative"):
        return Reading(reading_of(name.removesuffix("_relative")).theme, "→ 0")
    if name.startswith("mia_"):
        return Reading("privacy", "→ 0.5")
    group = next((g for g in GROUPS if name.startswith(f"{g}_")), "")
    score = name.removeprefix(f"{group}_")
    if score in _FLUENCY:
        return Reading("fluency", DOWN)
    theme, ways = ("forgotten", _FORGOTTEN) if group == "forget" else ("kept", _KEPT)
    if score not in ways:
        return Reading("judged", DOWN)
    return Reading(theme, ways[score], to_original=score == "kl")


def verdict_of(name: str, before: Estimate | None, after: Estimate | None) -> str:
    """Whether a result is "better" or "worse" than the original, beyond its interval; "" where
    neither, or where one was not measured."""
    if before is None or after is None or after.low <= before.value <= after.high:
        return ""
    return reading_of(name).verdict(before.value, after.value)


def by_theme(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of figures by what they are about, in the order of THEMES; themes without any left
    out."""
    found: dict[str, list[str]] = {theme: [] for theme in THEMES}
    for name in names:
        found[reading_of(name).theme].append(name)
    return {theme: some for theme, some in found.items() if some}
