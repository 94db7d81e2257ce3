"""Runs a script, named by the first argument, without autocast, whatever the processor can do."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from mollm.system import precision

if __name__ == "__main__":
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    with precision.computing_in("float32"):
        runpy.run_path(sys.argv[0], run_name="__main__")
