"""The Triton kernels on CPU tensors, in a process of their own: triton reads TRITON_INTERPRET on import."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNEL_TESTS = [
    "test_riemann_interpolate.py",
    "test_riemann_accumulate.py",
    "test_riemann_project.py",
    "test_project_accumulate.py",
    "test_misdirection_loss.py",
    "test_swiglu.py",
    "test_every_op.py",
    "test_locate_backends.py",
]


def interpreter_trouble():
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import numpy
    import triton

    # triton 3.6 cannot interpret runtime loop bounds with numpy 2.4, 3.9 can; 3.7 and 3.8 are untried
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 9) and tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= (2, 4):
        return f"triton {triton.__version__} cannot interpret with numpy {numpy.__version__}"
    return None


def test_kernels_in_the_interpreter():
    if trouble := interpreter_trouble():
        pytest.skip(trouble)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "triton", *(Path(__file__).with_name(f) for f in KERNEL_TESTS)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    print(result.stdout[-4000:], result.stderr[-2000:])
    assert result.returncode == 0, "pytest with TRITON_INTERPRET=1 failed: its report is above"
    assert " passed" in result.stdout
