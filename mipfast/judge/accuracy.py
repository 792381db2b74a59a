"""Does the model still know the answer? Greedy accuracy of batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from mipfast.errors import DivergedError
from mipfast.model.batch import Batch, check_inputs, find_labels, without_labels
from mipfast.model.patching import frozen_eval


@dataclass(frozen=True)
class Evaluation:
    """predicted[i]: the token ids the model ranks first at question i's label positions; hits[i]: all of them right."""

    predicted: list[list[int]]
    hits: list[bool]

    @property
    def accuracy(self) -> float:
        """Percent of questions answered right; nan without questions."""
        return 100 * sum(self.hits) / len(self.hits) if self.hits else float("nan")


def evaluate(model: nn.Module, batches: Iterable[Batch], progress: bool = False) -> Evaluation:
    """Greedy accuracy over the whole vocabulary at the labelled positions, the answer's earlier tokens given.

    A question counts as right when greedy decoding would write exactly its label tokens. batches: what model(**batch)
    takes, with labels [n,S]. Raises InputError for batches without labels, DivergedError for logits that are not
    finite."""
    predicted: list[list[int]] = []
    hits: list[bool] = []
    with frozen_eval(model), torch.no_grad():
        for batch in tqdm(list(batches), desc="evaluate", disable=not progress, leave=False):
            labels = find_labels(batch)
            check_inputs(model, batch)
            logits = model(**without_labels(batch), use_cache=False).logits
            index, labelled = (tensor.to(logits.device) for tensor in (labels.index, labels.mask))
            picked = logits.gather(1, index[..., None].expand(-1, -1, logits.shape[-1]))
            if not bool(picked[labelled].amax(-1).isfinite().all()):
                raise DivergedError(
                    "the model's logits are nan or infinite: its weights are, or its dtype is too narrow"
                )
            best = picked.argmax(-1).cpu()
            for row, target, mask in zip(best, labels.target.cpu(), labels.mask.cpu(), strict=True):
                predicted.append(row[mask].tolist())
                hits.append(bool((row == target)[mask].all()))
    return Evaluation(predicted, hits)
