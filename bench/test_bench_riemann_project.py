"""riemann_project against its linearity in plain torch: one product, alpha_k times it, the path's share apart.

A product per step, what the formula says, is the reference. Operations: 2 R H F.
"""

import pytest
from shapes import DTYPES, FFN, GPU, TEXT, VISION, label, named, once, providers, rand, randn

SHAPES = [*TEXT, VISION[1], VISION[-1]] if GPU else [("qwen2.5-vl-vit", 2, 256, 1), ("qwen2.5-3b", 4, 4, None)]


def linear(act, weight, alphas, neurons):
    base, factors = act @ weight.t(), alphas[:, None, None]
    if neurons is None:
        return (factors * base).to(act.dtype)
    neurons, off = once(neurons)
    moving = (act.gather(1, neurons).masked_fill(off, 0)[:, None] @ weight.t()[neurons])[:, 0]
    return (base + (factors - 1) * moving).to(act.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neurons", ["all", "path"])
@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("provider", providers("linear"))
def test_bench_riemann_project(measure, provider, shape, neurons, dtype):
    name, steps, rows, _ = shape
    hidden, width = FFN[name]
    act, weight = randn(rows, width, dtype=DTYPES[dtype]), randn(hidden, width, dtype=DTYPES[dtype], scale=0.02)
    path = named(rows, width) if neurons == "path" else None
    measure(
        "riemann_project",
        provider,
        dict(act=act, weight=weight, alphas=rand(steps)),
        dict(neurons=path),
        eager=linear,
        compiled=dict(linear=linear),
        moved=act.nbytes + weight.nbytes + steps * rows * hidden * act.itemsize,
        flops=2 * rows * hidden * width,
    )
