"""Products with frozen weights, forward and to the input, against F.linear: every weight is read once a round, as a
search reads a model's, so that no cache holds it.

FLOPs: the products. Bytes: the weights.
"""

import pytest
import torch.nn.functional as F
from shapes import FFN, GPU, label, providers, randn

from mipfast.ops import frozen_linear

pytestmark = pytest.mark.skipif(GPU or not frozen_linear._faster(), reason="torch's own products are taken here")

# (FFN, rows): 8 labels of a text, or 128 tokens, at four steps
SHAPES = [("qwen2.5-vl-vit", 32), ("qwen2.5-vl-vit", 512), ("qwen2.5-3b", 32)]
COLD = 128 * 2**20  # bytes of weights, more than a third-level cache of 32 MiB holds


@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("provider", [name for name in providers("formula") if name != "reference"])
def test_bench_linear(measure, provider, shape, gradient):
    name, rows = shape
    hidden, neurons = FFN[name]
    count = max(COLD // (4 * hidden * neurons), 2)
    weights = randn(count, neurons, hidden, scale=hidden**-0.5)
    measure(
        "linear",
        provider,
        dict(x=randn(rows, neurons if gradient else hidden), weights=weights.mT if gradient else weights),
        {},
        eager=F.linear,
        compiled=dict(formula=F.linear),
        moved=weights.nbytes,
        flops=2 * rows * weights.numel(),
        through=lambda function: lambda x, weights: [function(x, weight) for weight in weights],
    )
