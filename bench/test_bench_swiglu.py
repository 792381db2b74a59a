"""swiglu, the activation of a gated FFN, alone and with its backward pass, against silu(gate) * up in plain torch.

Bytes: gate and up read, the result written; with the backward pass both and the result's gradient read once more and
two gradients written.
"""

import pytest
import torch
import torch.nn.functional as F
from shapes import DEVICE, DTYPES, FFN, GPU, label, providers

# (rows, neurons): patches of a picture, labels of a text at four steps
SHAPES = [(1024, FFN["qwen2.5-vl-vit"][1]), (64, FFN["qwen2.5-3b"][1])]
if GPU:
    SHAPES += [(3072, FFN["qwen2.5-3b"][1]), (3072, FFN["qwen2.5-7b"][1]), (4096, FFN["qwen2.5-vl-vit"][1])]


def formula(gate, up):
    return F.silu(gate) * up


def value(function):
    return lambda gate, up, d_out: function(gate, up)


def value_and_gradients(function):
    def run(gate, up, d_out):
        leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, d_out)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradients", [False, True], ids=["value", "gradients"])
@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("provider", providers("formula"))
def test_bench_swiglu(measure, provider, shape, gradients, dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)
    gate, up, d_out = (torch.randn(shape, generator=generator, device=DEVICE).to(DTYPES[dtype]) for _ in range(3))
    measure(
        "swiglu",
        provider,
        dict(gate=gate, up=up, d_out=d_out),
        {},
        eager=formula,
        compiled=dict(formula=formula),
        moved=(8 if gradients else 3) * gate.nbytes,
        through=value_and_gradients if gradients else value,
    )
