"""riemann_accumulate against in-place eager, and against torch.compile of a loop over the steps and of one formula.

Bytes: the gradient and act read once, s1 and s2 written once.
"""

import pytest
import torch
from shapes import DTYPES, FFN, GPU, TEXT, VISION, label, providers, rand, randn

HEADLINE = ("qwen2.5-3b", 20, 64, None)  # the released code's 20 steps
SHAPES = [HEADLINE, *TEXT, *VISION] if GPU else [HEADLINE, ("qwen2.5-vl-vit", 2, 1024, 1)]


def in_place(grad, weights, act, groups):
    s1 = torch.zeros(grad.shape[1:], dtype=torch.float32, device=grad.device)
    s2 = torch.zeros_like(s1)
    for g, w in zip(grad.unbind(), weights.tolist(), strict=True):
        g = g.float()
        s1.add_(g, alpha=w)
        s2.addcmul_(g, g, value=w)
    s1 *= act
    return _grouped(s1, s2, groups)


def loop(grad, weights, act, groups):
    s1 = s2 = 0
    for k in range(len(grad)):
        g = grad[k].float()
        s1 = s1 + weights[k] * g
        s2 = s2 + weights[k] * g * g
    return _grouped(s1 * act, s2, groups)


def broadcast(grad, weights, act, groups):
    g, w = grad.float(), weights[:, None, None]
    return _grouped((w * g).sum(0) * act, (w * g * g).sum(0), groups)


def _grouped(s1, s2, groups):
    return (s1, s2) if groups is None else tuple(s.unflatten(0, (groups, -1)).sum(1) for s in (s1, s2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("provider", providers("loop", "broadcast"))
def test_bench_riemann_accumulate(measure, provider, shape, dtype):
    name, steps, rows, groups = shape
    neurons = FFN[name][1]
    grad, act = randn(steps, rows, neurons, dtype=DTYPES[dtype]), randn(rows, neurons, dtype=DTYPES[dtype])
    measure(
        "riemann_accumulate",
        provider,
        dict(grad=grad, weights=rand(steps), act=act),
        dict(groups=groups),
        eager=in_place,
        compiled=dict(loop=loop, broadcast=broadcast),
        moved=grad.nbytes + act.nbytes + 8 * (groups or rows) * neurons,
    )
