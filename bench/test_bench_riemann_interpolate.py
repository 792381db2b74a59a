"""riemann_interpolate against a copy, and a scatter of the path's neurons.

Bytes: act read once, m rows written.
"""

import pytest
import torch
from shapes import DEVICE, DTYPES, FFN, GPU, TEXT, VISION, label, providers, rand, randn

SHAPES = [*TEXT, VISION[1], VISION[-1]] if GPU else [("qwen2.5-vl-vit", 2, 1024, 1), ("qwen2.5-3b", 4, 64, None)]
PATH = 5


def copies(act, alphas, neurons):
    out = act.new_empty(len(alphas), *act.shape)
    for row, alpha in zip(out, alphas.tolist(), strict=True):
        if neurons is None:
            torch.mul(act, alpha, out=row)
        else:
            row.copy_(act).scatter_(1, neurons, act.gather(1, neurons) * alpha)
    return out


def formula(act, alphas, neurons):
    factors = alphas[:, None, None]
    if neurons is not None:
        factors = torch.ones_like(act, dtype=torch.float32).expand(len(alphas), -1, -1)
        index = neurons.expand(len(alphas), -1, -1)
        factors = factors.scatter(2, index, alphas[:, None, None].expand_as(index))
    return (factors * act.float()).to(act.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neurons", ["all", "path"])
@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("provider", providers("formula"))
def test_bench_riemann_interpolate(measure, provider, shape, neurons, dtype):
    name, steps, rows, _ = shape
    act = randn(rows, FFN[name][1], dtype=DTYPES[dtype])
    path = torch.rand(rows, FFN[name][1], device=DEVICE).topk(PATH).indices if neurons == "path" else None
    measure(
        "riemann_interpolate",
        provider,
        dict(act=act, alphas=rand(steps)),
        dict(neurons=path),
        eager=copies,
        compiled=dict(formula=formula),
        moved=(1 + steps) * act.nbytes,
    )
