import argparse
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mollm.system.options import add_options


@dataclass
class Settings:
    rows: int = field(default=0, metadata={"help": "rows of a step", "flag": "--rows-per-step"})
    rate: float | None = field(default=None, metadata={"help": "rate", "default": "1 / rows"})
    quick: bool = field(default=False, metadata={"help": "less of everything"})
    out: Path = field(default=Path("runs"), metadata={"help": "folder"})
    names: tuple[str, ...] = field(
        default=(), metadata={"help": "names", "type": lambda text: tuple(text.split(","))}
    )
    within: int = 3


@pytest.fixture
def parser():
    made = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_options(made, Settings)
    return made


def test_the_parser_has_the_defaults_of_the_dataclass(parser):
    assert Settings(**vars(parser.parse_args([]))) == Settings()


def test_texts_become_what_the_fields_hold(parser):
    given = ["--rows-per-step", "2", "--rate", "1e-5", "--quick", "--out", "~/a", "--names", "b,c"]
    assert Settings(**vars(parser.parse_args(given))) == Settings(
        2, 1e-5, True, Path("~/a").expanduser(), ("b", "c")
    )


def test_the_help_says_each_default_once(parser):
    text = " ".join(parser.format_help().split())
    assert "rows of a step (default: 0)" in text
    assert "rate (default: 1 / rows)" in text
    assert text.count("default") == 3


def test_a_field_without_a_help_text_has_no_option(parser):
    assert "--within" not in parser.format_help()
    with pytest.raises(SystemExit):
        parser.parse_args(["--within", "4"])
