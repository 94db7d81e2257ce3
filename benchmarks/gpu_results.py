"""Takes over what `gpu.sh` measured.

    python benchmarks/gpu_results.py build/gpu/gpu.tar.gz

Puts the benchmarks' JSON and figures into benchmarks/results/<device>/ and prints their rows as
tables for docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from _common import ROOT, Row

RESULTS = ROOT / "benchmarks" / "results"
LEFT_OUT = {
    "dtype",
    "P",
    "torch AdamW ms",
    "torch GB/s",
}  # the same in many rows, or told by others


def folder_of(device: str) -> str:
    """A device's name as results_folder of _common writes it."""
    name = "".join(c if c.isalnum() else "-" for c in device.lower())
    return "-".join(filter(None, name.split("-")))


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table; numbers with three digits."""
    columns = [c for c in dict.fromkeys(key for row in rows for key in row) if c not in LEFT_OUT]

    def cell(value: object) -> str:
        text = f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
        return text.replace("|", "\\|")

    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(row.get(c)) for c in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def take_over(archive: Path, results: Path = RESULTS) -> str:
    """Copies the files and returns the tables, with where each comes from."""
    tables = []
    with tempfile.TemporaryDirectory() as temporary, tarfile.open(archive) as tar:
        tar.extractall(temporary, filter="data")
        for path in sorted(Path(temporary).rglob("*.json")):
            written = json.loads(path.read_text())
            folder = results / folder_of(written["device"])
            folder.mkdir(parents=True, exist_ok=True)
            for part in (path, path.with_suffix(".png")):
                if part.exists():
                    (folder / part.name).write_bytes(part.read_bytes())
            origin = f"{written['device']}, {written['date']}, commit {written['commit']}"
            head = f"### {path.stem}\n\n`{written['command']}`: {origin}"
            tables.append(f"{head}\n\n{markdown(written['rows'])}")
    if not tables:
        raise SystemExit(f"{archive} holds no benchmark's JSON: has a benchmark run?")
    return "\n\n".join(tables)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path)
    print(take_over(parser.parse_args(argv).archive))


if __name__ == "__main__":
    main()
