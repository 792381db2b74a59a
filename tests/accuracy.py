"""What the tests of the ops share: where they run, and the accuracy rule of the design.

Triton runs on a GPU, or on CPU tensors when TRITON_INTERPRET=1 (which tests/test_interpreter.py sets).
"""

import torch

from mipfast.ops import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name, usable, _ in backends.status() if usable]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def assert_accurate(found, gold, eager32, name=""):
    """max|found - gold| <= 2 max|eager32 - gold| + 8 eps max|gold|: gold in float64 from the same inputs, eager32 eager
    with float32 accumulators, eps of found's dtype."""
    assert found.shape == gold.shape, name
    error = (found.double() - gold).abs().max().item()
    bound = 2 * (eager32.double() - gold).abs().max() + 8 * torch.finfo(found.dtype).eps * gold.abs().max()
    assert error <= bound.item(), f"{name}: error {error:.2e} exceeds {bound.item():.2e}"
