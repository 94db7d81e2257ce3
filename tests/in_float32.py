"""Runs a script, named by the first argument, without autocast, whatever the processor can do.

It prints the reports of its steps with all their digits.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from mollm import StepReport
from mollm.system import precision

if __name__ == "__main__":
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    StepReport.__str__ = StepReport.__repr__
    with precision.computing_in("float32"):
        runpy.run_path(sys.argv[0], run_name="__main__")
