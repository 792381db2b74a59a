"""One thread and a fixed seed for every test; `tests/` itself is importable (`from tiny import ...`)."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)

from accuracy import BACKENDS, DEVICE  # noqa: E402

from mipfast import ops  # noqa: E402


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def poison_empty(monkeypatch):
    """Uninitialised memory holds NaN, so that an element no kernel wrote fails the comparison."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


@pytest.fixture(params=BACKENDS)
def backend(request):
    with ops.backend(request.param):
        yield request.param


@pytest.fixture
def device(backend):
    return "cpu" if backend == "cpp" else DEVICE
