"""`pip install .` where there is no nvcc: it works, says so once, or refuses when told to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_NVCC = "/usr/bin:/bin"
UNOPTIMIZED = '#!/bin/sh\nexec /usr/bin/c++ "$@" -O0\n'
"""Takes a third of the time, and what is looked at here does not depend on it."""
NOT_SOURCES = (".*", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__")
HIDDEN = ("CUDACXX", "CUDA_PATH", "CUDAToolkit_ROOT", "CMAKE_PREFIX_PATH", "MOLLM_CUDA")


@pytest.fixture
def build(tmp_path):
    """Builds a wheel, without nvcc and in isolation, from the archive of the sources."""
    if (Path("/usr/bin/nvcc")).exists():
        pytest.skip("nvcc stands in /usr/bin, so PATH cannot hide it")
    sources = tmp_path / "sources"
    shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    code = "import sys; from setuptools import build_meta as b; b.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, cwd=sources, check=True, capture_output=True)
    shutil.rmtree(sources)  # nothing is taken from there that the archive lacks
    (archive,) = tmp_path.glob("mollm-*.tar.gz")
    compiler = tmp_path / "c++"
    compiler.write_text(UNOPTIMIZED)
    compiler.chmod(0o755)

    def run(cuda):
        environment = {k: v for k, v in os.environ.items() if k not in HIDDEN}
        environment |= {"PATH": WITHOUT_NVCC, "CXX": str(compiler)}
        environment |= {"MOLLM_CUDA": cuda} if cuda else {}
        pip = [sys.executable, "-m", "pip"]
        command = [*pip, "wheel", "-v", "--no-deps", "-w", str(tmp_path), str(archive)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    return run


def test_the_archive_of_the_sources_holds_all_of_them(build, tmp_path):
    (path,) = tmp_path.glob("mollm-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "mollm", "mollm_ops"):
        listed = ["git", "-C", str(ROOT), "ls-files", folder]
        done = subprocess.run(listed, check=True, capture_output=True, text=True)
        missing = set(done.stdout.split()) - names
        assert not missing
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "constraints.txt"} <= names


def said_by(done):
    return " ".join((done.stdout + done.stderr).split())


def test_without_nvcc_the_cpu_part_is_built_and_it_is_said_once(build, tmp_path):
    done = build(None)
    assert done.returncode == 0, done.stdout + done.stderr
    assert said_by(done).count("the CUDA part of mollm is not built") == 1
    (wheel,) = tmp_path.glob("mollm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert any(n.startswith("mollm_ops/_C.") and n.endswith(".so") for n in names)
        assert {"mollm/py.typed", "mollm_ops/py.typed", "mollm_ops/_C.pyi"} <= set(names)
        assert {"mollm/samples/safety.jsonl", "mollm/samples/everyday.csv"} <= set(names)
        assert {"mollm/demo/report.html.jinja", "mollm/audit/audit.html.jinja"} <= set(names)
        assert "mollm/training/trainer.py" in names
        archive.extractall(tmp_path / "installed")
    check = "import mollm_ops._C as c; assert not c.HAS_CUDA"
    subprocess.run(
        [sys.executable, "-c", check],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        check=True,
    )


def test_mollm_cuda_1_makes_a_missing_nvcc_an_error_with_the_way_out(build):
    done = build("1")
    assert done.returncode != 0
    assert "MOLLM_CUDA=1, but nvcc was not found: put nvcc on PATH" in said_by(done)
    assert "or unset MOLLM_CUDA to build the CPU part alone" in said_by(done)
