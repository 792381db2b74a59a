"""`mipfast.locate` behind Captum's argument names. Captum itself is not needed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from mipfast.errors import InputError
from mipfast.model.batch import Batch, find_labels
from mipfast.model.positions import Positions
from mipfast.model.sites import find_sites
from mipfast.scoring.config import LocateConfig
from mipfast.scoring.search import choose_stack, locate


class NeuronPathIG:
    """Integrated gradients of every FFN neuron of one stack, from silent neurons to the clean run.

    With the defaults, and where zero embeddings give zero activations (no biases), this is Captum's
    LayerIntegratedGradients(f, output projection) of every layer, with attribute_to_layer_input=True and baseline zero,
    summed over positions: all layers at once, and without differentiating parameters. The path of a greedy search is in
    what `mipfast.locate` returns.

    Args:
        model: a transformers model.
        stack: "text", "vision", or the name of a stack that `find_sites` knows.

    Raises:
        ModelError: for a stack that the model does not have.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from mipfast.integrations.captum import NeuronPathIG
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> tokens = torch.arange(6)[None]
        >>> NeuronPathIG(model).attribute({"input_ids": tokens, "labels": tokens}, n_steps=3).shape
        torch.Size([1, 2, 24])
    """

    def __init__(self, model: nn.Module, stack: str = "text"):
        self.model = model
        self._where: dict[str, Any] = {"modality": stack}
        if stack not in ("text", "vision"):
            sites = find_sites(model)
            self._where = {"modality": "text" if sites[stack].name == sites.text.name else "vision", "stack": stack}

    def attribute(
        self,
        inputs: Batch,
        *,
        n_steps: int = 4,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
        positions: Positions = "all",
        search: str = "pointwise",
        **settings: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Score every neuron of the stack.

        Args:
            inputs: what model(**inputs) takes, with labels [n,S] (-100 = not scored): they are Captum's `target`, and
                `objective` says what is made of them.
            n_steps: nodes of the quadrature; four Gauss nodes are the default here.
            method: as in Captum, except that riemann_trapezoid's weights sum to 1.
            internal_batch_size: rows per pass; where n_steps times n, and in a pointwise search times the layers that
                are scored, are more, one node of one layer runs at a time, with n rows, which is the least.
            return_convergence_delta: also return the completeness residuals.
            positions: rows that are scaled, as in LocateConfig.
            search: as in LocateConfig.
            settings: further fields of LocateConfig.

        Returns:
            Scores [n,L,F] float32, and with return_convergence_delta the residuals [n,L]: Captum's delta without sign
            and relative to the change of the objective, per layer. NaN in layers that settings leave out.

        Raises:
            InputError: for inputs or settings that cannot be used.
            ModelError: for a model whose neurons cannot be found.
            DivergedError: for scores that are not finite.
        """
        if internal_batch_size is not None and internal_batch_size < 1:
            raise InputError(f"internal_batch_size={internal_batch_size}; expected at least 1 row, or None for all")
        if return_convergence_delta and settings.get("combine", "sum") != "sum":
            raise InputError(
                f"return_convergence_delta with combine={settings['combine']!r}: a product of sums has no "
                "completeness residual; use combine='sum'"
            )
        rows = n_steps * find_labels(inputs).num_samples
        if search == "pointwise":
            asked = LocateConfig(**self._where, search="pointwise", layers=settings.get("layers"))
            rows *= len(asked.scored(choose_stack(find_sites(self.model), asked).num_layers))
        config: dict[str, Any] = {
            "n_steps": n_steps,
            "method": method,
            "positions": positions,
            "search": search,
            "score": "igi",
            "residuals": "all" if return_convergence_delta else "none",
            "memory_budget": 1 if internal_batch_size and internal_batch_size < rows else "auto",
            **self._where,
            **settings,
        }
        located = locate(self.model, inputs, **config)
        if return_convergence_delta:
            residuals = [[math.nan if r is None else r for r in row] for row in located.report["residuals"]]
            return located.scores, torch.tensor(residuals)
        return located.scores
