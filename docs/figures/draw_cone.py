"""Draws direction.svg: two conflicting gradients, their dual cone, the common descent direction.

    python docs/figures/draw_cone.py

A step d descends on objective k if g_k · d < 0: if it makes an angle of less than 90° with −g_k.
Every colour has a contrast of at least 3 with a white page and with a dark one, so that one file
serves both.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from mollm_ops import upgrad_weights

WIDTH, HEIGHT = 720, 292
ORIGIN = (296.0, 248.0)
UNIT = 150.0  # pixels of a vector of length 1
FORGET = (1.25, 10.0)  # length and angle in degrees of −g_1
RETAIN = (0.75, 150.0)

STYLE = """
text { font: 600 16px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
.note { font-weight: 400; font-size: 14px; }
.forget { color: #e5484d; } .retain { color: #3b82f6; } .common { color: #1f9d55; }
.sum { color: #7d8590; } .line { fill: none; stroke: currentColor; stroke-linecap: round; }
.tip, text { fill: currentColor; } .cone { fill: currentColor; fill-opacity: 0.18; }
.edge { stroke-width: 1.5; stroke-opacity: 0.7; }
"""


def at(length: float, angle: float) -> tuple[float, float]:
    """Pixels of a vector's tip."""
    radians = math.radians(angle)
    return (
        ORIGIN[0] + UNIT * length * math.cos(radians),
        ORIGIN[1] - UNIT * length * math.sin(radians),
    )


def line(length: float, angle: float, name: str, style: str = 'stroke-width="4"') -> str:
    """A straight line from the origin."""
    (x0, y0), (x, y) = ORIGIN, at(length, angle)
    return f'<path class="line {name}" {style} d="M{x0:.1f} {y0:.1f} L{x:.1f} {y:.1f}"/>'


def arrow(length: float, angle: float, name: str, style: str = 'stroke-width="4"') -> str:
    """A vector with its head."""
    x, y = at(length, angle)
    return (
        line(length - 11 / UNIT, angle, name, style)
        + f'<path class="tip {name}" transform="translate({x:.1f} {y:.1f}) rotate({-angle:.1f})" '
        'd="M0 0 L-16 7 L-12 0 L-16 -7 Z"/>'
    )


def label(x: float, y: float, words: str, name: str, anchor: str = "start") -> str:
    """A line of text."""
    return f'<text class="{name}" x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{words}</text>'


def polar(vector: torch.Tensor) -> tuple[float, float]:
    """Length and angle in degrees of a vector in the plane."""
    x, y = vector.tolist()
    return math.hypot(x, y), math.degrees(math.atan2(y, x))


def cone() -> str:
    """The steps at less than 90° to both −g_1 and −g_2."""
    low, high, radius = RETAIN[1] - 90, FORGET[1] + 90, 1.5
    (x0, y0), (x1, y1), (x2, y2) = ORIGIN, at(radius, low), at(radius, high)
    r = radius * UNIT
    sector = (
        f'<path class="cone common" d="M{x0:.1f} {y0:.1f} L{x1:.1f} {y1:.1f} '
        f'A{r:.1f} {r:.1f} 0 0 0 {x2:.1f} {y2:.1f} Z"/>'
    )
    return sector + "".join(line(radius, angle, "edge common", "") for angle in (low, high))


def draw() -> str:
    """The SVG; the common direction is that of the package's own solver."""
    wanted = torch.tensor(
        [
            [length * math.cos(math.radians(angle)), length * math.sin(math.radians(angle))]
            for length, angle in (FORGET, RETAIN)
        ],
        dtype=torch.float64,
    )  # −g_k
    weights = upgrad_weights(wanted @ wanted.T).weights
    common = polar(weights @ wanted)
    total = polar(wanted.sum(0))
    drawn = 1.12  # only its direction counts here
    sum_x, sum_y = at(*total)
    forget_x, forget_y = at(*FORGET)
    retain_x, retain_y = at(*RETAIN)
    common_x, common_y = at(drawn, common[1])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img">',
        "<title>Two gradients that disagree, the cone of the steps that descend on both, and the "
        "common descent direction inside it; the sum of the two lies outside.</title>",
        f"<style>{STYLE}</style>",
        cone(),
        arrow(*total, "sum", 'stroke-width="3" stroke-dasharray="2 8"'),
        arrow(*FORGET, "forget"),
        arrow(*RETAIN, "retain"),
        arrow(drawn, common[1], "common", 'stroke-width="5"'),
        f'<circle class="tip sum" cx="{ORIGIN[0]}" cy="{ORIGIN[1]}" r="4"/>',
        label(forget_x + 10, forget_y + 2, "−g₁: forget this", "forget"),
        label(retain_x - 10, retain_y - 4, "−g₂: keep that", "retain", "end"),
        label(sum_x + 10, sum_y - 4, "their sum", "sum"),
        label(sum_x + 10, sum_y + 15, "forgets, and damages what must stay", "sum note"),
        label(common_x - 90, common_y - 12, "common descent", "common", "end"),
        label(common_x - 90, common_y + 7, "forgets, and improves the rest", "common note", "end"),
        label(at(1.5, 60)[0] + 12, at(1.5, 60)[1] + 2, "the dual cone", "common"),
        label(at(1.5, 60)[0] + 12, at(1.5, 60)[1] + 21, "every step in here descends on both",
              "common note"),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("direction.svg").write_text(draw(), encoding="utf-8")
