from pathlib import Path

import pytest

from mollm.cli import _parser
from mollm.demo.settings import DemoSettings
from mollm.errors import UsageError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps must be at least 1, but got 0"),
        ({"lr": 0.0}, r"lr must be a positive number, but got 0\.0"),
        ({"lr": float("nan")}, "lr must be a positive number"),
        ({"seed": -1}, "seed must be from 0 to 4294967295, but got -1"),
        ({"seed": 2**32}, "seed must be from 0 to"),
        ({"device": "cuda:1"}, "device must be cpu or cuda, but got 'cuda:1'"),
        ({"method": "up"}, "method must be one of mollm, dual"),
    ],
)
def test_settings_out_of_range_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        DemoSettings(**options)


def test_the_command_line_and_the_settings_have_the_same_defaults():
    given = vars(_parser().parse_args(["demo"]))
    given.pop("run")
    assert DemoSettings(**given) == DemoSettings()


def test_the_command_makes_the_same_settings():
    settings = DemoSettings(
        steps=3, lr=3e-6, seed=2, forget=("New Zealand", "Peru"), method="sum", out=Path("a b")
    )
    assert DemoSettings().command() == "mollm demo"
    assert settings.command() == (
        "mollm demo --steps 3 --lr 3e-06 --seed 2 --forget 'New Zealand,Peru' --method sum "
        "--out 'a b'"
    )
