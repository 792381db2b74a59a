"""Ways to get forgotten knowledge back out: what an unlearning claim has to survive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mipfast.errors import DivergedError
from mipfast.modes import held
from mipfast.positions import Batch


@contextmanager
def relearned(model: Any, batches: Iterable[Batch], lr: float = 5e-4) -> Iterator[None]:
    """The model after one Adam step per batch on all of its weights; the weights before return on the way out.

    batches: some of the forgotten knowledge, as model(**batch) takes it, with labels. Judge inside the context on the
    *rest* of it: what comes back there was hidden, not removed. Raises DivergedError for a loss that is not finite."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with held(model, model.parameters()):
            optimizer = torch.optim.Adam(model.parameters(), lr=lr)
            for step, batch in enumerate(batches):
                loss = model(**batch).loss
                if not bool(loss.isfinite()):
                    raise DivergedError(f"relearning step {step} has loss {loss.item()}; lower lr ({lr})")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        yield
    finally:
        model.load_state_dict(before)
