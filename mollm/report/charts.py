"""Curves as static SVG, in the colours of the page around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 340, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 10, 26
_MOST_POINTS = 240
_TICKS = 4
_ROOM = 0.06
_LETTER = 6
"""The width of a letter of 11 pixels, about."""


@dataclass(frozen=True)
class Series:
    """A curve: a value for each step, None where it was not finite."""

    name: str
    values: Sequence[float | None]
    colour: str
    """The name of a colour of the page, such as forget."""


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    least: float | None = None,
    most: float | None = None,
    short: bool = False,
    first: int = 1,
) -> Markup:
    """Curves over the steps of a run; of a long run the means of as many steps as need be.

    Args:
        title: What it shows, for those who do not see it.
        series: The curves, of one or more values each.
        least: A value that the axis reaches at least down to.
        most: A value that it reaches at least up to.
        short: Whether it is half as high, and its steps are those of the chart below it.
        first: The number of the first step.
    """
    height = _HEIGHT // 2 if short else _HEIGHT
    bottom = _TOP if short else _BOTTOM
    curves = [_thinned(each.values) for each in series]
    found = [v for curve in curves for _, v in curve]
    low = min([*found, *([] if least is None else [least])], default=0.0)
    high = max([*found, *([] if most is None else [most])], default=1.0)
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    room = _ROOM * (high - low)
    low = low if low in (least, 0.0) else low - room
    high = high if high == most else high + room
    last: int = max(2, max((len(each.values) for each in series), default=1))

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (step - 1) / (last - 1)

    def y(value: float) -> float:
        return _TOP + (height - _TOP - bottom) * (high - value) / (high - low)

    parts = []
    for tick in _ticks(low, high, 2 if short else _TICKS):
        strong = " zero" if tick == 0 else ""
        parts.append(
            f'<line class="grid{strong}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" '
            f'y2="{y(tick):.1f}"/><text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" '
            f'text-anchor="end">{tick:g}</text>'
        )
    for step in [] if short else _steps(last):
        parts.append(_step_label(x(step), height, step, last, first))
    for each, curve in zip(series, curves, strict=True):
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in curve)
        if len(curve) == 1:
            ((at, value),) = curve
            parts.append(
                f'<circle class="{each.colour}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="3"/>'
            )
        elif curve:
            parts.append(f'<polyline class="{each.colour}" points="{points}"/>')
    return _svg(title, parts, height)


def raster_chart(title: str, rows: Sequence[Series]) -> Markup:
    """A line of marks for each series, as strong as its value, from 0 to 1."""
    height = 26 * len(rows) + _BOTTOM
    left = max([_LEFT, *(_LETTER * len(row.name) + 10 for row in rows)])
    last = max(2, max((len(row.values) for row in rows), default=1))
    parts = []
    for number, row in enumerate(rows):
        top = 26 * number + 4
        parts.append(
            f'<text x="{left - 6}" y="{top + 13}" text-anchor="end">{escape(row.name)}</text>'
            f'<rect class="track" x="{left}" y="{top}" '
            f'width="{_WIDTH - left - _RIGHT}" height="18"/>'
        )
        cells = _thinned(row.values, 80)
        width = (_WIDTH - left - _RIGHT) / max(1, len(cells))
        for place, (_, value) in enumerate(cells):
            if value > 0:
                parts.append(
                    f'<rect class="mark {row.colour}" x="{left + place * width:.1f}" '
                    f'y="{top}" width="{max(1.0, width):.1f}" height="18" '
                    f'fill-opacity="{0.25 + 0.75 * min(1, value):.2f}"/>'
                )
    for step in _steps(last):
        at = left + (_WIDTH - left - _RIGHT) * (step - 1) / (last - 1)
        parts.append(_step_label(at, height, step, last))
    return _svg(title, parts, height)


def _step_label(x: float, height: int, step: int, last: int, first: int = 1) -> str:
    """The last one ends where the axis does: its middle there would be cut off."""
    anchor = "end" if step == last else "middle"
    return f'<text x="{x:.1f}" y="{height - 8}" text-anchor="{anchor}">{step - 1 + first}</text>'


@dataclass(frozen=True)
class Dot:
    """A point of a scatter chart, both of its places from 0 to 1."""

    x: float
    y: float
    colour: str
    title: str
    """What it is, shown where the pointer rests on it."""
    strong: bool = False


def scatter_chart(title: str, dots: Sequence[Dot], front: Sequence[Dot] = ()) -> Markup:
    """Points in the unit square, and a line through those that none beats in both.

    Args:
        title: What it shows.
        dots: The points.
        front: Those that the line goes through, from left to right.
    """
    size = _WIDTH

    def x(value: float) -> float:
        return _LEFT + (size - _LEFT - 2 * _RIGHT) * value

    def y(value: float) -> float:
        return _TOP + (size - _TOP - _BOTTOM) * (1 - value)

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(
            f'<line class="grid" x1="{x(0):.1f}" x2="{x(1):.1f}" y1="{y(tick):.1f}" '
            f'y2="{y(tick):.1f}"/><text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" '
            f'text-anchor="end">{tick:.0%}</text><text x="{x(tick):.1f}" y="{size - 8}" '
            f'text-anchor="middle">{tick:.0%}</text>'
        )
    if len(front) > 1:
        points = " ".join(f"{x(dot.x):.1f},{y(dot.y):.1f}" for dot in front)
        parts.append(f'<polyline class="front" points="{points}"/>')
    for dot in dots:
        parts.append(
            f'<circle class="{dot.colour}" cx="{x(dot.x):.1f}" cy="{y(dot.y):.1f}" '
            f'r="{6 if dot.strong else 3.5}"><title>{escape(dot.title)}</title></circle>'
        )
    return _svg(title, parts, size)


@dataclass(frozen=True)
class Curve:
    """A curve over a logarithmic axis."""

    name: str
    points: Sequence[tuple[float, float]]
    """(place, share): the place above 0, the share drawn between 0 and 1."""
    colour: str
    dashed: bool = False


def log_chart(title: str, curves: Sequence[Curve], *, below: str) -> Markup:
    """Shares over places, which are a factor apart.

    Args:
        title: What it shows.
        curves: The curves, of at least one point in all.
        below: What the places are.
    """
    places = sorted({place for curve in curves for place, _ in curve.points})
    reach = math.log(places[-1] / places[0]) or 1.0
    height = _HEIGHT + 16
    bottom = _BOTTOM + 16

    def x(place: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 2 * _RIGHT) * math.log(place / places[0]) / reach

    def y(share: float) -> float:
        return _TOP + (height - _TOP - bottom) * (1 - min(max(share, 0.0), 1.0))

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" '
            f'y2="{y(tick):.1f}"/><text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" '
            f'text-anchor="end">{tick:.0%}</text>'
        )
    parts += [
        f'<text x="{x(place):.1f}" y="{height - 24}" text-anchor="middle">{place:g}</text>'
        for place in places
    ]
    parts.append(
        f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{height - 6}" text-anchor="middle">'
        f"{escape(below)}</text>"
    )
    for curve in curves:
        points = [(x(place), y(share)) for place, share in curve.points]
        if len(points) == 1:
            ((across, down),) = points
            parts.append(
                f'<circle class="{curve.colour}" cx="{across:.1f}" cy="{down:.1f}" r="3"/>'
            )
        elif points:
            line = " ".join(f"{across:.1f},{down:.1f}" for across, down in points)
            dashes = " dashed" if curve.dashed else ""
            parts.append(f'<polyline class="{curve.colour}{dashes}" points="{line}"/>')
    return _svg(title, parts, height)


def _svg(title: str, parts: Sequence[str], height: int) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _thinned(values: Sequence[float | None], most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """(step from 1, value), of more than `most` the means of equal parts."""
    size = max(1, math.ceil(len(values) / most))
    points = []
    for start in range(0, len(values), size):
        part = [v for v in values[start : start + size] if v is not None and math.isfinite(v)]
        if part:
            end = min(start + size, len(values))
            points.append(((start + 1 + end) / 2, sum(part) / len(part)))
    return points


def _ticks(low: float, high: float, count: int = _TICKS) -> list[float]:
    """About so many round values between two others."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]


def _steps(last: int) -> list[int]:
    """Steps to name on the axis: the first, the last and round ones between."""
    inner = [int(t) for t in _ticks(1, last) if t == int(t) and 1 < t < last]
    gap = last / 8
    return [1, *(t for t in inner if t - 1 > gap and last - t > gap), last]
