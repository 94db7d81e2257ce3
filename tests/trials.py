"""All that is tried on broken input and faults, as one pass of many parts, and the table of it.

`python tests/trials.py FOLDER` does the parts that FOLDER has no result of yet, so that a pass that
was stopped goes on; it then prints the table in SECURITY.md. One pass is of one state of the code:
FOLDER holds its commit, and another one is refused. `--table` prints what is there so far.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import zip_longest
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SEEDS, PARTS, ROUNDS = 3, 6, 10
TITLES = {
    "broken_files.py": "broken models, GGUFs, settings, templates and data",
    "hostile_files.py": "hostile ones: headers, pipes, bombs, wrong fields, folders of runs",
    "extension, invalid": "calls of the extension's functions, invalid",
    "ops, invalid": "calls of the public ops, invalid",
    "losses, valid": "losses, valid",
    "losses, spoilt": "losses, with an odd argument",
    "Gram matrices, sums, products": "Gram matrices, weighted sums and products",
    "update_": "the optimizer's step, `update_`",
    "solver": "the solver",
    "optimizer": "`MOLLMOptimizer`: made, stepped, misused, loaded",
    "killed_runs.py": "runs killed at random moments and resumed, bit for bit",
    "faulty_machines.py": "full disks and clocks that jump",
}


def parts(seeds: int) -> list[list[str]]:
    """The command line of every part, without Python and the folder of the tests; of each kind one
    in turn, so that a pass that is not done has something of all."""
    files = [
        [str(seed), "--every", str(PARTS), "--first", str(first)]
        for seed in range(seeds)
        for first in range(PARTS)
    ]
    kinds = (
        [["fuzzed_calls.py", str(seed), "--calls", "10000"] for seed in range(ROUNDS)],
        [["killed_runs.py", "FOLDER", "10", str(seed)] for seed in range(ROUNDS)],
        [["hostile_files.py", *each] for each in files],
        [["broken_files.py", *each] for each in files],
        [["faulty_machines.py", "FOLDER"]],
    )
    return [part for some in zip_longest(*kinds) for part in some if part is not None]


def run(part: list[str], out: Path) -> None:
    """Runs a part; its words go to a file that has its name when it is whole."""
    path = out / ("-".join(part).replace("/", "_") + ".txt")
    if path.exists():
        return
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, str(TESTS / part[0]), *part[1:]]
        argv = [folder if word == "FOLDER" else word for word in argv]
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
        done = subprocess.run(argv, capture_output=True, text=True, env=env, check=False)
    seconds = time.monotonic() - begun
    unfinished = path.with_suffix(".part")
    unfinished.write_text(f"{done.stdout}{done.stderr}\nstatus {done.returncode}\n")
    unfinished.rename(path)
    print(f"{' '.join(part)}: status {done.returncode}, {seconds:.0f} s", flush=True)


def counted(out: Path) -> dict[str, Counter[str]]:
    """How much was tried and how much was wrong, of every row of the table."""
    found = {title: Counter[str]() for title in TITLES}
    for path in sorted(out.glob("*.txt")):
        text = path.read_text()
        script = path.name.split("-")[0]
        status = int(re.findall(r"^status (-?\d+)$", text, re.MULTILINE)[-1])
        if script == "fuzzed_calls.py":
            for line in text.splitlines():
                row = re.fullmatch(r"(\S.*\S) +(\d+) +(\d+) +(\d+)", line)
                title = next((t for t in TITLES if row and row[1].startswith(t)), None)
                if row and title:
                    found[title] += Counter(tried=int(row[2]), wrong=int(row[4]))
        elif script == "killed_runs.py":
            kills = text.count(": True") - text.count("too late: True")
            found[script] += Counter(tried=kills, wrong=int(status != 0))
        elif script == "faulty_machines.py":
            found[script] += Counter(tried=text.count(": True"), wrong=int(status != 0))
        else:
            sums = re.findall(r"(\d+) tried, (\d+) wrong", text)
            tried, wrong = map(int, sums[-1]) if sums else (0, 1)
            found[script] += Counter(tried=tried, wrong=wrong)
    return found


def table(out: Path) -> str:
    """The table as Markdown."""
    rows = ["| what | tried | wrong |", "|---|---:|---:|"]
    for name, counts in counted(out).items():
        rows.append(f"| {TITLES[name]} | {counts['tried']} | {counts['wrong']} |")
    return "\n".join(rows)


def commit() -> str:
    """Of the code that is tried."""
    call = ["git", "-C", str(TESTS.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    """Goes on with a pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of broken and hostile files")
    parser.add_argument("--table", action="store_true", help="print the table of what is done")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    of = asked.folder / "commit"
    if not asked.table:
        if of.exists() and of.read_text() != commit():
            sys.exit(f"{asked.folder} is a pass of {of.read_text()}, and this is {commit()}")
        of.write_text(commit())
        for part in parts(asked.seeds):
            run(part, asked.folder)
    elif not of.exists():
        sys.exit(f"{asked.folder} holds no pass")
    print(f"{of.read_text()}\n{table(asked.folder)}")
    return 1 if any(counts["wrong"] for counts in counted(asked.folder).values()) else 0


if __name__ == "__main__":
    sys.exit(main())
