"""The command line, `mollm COMMAND`, also as `python -m mollm`.

Neither this module nor one of `mollm.commands` loads Torch before a command runs, so that help,
versions and typing errors are answered at once.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from mollm import __version__
from mollm.commands import (
    ask,
    audit,
    completion,
    curve,
    demo,
    doctor,
    evaluate,
    init,
    plan,
    preview,
    report,
    request,
    tune,
    unlearn,
)
from mollm.errors import UsageError
from mollm.system.terminal import printable

_COMMANDS = (
    demo,
    init,
    preview,
    tune,
    unlearn,
    evaluate,
    audit,
    ask,
    report,
    request,
    curve,
    plan,
    doctor,
    completion,
)
_EXTRAS = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "gguf",
    "jinja2",
    "matplotlib",
    "peft",
    "pyarrow",
    "rouge_score",
    "safetensors",
    "scipy",
    "shtab",
    "sklearn",
    "tqdm",
    "transformers",
    "yaml",
)

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_DEFECT = 70
"""The exit status that sysexits.h calls EX_SOFTWARE."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 2 after a mistake of the user's.

    Else it is 0, or 1 where `plan` finds that it does not fit, `doctor` that something is amiss,
    `unlearn` that the losses diverge, or `audit` that not all is gone, 130 after an interrupt, and
    70 after what nobody foresaw.
    """
    # Torch's OpenMP lets a thread that waits spin for milliseconds. Where other programs want the
    # processor too, it then takes the time of the thread that it waits for: beside two busy ones a
    # small matrix product took a hundred times as long. To sleep at once costs a sixth where there
    # are none, so it spins for as long as a layer needs. OpenMP reads this when Torch is loaded; a
    # number comes before a policy, so who chose one keeps it.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "4000")
    # bitsandbytes says at every start that it found no package for a faster kernel.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # What transformers deprecates between itself and peft is for neither's users to mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    parser = _parser()
    given = sys.argv[1:] if argv is None else list(argv)
    if not given:
        parser.print_help()
        return 0
    arguments = parser.parse_args(given)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except UsageError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes, which all know it
            print(f"mollm: {_in_one_line(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            return _report_defect(error)
        extras = "train,qlora" if error.name == "bitsandbytes" else "train,eval"
        print(
            f"mollm: this command needs the package {error.name}: pip install 'mollm[{extras}]'.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("mollm: interrupted; existing results are unchanged.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read what this prints has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit:
        raise
    except BaseException as error:  # also a panic in a package that is written in Rust
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            print(
                "mollm: there is not enough memory: lower per_device_train_batch_size or "
                "--max-length, or see what would fit with `mollm plan`.",
                file=sys.stderr,
            )
            return 2
        if _is_of_the_disk(error):
            print(
                f"mollm: the disk is full or cannot be written ({printable(str(error))}): free "
                "some space, or set TMPDIR to a folder that has some.",
                file=sys.stderr,
            )
            return 2
        return _report_defect(error)
    return status


def _is_of_the_disk(error: BaseException) -> bool:
    """Whether it is about a disk without room; the module tempfile has words of its own for it."""
    return isinstance(error, OSError) and (
        error.errno in _DISK_ERRORS or "No usable temporary directory" in str(error)
    )


def _in_one_line(error: UsageError) -> str:
    """A sentence in which a name or a value of a stranger's file cannot act on the terminal."""
    return printable(str(error)).replace("\n", "\\n")


def _report_defect(error: BaseException) -> int:
    """Tells of what nobody foresaw in a sentence, with the traceback in a file of its own.

    With MOLLM_TRACEBACK in the environment the error goes on, and is shown as Python shows it.
    """
    import tempfile
    import traceback

    if os.environ.get("MOLLM_TRACEBACK"):
        raise error
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="mollm-", suffix=".log", encoding="utf-8", errors="replace", delete=False
        ) as log:
            log.write(f"mollm {__version__} {sys.argv[1:]}\n\n")
            traceback.print_exception(error, file=log)
        name = log.name
    except OSError:  # a full disk, of all times
        name = "what MOLLM_TRACEBACK=1 shows"
    what = printable(" ".join(f"{type(error).__name__}: {error}".split()))[:300].rstrip(".: ")
    print(
        f"mollm: this is a defect of mollm or of a package that it uses ({what}): please report it "
        f"with {name}.",
        file=sys.stderr,
    )
    return _DEFECT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mollm", description="Unlearning for language models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"mollm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    commands.choices["completion"].set_defaults(root=parser)
    for added in commands.choices.values():
        added.allow_abbrev = False
    return parser
