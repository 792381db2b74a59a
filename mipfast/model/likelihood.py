"""How likely a model finds a batch's label tokens, differentiably."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mipfast.model.batch import Batch, find_labels, read_batch, without_labels
from mipfast.model.head import label_states


def log_probs(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities [T,V] at the T scored tokens of a batch, float32 at least; their targets [T])."""
    batch, labels = read_batch(model, batch)
    with label_states(model, labels):
        logits = model(**without_labels(batch), use_cache=False).logits[labels.mask]
    return F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1), labels.target[labels.mask]


def cross_entropy(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean NLL of a batch's label tokens, scalar."""
    return F.nll_loss(*log_probs(model, batch))


def token_nll(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """NLL of every label token, one tensor per sample."""
    counts = find_labels(batch).mask.sum(1).tolist()
    return list(F.nll_loss(*log_probs(model, batch), reduction="none").split(counts))


def sample_nll(model: nn.Module, batch: Batch) -> torch.Tensor:
    """NLL(x) of every sample, summed over its label tokens: [n]."""
    return torch.stack([tokens.sum() for tokens in token_nll(model, batch)])
