"""MIPFAST_BUILD=cuda where nvcc is, without a GPU: it builds, loads, and says in words what keeps it from running."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

STATUS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("mipfast._C", sys.argv[1])
sys.modules["mipfast._C"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from mipfast.ops import backends
print({name: reason for name, _, reason in backends.status()}["cuda"])
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc") or not shutil.which("cmake"), reason="needs nvcc and cmake")
def test_it_builds_and_loads_without_a_driver(tmp_path):
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    build = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders],
        cwd=ROOT,
        env={**os.environ, "MIPFAST_BUILD": "cuda", "CUDAARCHS": "90"},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stdout[-3000:] + build.stderr[-2000:]
    (built,) = (tmp_path / "lib" / "mipfast").glob("_C*")
    python = [sys.executable, "-c", STATUS, str(built)]
    status = subprocess.run(python, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert status.returncode == 0, status.stderr
    assert status.stdout.startswith("mipfast._C has the CUDA kernel, but ")
