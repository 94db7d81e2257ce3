"""Runs tests on another build of the extension: `python sanitized.py EXTENSION TESTS...`.

In place of tests it may be a script of this folder, with its arguments.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("mollm_ops._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["mollm_ops._C"] = module
if Path(sys.argv[2]).parent == Path(__file__).parent:
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
sys.exit(pytest.main([*sys.argv[2:], "-p", "no:cacheprovider"]))
