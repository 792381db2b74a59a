"""What the benches of the ops run on: FFNs of real models, and who computes."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # accuracy.py: the tests' rule holds here too

from mipfast.ops import backends  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (hidden, neurons)
FFN = {
    "qwen2.5-vl-vit": (1280, 3420),
    "qwen2.5-3b": (2048, 11008),
    "qwen2.5-7b": (3584, 18944),
    "llama-7b": (4096, 11008),
    "qwen2.5-32b": (5120, 27648),
}
# (FFN, steps, rows, groups): patches of a picture summed, and positions of a text kept apart
VISION = [("qwen2.5-vl-vit", m, patches, 1) for m in (2, 4) for patches in (256, 1024, 4096)]
TEXT = [(name, 4, 64, None) for name in FFN if name != "qwen2.5-vl-vit"]
GPU = DEVICE == "cuda"
DTYPES = {"bf16": torch.bfloat16} if GPU else {"fp32": torch.float32, "bf16": torch.bfloat16}
KERNELS = [name for name, usable, _ in backends.status() if usable and name not in ("reference", "cpp" if GPU else "")]


def label(shape):
    return "-".join(str(size) for size in shape if size is not None)


def providers(*compiled):
    """Eager is the strongest plain torch we know; `compiled` are the spellings of it that torch.compile gets."""
    return ["eager", *(f"compile-{name}" for name in compiled), "reference", *KERNELS]


def randn(*size, dtype=torch.float32, scale=1.0):
    generator = torch.Generator(DEVICE).manual_seed(sum(size))
    return (torch.randn(size, generator=generator, device=DEVICE) * scale).to(dtype)


def rand(size):
    return torch.rand(size, generator=torch.Generator(DEVICE).manual_seed(size), device=DEVICE)


def named(rows, neurons, count=5):
    """[rows, count]: each row's path, a neuron named twice in one row and none in another, as `ops` allows."""
    path = torch.stack(
        [torch.randperm(neurons, generator=torch.Generator().manual_seed(r))[:count] for r in range(rows)]
    )
    path[0, 1], path[-1] = path[0, 0], -1
    return path.to(DEVICE)


def once(neurons):
    """(indices, where they name nothing: -1, or a neuron that the row has named already)."""
    ordered = neurons.sort(1).values
    off = ordered < 0
    off[:, 1:] |= ordered[:, 1:] == ordered[:, :-1]
    return ordered.clamp(min=0), off
