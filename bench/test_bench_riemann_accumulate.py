"""riemann_accumulate against good eager: in-place add_ and addcmul_, fp32 accumulators, step by step.

The broadcast formula is another 20x slower and would flatter any kernel: it is no baseline here.
GB/s counts what has to move: the gradient and act read once, s1 and s2 written once.
"""

import pytest
import torch

from mipfast import backend as backends
from mipfast import ops

# (steps, rows, neurons, groups): Qwen2.5-VL-7B's text FFN at one position of four samples and at 64 positions,
# its vision FFN over 1024 patches, Qwen2.5-VL-3B's text FFN at the released code's 20 steps
SHAPES = {
    "qwen7b-text-4": (4, 4, 18944, None),
    "qwen7b-text-64": (4, 64, 18944, None),
    "qwen7b-vision-1024-summed": (2, 1024, 3420, 1),
    "qwen3b-text-20steps": (20, 64, 11008, None),
}
USABLE = [name for name, usable, _ in backends.status() if usable and name != "reference"]
PROVIDERS = ["eager", "reference", *USABLE]


def eager(grad, weights, act, groups):
    s1 = torch.zeros(grad.shape[1:], dtype=torch.float32, device=grad.device)
    s2 = torch.zeros_like(s1)
    for g, w in zip(grad.unbind(), weights, strict=True):
        g = g.float()
        s1.add_(g, alpha=w)
        s2.addcmul_(g, g, value=w)
    s1 *= act
    if groups is not None:
        s1, s2 = (s.unflatten(0, (groups, -1)).sum(1) for s in (s1, s2))
    return s1, s2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_bench_riemann_accumulate(benchmark, timed, device, provider, shape, dtype):
    if provider == "cpp" and device != "cpu":
        pytest.skip("cpp takes CPU tensors")
    steps, rows, neurons, groups = SHAPES[shape]
    benchmark.group = f"riemann_accumulate {shape} {str(dtype).removeprefix('torch.')} {device}"
    generator = torch.Generator(device).manual_seed(0)
    grad = torch.randn(steps, rows, neurons, generator=generator, device=device).to(dtype)
    act = torch.randn(rows, neurons, generator=generator, device=device).to(dtype)
    weights = torch.rand(steps, generator=generator, device=device)
    weights_list = weights.tolist()

    def call():
        if provider == "eager":
            return eager(grad, weights_list, act, groups)
        with ops.backend(provider):
            return ops.riemann_accumulate(grad, weights, act=act, groups=groups)

    gold = eager(grad.float(), weights_list, act.float(), groups)
    for name, value, expected in zip(("s1", "s2"), call(), gold, strict=True):
        assert (value - expected).abs().max() <= 1e-5 * expected.abs().max(), f"{provider} is wrong in {name}"

    written = 2 * 4 * (rows if groups is None else groups) * neurons
    timed(call, (grad.numel() + act.numel()) * dtype.itemsize + written)
