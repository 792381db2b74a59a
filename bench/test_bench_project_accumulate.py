"""project_accumulate against one float32 product of all steps and one pass over it.

The other plain spelling, the steps' sum of grad_out times W for s1 and a product per step for s2, is the reference.
Operations: 2 m R H F, for s2; s1 alone would need only 2 R H F.
"""

import pytest
import torch
from shapes import DTYPES, FFN, GPU, TEXT, VISION, label, providers, rand, randn

SHAPES = [*VISION, *TEXT] if GPU else [("qwen2.5-vl-vit", 2, 256, 1), ("qwen2.5-3b", 4, 4, None)]


def products(grad_out, weight, weights, act, groups):
    grad = grad_out @ weight if GPU else grad_out.float() @ weight.float()
    s1 = torch.zeros(grad.shape[1:], dtype=torch.float32, device=grad.device)
    s2 = torch.zeros_like(s1)
    for g, w in zip(grad, weights.tolist(), strict=True):
        g = g.float()
        s1.add_(g, alpha=w)
        s2.addcmul_(g, g, value=w)
    s1 *= act
    return (s1, s2) if groups is None else tuple(s.unflatten(0, (groups, -1)).sum(1) for s in (s1, s2))


def formula(grad_out, weight, weights, act, groups):
    grad, w = (grad_out @ weight if GPU else grad_out.float() @ weight.float()).float(), weights[:, None, None]
    s1, s2 = (w * grad).sum(0) * act, (w * grad * grad).sum(0)
    return (s1, s2) if groups is None else tuple(s.unflatten(0, (groups, -1)).sum(1) for s in (s1, s2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("provider", providers("formula"))
def test_bench_project_accumulate(measure, provider, shape, dtype):
    name, steps, rows, groups = shape
    hidden, neurons = FFN[name]
    grad_out = randn(steps, rows, hidden, dtype=DTYPES[dtype])
    weight = randn(hidden, neurons, dtype=DTYPES[dtype], scale=0.02)
    act = randn(rows, neurons, dtype=DTYPES[dtype])
    measure(
        "project_accumulate",
        provider,
        dict(grad_out=grad_out, weight=weight, weights=rand(steps), act=act),
        dict(groups=groups),
        eager=products,
        compiled=dict(formula=formula),
        moved=grad_out.nbytes + weight.nbytes + act.nbytes + 8 * (groups or rows) * neurons,
        flops=2 * steps * rows * hidden * neurons,
    )
