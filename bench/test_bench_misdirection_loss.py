"""misdirection_loss, forward and backward, against the formula in plain torch.

Bytes: hidden read twice, its gradient written once.
"""

import pytest
import torch
from shapes import DEVICE, DTYPES, GPU, label, providers, randn

# (rows, width, whether half of the rows are masked)
SHAPES = [(64, 2048, False), (64, 11008, False), (1024, 2048, False), (512, 3584, True)]
if GPU:
    SHAPES += [(4096, 3584, False), (16384, 5120, True)]


def formula(hidden, target, mask):
    squares = (hidden.float() - target.float()).square()
    if mask is None:
        return squares.mean()
    return torch.where(mask[:, None], squares, 0).sum() / (mask.sum() * hidden.shape[1])


def value_and_gradient(function):
    def run(hidden, target, mask):
        hidden = hidden.detach().requires_grad_()
        loss = function(hidden, target, mask)
        (loss * 0.5).backward()
        return loss.detach(), hidden.grad

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("provider", providers("formula"))
def test_bench_misdirection_loss(measure, provider, shape, dtype):
    rows, width, masked = shape
    hidden = randn(rows, width, dtype=DTYPES[dtype])
    measure(
        "misdirection_loss",
        provider,
        dict(hidden=hidden, target=randn(width, dtype=DTYPES[dtype])),
        dict(mask=torch.arange(rows, device=DEVICE) % 2 == 0 if masked else None),
        eager=formula,
        compiled=dict(formula=formula),
        moved=3 * hidden.nbytes,
        through=value_and_gradient,
    )
