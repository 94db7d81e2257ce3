import pytest

pytest.importorskip("jinja2")

from mollm.report.differences import differences


@pytest.mark.parametrize(
    ("before", "after"),
    [("a b c", "a x c"), ("", "new"), ("old", ""), ("same words", "same  words"), ("a", "a b")],
)
def test_nothing_is_lost(before, after):
    left, right = differences(before, after)
    assert "".join(p.text for p in left) == before
    assert "".join(p.text for p in right) == after
    kept = [" ".join(p.text.split()) for p in left if not p.differs]
    assert kept == [" ".join(p.text.split()) for p in right if not p.differs]


def test_what_only_one_says_is_marked():
    left, right = differences("It is Tokyo.", "It is a city.")
    assert [(p.text, p.differs) for p in left] == [("It is ", False), ("Tokyo.", True)]
    assert [(p.text, p.differs) for p in right] == [("It is ", False), ("a city.", True)]
