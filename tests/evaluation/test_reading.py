import pytest

pytest.importorskip("transformers")

from mollm.evaluation.reading import THEMES, by_theme, reading_of
from mollm.evaluation.registry import figures


def test_every_figure_has_a_theme_and_all_but_one_a_way():
    names = [figure.name for figure in figures(["toxicity"])]
    themes = by_theme(names)
    assert list(themes) == list(THEMES)
    assert sorted(name for some in themes.values() for name in some) == sorted(names)
    assert themes["judged"] == [n for n in names if "toxicity" in n]
    assert [n for n in names if not reading_of(n).good] == ["forget_kl"]


@pytest.mark.parametrize(
    ("name", "before", "after", "verdict"),
    [
        ("forget_probability", 0.9, 0.1, "better"),
        ("retain_probability", 0.9, 0.1, "worse"),
        ("world_facts_truth_ratio", 0.2, 0.3, "better"),
        ("forget_truth_ratio", 0.2, 0.3, "better"),
        ("retain_kl", 0.0, 0.1, ""),
        ("forget_kl", 0.0, 0.1, ""),
        ("mia_loss", 0.9, 0.4, "better"),
        ("mia_min_k", 0.6, 0.1, "worse"),
        ("privleak", -50.0, 20.0, "better"),
        ("retain_perplexity", 5.0, 9.0, "worse"),
        ("model_utility", 0.5, 0.5, ""),
        ("forget_toxicity_rate", 0.5, 0.1, "better"),
    ],
)
def test_which_way_is_good(name, before, after, verdict):
    assert reading_of(name).verdict(before, after) == verdict
