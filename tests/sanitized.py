"""Runs tests on another build of the extension: `python sanitized.py EXTENSION TESTS...`."""

import importlib.util
import sys

import pytest

spec = importlib.util.spec_from_file_location("mollm_ops._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["mollm_ops._C"] = module
sys.exit(pytest.main([*sys.argv[2:], "-p", "no:cacheprovider"]))
