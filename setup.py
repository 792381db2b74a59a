"""Packages and the optional C++ extension `mipfast._C`; everything static is in pyproject.toml.

MIPFAST_BUILD=auto (default) builds `_C` and goes on without it when CMake or the compiler fails,
MIPFAST_BUILD=cpu fails with them, MIPFAST_BUILD=cuda adds the CUDA C++ kernel (nvcc, no GPU needed),
MIPFAST_BUILD=none does not try.
"""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
MODE = os.environ.get("MIPFAST_BUILD", "auto")
if MODE not in ("auto", "cpu", "cuda", "none"):
    sys.exit(f"MIPFAST_BUILD={MODE!r}: expected auto, cpu, cuda or none")


class CMakeBuild(build_ext):
    def run(self):
        # setuptools would look for a C compiler before build_extension can catch its absence
        for ext in self.extensions:
            try:
                self.build_extension(ext)
            except Exception as error:
                if MODE in ("cpu", "cuda"):
                    raise
                logging.warning("mipfast: the C++ extension was not built (%s); going on without it", error)
        if self.inplace:
            self.inplace = 0
            self.copy_extensions_to_source()
            self.inplace = 1

    def build_extension(self, ext):
        import pybind11

        inplace, self.inplace = self.inplace, 0
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        self.inplace = inplace
        out.mkdir(parents=True, exist_ok=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        # a fresh folder: a kept CMakeCache points into the build environment that pip has since deleted
        with tempfile.TemporaryDirectory() as build:
            configure = [
                "cmake", "-S", str(HERE), "-B", build, *generator,
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DMIPFAST_CUDA={'ON' if MODE == 'cuda' else 'OFF'}",
            ]  # fmt: skip
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", build, "--config", "Release"], check=True)


setup(
    license="Apache-2.0",
    packages=[*find_packages(include=["mipfast", "mipfast.*"]), "mipfast_kernels"],
    # not a package `kernels` at the root: it would shadow Hugging Face's package of that name
    package_dir={"mipfast_kernels": "kernels/mipfast_kernels"},
    package_data={"mipfast": ["py.typed", "demo/facts.json", "demo/weights/base/*"]},
    ext_modules=[] if MODE == "none" else [Extension("mipfast._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
