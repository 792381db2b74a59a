"""The Triton kernels compiled ahead of time for GPUs that need not be here: they build, nothing spills."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

# What the launcher passes for a contiguous gradient of 16-byte aligned rows: Triton specialises on both.
COMPILE = r"""
import json, re, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mipfast_kernels.riemann_accumulate import TILES, riemann_accumulate_kernel as kernel

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
report = {}
for dtype, (block_f, num_warps) in TILES.items():
    signature = {name: "i32" for name in kernel.arg_names}
    signature |= {"p_grad": f"*{NAMES[dtype]}", "p_act": f"*{NAMES[dtype]}"}
    signature |= {name: "*fp32" for name in ("p_weights", "p_s1", "p_s2")}
    constants = {"HAS_ACT": True, "BLOCK_F": block_f, "stride_grad_f": 1, "stride_act_f": 1}
    signature |= {name: "constexpr" for name in constants}
    aligned = ("neurons", "stride_grad_k", "stride_grad_r", "stride_act_r")
    aligned = [name for name in kernel.arg_names if name.startswith("p_") or name in aligned]
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    for arch in (80, 90):
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
        target, options = GPUTarget("cuda", arch, 32), {"num_warps": num_warps}
        compiled = triton.compile(source, target=target, options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            command = [cuobjdump, "-res-usage", cubin.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True)
        text = usage.stdout + usage.stderr
        report[f"{NAMES[dtype]} sm_{arch}"] = {
            "stack": int(re.search(r"STACK:(\d+)", text)[1]),
            "registers": int(re.search(r"REG:(\d+)", text)[1]),
            "wide_loads": bool(re.search(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"])),
        }
print(json.dumps(report))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_riemann_accumulate_compiles_without_spills(tmp_path):
    # a process of its own: triton takes TRITON_INTERPRET from the environment when it is first imported
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    (tmp_path / "compile.py").write_text(COMPILE)
    result = subprocess.run([sys.executable, tmp_path / "compile.py"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    print(report)
    for target, usage in report.items():
        assert usage["stack"] == 0, f"{target} spills {usage['stack']} bytes"
        assert usage["wide_loads"], f"{target} reads less than 16 bytes per thread"
