"""Builds mollm_ops._C with CMake; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds csrc/ into the folder where setuptools expects the extension.

    The environment variable MOLLM_CUDA decides about the CUDA part: unset builds it where nvcc is
    found, 1 makes a missing nvcc an error, 0 leaves it out. MOLLM_CUDA_ARCHS names the
    architectures to build for, such as "80;90", or "all" that are supported, for a release; unset,
    those of this machine's devices or, where it has none, the oldest one with PTX.
    """

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Of its own and kept, so that the next installation compiles what has changed.
        build = ROOT / "build" / f"{ext.name}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-UCMAKE_CUDA_COMPILER",  # one that has come or gone since the last build is noticed
            "-S", str(ROOT),
            "-B", str(build),
            "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",  # of this build's environment
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMOLLM_OUTPUT_DIR={target.parent}",
            f"-DMOLLM_OUTPUT_NAME={target.name}",
            f"-DMOLLM_CUDA={os.environ.get('MOLLM_CUDA', 'AUTO')}",
            f"-DMOLLM_CUDA_ARCHS={os.environ.get('MOLLM_CUDA_ARCHS', '')}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(ext_modules=[Extension("mollm_ops._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
