"""riemann_interpolate against a copy, and a scatter of the path's neurons.

Bytes: act read once, m rows written.
"""

import pytest
import torch
from shapes import DTYPES, FFN, GPU, TEXT, VISION, label, named, once, providers, rand, randn

SHAPES = [*TEXT, VISION[1], VISION[-1]] if GPU else [("qwen2.5-vl-vit", 2, 1024, 1), ("qwen2.5-3b", 4, 64, None)]


def copies(act, alphas, neurons):
    out = act.new_empty(len(alphas), *act.shape)
    if neurons is not None:
        neurons, off = once(neurons)
        moving = act.gather(1, neurons).masked_fill(off, 0)
    for row, alpha in zip(out, alphas.tolist(), strict=True):
        if neurons is None:
            torch.mul(act, alpha, out=row)
        else:
            row.copy_(act).scatter_add_(1, neurons, moving * (alpha - 1))
    return out


def formula(act, alphas, neurons):
    factors = alphas[:, None, None]
    if neurons is not None:
        neurons, off = once(neurons)
        index = neurons.expand(len(alphas), -1, -1)
        change = (alphas - 1)[:, None, None].expand_as(index).masked_fill(off, 0)
        factors = torch.ones_like(act, dtype=torch.float32).expand(len(alphas), -1, -1).scatter_add(2, index, change)
    return (factors * act.float()).to(act.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neurons", ["all", "path"])
@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("provider", providers("formula"))
def test_bench_riemann_interpolate(measure, provider, shape, neurons, dtype):
    name, steps, rows, _ = shape
    act = randn(rows, FFN[name][1], dtype=DTYPES[dtype])
    path = named(rows, FFN[name][1]) if neurons == "path" else None
    measure(
        "riemann_interpolate",
        provider,
        dict(act=act, alphas=rand(steps)),
        dict(neurons=path),
        eager=copies,
        compiled=dict(formula=formula),
        moved=(1 + steps) * act.nbytes,
    )
