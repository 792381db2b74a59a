"""Every Triton kernel at every shipped tile, compiled ahead of time for GPUs that need not be here.

    python bench/static.py [--out bench/results/static]

Runs the launchers themselves, on tensors without memory and a driver that only names a GPU, and keeps what they would
have launched. Writes kernels.json and, the same as a table, kernels.md.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton 3.9 warns that 3.10 flips it

import torch
import triton
from triton.backends.compiler import GPUTarget

from mipfast_kernels.misdirection_loss import misdirection_gradient, misdirection_loss
from mipfast_kernels.project_accumulate import TILES, project_accumulate
from mipfast_kernels.riemann_accumulate import riemann_accumulate
from mipfast_kernels.riemann_interpolate import riemann_interpolate
from mipfast_kernels.riemann_project import riemann_project
from mipfast_kernels.swiglu import swiglu, swiglu_gradients

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # fp16 is compiled as bf16 is
NEURONS = (11008, 3420)  # rows of 3420 2-byte elements are no multiples of 16 bytes
STEPS, HIDDEN = 4, 1280
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTIONS = {
    "cuda": {
        "HGMMA": r"\bHGMMA", "UTCHMMA": r"\bUTCHMMA", "HMMA": r"\bHMMA", "FFMA": r"\bFFMA",
        "LDGSTS": r"\bLDGSTS", "UTMALDG": r"\bUTMALDG",
        "LDG.128": r"\bLDG\.E\S*\.128", "LDG.64": r"\bLDG\.E\S*\.64",
        "STG.128": r"\bSTG\.E\S*\.128", "STG.64": r"\bSTG\.E\S*\.64",
    },
    "hip": {"MFMA": r"\bv_mfma", "load.128": r"\b\w+_load_dwordx4", "load.64": r"\b\w+_load_dwordx2"},
}  # fmt: skip


class Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)  # kernels are cached by it

    def get_current_stream(self, device):
        return 0


def cases(arch):
    """(case, call of a launcher) for every specialisation that the library's shapes give a shipped tile."""

    def tensor(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    steps = tensor(STEPS)
    for name, dtype in DTYPES.items():
        for neurons in NEURONS:
            act, named = tensor(64, neurons, dtype=dtype), tensor(64, 5, dtype=torch.int64)
            grad, weight = tensor(STEPS, 64, neurons, dtype=dtype), tensor(HIDDEN, neurons, dtype=dtype)
            label = f"{name}, F {neurons}"
            if neurons * dtype.itemsize % 16 or neurons == NEURONS[0]:
                yield label, lambda g=grad, a=act: riemann_accumulate(g, steps, a, 64)
                yield f"{label}, all", lambda a=act: riemann_interpolate(a, steps, None)
                yield f"{label}, named", lambda a=act, n=named: riemann_interpolate(a, steps, n)
                base = tensor(64, HIDDEN, dtype=dtype)
                yield f"{label}, named", lambda b=base, a=act, w=weight, n=named: riemann_project(b, a, w, steps, n)
            grad, act = tensor(STEPS, 1024, HIDDEN, dtype=dtype), tensor(1024, neurons, dtype=dtype)
            for tile in TILES[arch][dtype.itemsize]:
                case = f"{label}, tile {'x'.join(map(str, tile[:3]))}, {tile[3]} warps"
                product = partial(project_with_tile, arch, tile, grad, weight, steps, act)
                yield f"{case}, summed", partial(product, 1)
                if neurons == NEURONS[0]:
                    yield f"{case}, rows kept", partial(product, 1024)
        hidden, kept = tensor(512, HIDDEN, dtype=dtype), tensor(512, dtype=torch.int8)
        yield f"{name}, masked", lambda h=hidden, k=kept: misdirection_loss(h, h[0], k)
        yield f"{name}, masked", lambda h=hidden, k=kept: misdirection_gradient(h, h[0], k, tensor())
        yield name, lambda a=act: swiglu(a, a)
        yield name, lambda a=act: swiglu_gradients(a, a, a)


def project_with_tile(arch, tile, *args):
    with mock.patch.dict(TILES[arch], {args[0].element_size(): [tile]}):
        project_accumulate(*args)


launched = []
run = triton.JITFunction.run


def compile_only(kernel, *args, grid, warmup, **kwargs):
    launched.append((kernel.fn.__name__, run(kernel, *args, grid=grid, warmup=True, **kwargs)))


def compile_for(arch):
    """The rows of one architecture; not in a process that launches kernels, as it replaces Triton's driver."""
    target = TARGETS[arch]
    triton.JITFunction.run = compile_only
    triton.runtime.driver.set_active(Driver(target))
    rows = []
    for case, call in cases(arch):
        call()
        name, compiled = launched.pop()
        rows.append({"kernel": name.removesuffix("_kernel"), "case": case, "arch": arch, **usage(compiled, target)})
    return rows


def usage(compiled, target):
    if target.backend == "hip":
        text = code = compiled.asm["amdgcn"]
        registers, spills = r"\.vgpr_count:\s+(\d+)", r"\.vgpr_spill_count:\s+(\d+)"
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            text = _output(TOOLS / "cuobjdump", "-res-usage", cubin.name)
            code = _output(TOOLS / "nvdisasm", "-c", "-ndf", cubin.name)
        registers, spills = r"REG:(\d+)", r"STACK:(\d+)"
    counts = {name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS[target.backend].items()}
    return {
        "registers": int(re.search(registers, text)[1]),
        "spills": int(re.search(spills, text)[1]),
        "shared": compiled.metadata.shared,
        "instructions": {name: count for name, count in counts.items() if count},
    }


def _output(*command):
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def measure():
    # a second per kernel, so as many processes as there are cores
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = [row for part in pool.map(compile_for, TARGETS) for row in part]
    return {"triton": triton.__version__, "torch": torch.__version__, "rows": rows}


def table(report):
    """The same as Markdown; shared memory in KiB."""
    lines = [f"Compiled by triton {report['triton']}, run on no GPU: `python bench/static.py`.", ""]
    lines += ["| kernel | case | GPU | registers | spills | shared | instructions |", "|---|---|---|---|---|---|---|"]
    for row in report["rows"]:
        instructions = ", ".join(f"{count} {name}" for name, count in row["instructions"].items())
        cells = [
            row["kernel"],
            row["case"],
            row["arch"],
            row["registers"],
            row["spills"],
            f"{row['shared'] / 1024:.3g}",
        ]
        lines.append("| " + " | ".join(map(str, [*cells, instructions])) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/static")
    out = parser.parse_args().out
    found = measure()
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "kernels.md").write_text(table(found))
