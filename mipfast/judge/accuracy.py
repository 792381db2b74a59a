"""Does the model still know the answer? Greedy accuracy of batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from mipfast.errors import DivergedError
from mipfast.judge import metrics
from mipfast.model.batch import Batch, read_batch, without_labels
from mipfast.model.patching import frozen_eval, unwrapped


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found, a question at a time."""

    predicted: list[list[int]]
    """The token ids that the model ranks first at the question's label positions."""
    token_hits: list[list[bool]]
    """Whether each of them is right."""

    @property
    def hits(self) -> list[bool]:
        """Whether all of a question's tokens are right."""
        return [all(tokens) for tokens in self.token_hits]

    @property
    def accuracy(self) -> float:
        """Percent of questions answered right; nan without questions."""
        return 100 * sum(self.hits) / len(self.hits) if self.token_hits else float("nan")

    @property
    def exact_memorisation(self) -> list[float]:
        """`metrics.exact_memorisation` of every question, in [0, 1]."""
        return [metrics.exact_memorisation(tokens) for tokens in self.token_hits]

    @property
    def extraction_strength(self) -> list[float]:
        """`metrics.extraction_strength` of every question, in [0, 1]."""
        return [metrics.extraction_strength(tokens) for tokens in self.token_hits]


def evaluate(model: nn.Module, batches: Iterable[Batch], progress: bool = False) -> Evaluation:
    """Greedy accuracy over the whole vocabulary at the labelled positions, the answer's earlier tokens given.

    A question counts as right when greedy decoding would write exactly its label tokens.

    Args:
        model: a transformers model.
        batches: of what model(**batch) takes, with labels [n,S], -100 where nothing is asked.
        progress: show a bar.

    Returns:
        What the model ranks first for every question, in order, whether it is right, and how much of the answer is
        memorised.

    Raises:
        InputError: for a batch without labels.
        DivergedError: for logits that are not finite.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from mipfast import evaluate
        >>> size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2)).eval()
        >>> ids = torch.tensor([[3, 5, 7]])
        >>> answer = int(model(ids).logits[0, 1].argmax())  # what the model would write after 3, 5
        >>> found = evaluate(model, [{"input_ids": ids, "labels": torch.tensor([[-100, -100, answer]])}])
        >>> found.predicted == [[answer]], found.accuracy, found.extraction_strength
        (True, 100.0, [1.0])
    """
    model = unwrapped(model)
    predicted: list[list[int]] = []
    token_hits: list[list[bool]] = []
    with frozen_eval(model), torch.no_grad():
        for batch in tqdm(list(batches), desc="evaluate", disable=not progress, leave=False):
            batch, labels = read_batch(model, batch)
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
                token_hits.append((row == target)[mask].tolist())
    return Evaluation(predicted, token_hits)
