"""The Triton kernels compiled ahead of time for GPUs that need not be here: they build, nothing spills, products run on
tensor cores and copy asynchronously, the others move 16 bytes at a time."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "gfx942"}
# the instruction a product of 16-bit tiles runs by, of more than 16 rows; smaller ones and gfx942's run by the second
MATRIX = {"sm_80": ("HMMA", "HMMA"), "sm_90": ("HGMMA", "HMMA"), "sm_100": ("UTCHMMA", "HMMA"), "gfx942": ("MFMA",) * 2}


# Triton makes arguments of 1 constants, which the interpreter does not; a transposed weight is GPT-2's
ODD = r"""
import sys, torch
sys.path.insert(0, sys.argv[1])
import static, triton

triton.JITFunction.run = static.compile_only
triton.runtime.driver.set_active(static.Driver(static.TARGETS["sm_90"]))

def tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

one, named = tensor(1, dtype=torch.float32), tensor(1, 1, dtype=torch.int64)
for f, h, weight in (1, 1, tensor(1, 1)), (16, 1, tensor(1, 16)), (48, 80, tensor(48, 80).t()):
    static.riemann_accumulate(tensor(1, 1, f), one, None, 1)
    static.riemann_interpolate(tensor(1, f), one, named)
    static.riemann_project(tensor(1, h), tensor(1, f), weight, one, named)
    static.misdirection_loss(tensor(1, f), tensor(f), None)
    static.misdirection_gradient(tensor(1, f), tensor(f), None, one[0])
    static.swiglu(tensor(1, f), tensor(1, f))
    static.swiglu_gradients(tensor(1, f), tensor(1, f), tensor(1, f))
    for grad in tensor(1, 1, h), tensor(h, 5, 3).permute(2, 1, 0):
        static.project_accumulate(grad, weight, one.expand(len(grad)), None, 1)
print(len(static.launched), "compiled")
"""


def environment(cache):
    # a process of its own: triton takes TRITON_INTERPRET from the environment when it is first imported
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"TRITON_CACHE_DIR": str(cache)}


pytestmark = pytest.mark.slow


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_arguments_of_one_compile(tmp_path):
    command = [sys.executable, "-c", ODD, ROOT / "bench"]
    result = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "27 compiled" in result.stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    out = tmp_path_factory.mktemp("static")
    command = [sys.executable, ROOT / "bench/static.py", "--out", out]
    result = subprocess.run(command, env=environment(out), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((out / "kernels.json").read_text())["rows"]


def found(row, *names):
    return sum(row["instructions"].get(name, 0) for name in names)


def test_nothing_spills(report):
    assert [row for row in report if row["spills"]] == []


def test_products_run_on_tensor_cores(report):
    for row in report:
        if row["kernel"] == "project_accumulate":
            # float32 multiplies in float32, which NVIDIA's tensor cores do not
            name = MATRIX[row["arch"]]["tile 16x" in row["case"]] if "bf16" in row["case"] else "FFMA"
            assert found(row, "MFMA" if row["arch"] == "gfx942" else name), row


def test_products_copy_asynchronously(report):
    for row in report:
        if row["kernel"] == "project_accumulate" and row["arch"] != "gfx942":
            assert found(row, "LDGSTS"), row
            # W by the tensor memory accelerator, where its rows are multiples of 16 bytes
            aligned = "bf16, F 3420" not in row["case"] and row["arch"] != "sm_80"
            assert bool(found(row, "UTMALDG")) == aligned, row


def test_memory_bound_kernels_move_wide_words(report):
    for row in report:
        if row["kernel"] != "project_accumulate" and row["arch"] != "gfx942":
            # rows of 3420 2-byte elements are multiples of 8 bytes
            widest = "LDG.64" if "bf16, F 3420" in row["case"] and row["kernel"] != "riemann_project" else "LDG.128"
            assert found(row, widest), row


def test_every_kernel_and_tile_is_there(report):
    kernels = {}
    for file in (ROOT / "kernels/mipfast_kernels").glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                kernels[node.name.removesuffix("_kernel")] = file.stem
    assert {row["kernel"] for row in report} == set(kernels)
    for arch in ARCHITECTURES:
        products = {row["case"] for row in report if (row["kernel"], row["arch"]) == ("project_accumulate", arch)}
        for neurons in (3420, 11008):
            # four tiles of bf16, one of fp32
            assert len({case.split(", ")[2] for case in products if f"F {neurons}" in case}) == 5, arch
