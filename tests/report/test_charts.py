import re

import pytest

pytest.importorskip("jinja2")

from mollm.report.charts import Curve, Series, line_chart, log_chart, raster_chart


def points(svg):
    pairs = re.findall(r'points="(.*?)"', svg)[0].split()
    return [tuple(map(float, pair.split(","))) for pair in pairs]


def test_larger_values_are_higher_and_later_steps_further_right():
    found = points(line_chart("t", [Series("a", [1.0, 3.0, 2.0], "kl")]))
    (x1, y1), (x2, y2), (x3, y3) = found
    assert x1 < x2 < x3
    assert y2 < y3 < y1
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)


def test_values_lie_on_the_axis_as_its_ticks_say():
    svg = line_chart("t", [Series("a", [0.0, 10.0, 5.0], "kl")], least=0, most=10)
    ticks = {
        float(t): float(y) - 4
        for y, t in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.-]+)<', svg)
    }
    for (_, y), value in zip(points(svg), (0.0, 10.0, 5.0), strict=True):
        assert y == pytest.approx(ticks[value], abs=0.11)


def test_long_runs_are_drawn_as_means():
    found = points(line_chart("t", [Series("a", [float(i % 2) for i in range(10_000)], "kl")]))
    assert len(found) <= 240
    assert len({y for _, y in found}) == 1


def test_gaps_and_constants_are_no_trouble():
    for values in ([None, 1.0, float("nan"), 2.0], [5.0, 5.0], [0.0], [], [None]):
        svg = line_chart("a & b", [Series("a", values, "kl")])
        assert "nan" not in svg
        assert 'aria-label="a &amp; b"' in svg


def test_marks_are_where_a_step_conflicted():
    svg = raster_chart("t", [Series("kl", [0.0, 1.0, 0.0, 0.5], "kl")])
    marks = re.findall(r'class="mark kl" x="([\d.]+)".*?fill-opacity="([\d.]+)"', svg)
    assert [opacity for _, opacity in marks] == ["1.00", "0.62"]
    assert float(marks[0][0]) < float(marks[1][0])


def test_places_a_factor_apart_are_as_far_apart_and_shares_lie_on_their_ticks():
    curves = [Curve("a", [(1, 0.25), (10, 1.4), (100, 0.5)], "kl", dashed=True)]
    svg = log_chart("t", curves, below="examples & rows")
    (x1, y1), (x10, y10), (x100, y100) = points(svg)
    assert x10 - x1 == pytest.approx(x100 - x10, abs=0.2)
    ticks = {t: float(y) - 4 for y, t in re.findall(r'y="([\d.]+)" text-anchor="end">(\d+%)<', svg)}
    assert y1 == pytest.approx(ticks["25%"], abs=0.11)
    assert y10 == pytest.approx(ticks["100%"], abs=0.11)  # not beyond the top
    assert y100 == pytest.approx(ticks["50%"], abs=0.11)
    assert 'class="kl dashed"' in svg
    assert "examples &amp; rows" in svg


def test_a_curve_of_one_point_is_a_dot():
    svg = log_chart("t", [Curve("a", [(3, 0.5)], "kl")], below="examples")
    assert "polyline" not in svg
    assert '<circle class="kl"' in svg
