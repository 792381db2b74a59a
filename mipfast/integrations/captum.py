"""`mipfast.locate` behind Captum's argument names. Captum itself is not needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mipfast.errors import InputError
from mipfast.model.batch import Batch, find_labels
from mipfast.model.positions import Positions
from mipfast.model.sites import find_sites
from mipfast.scoring.search import locate


class NeuronPathIG:
    """Integrated gradients of every FFN neuron of one stack, from silent neurons to the clean run.

    stack: "text", "vision", or the name of a stack that find_sites knows. With the defaults, and where zero embeddings
    give zero activations (no biases), this is Captum's LayerIntegratedGradients(f, output projection) of every layer,
    with attribute_to_layer_input=True and baseline zero, summed over positions: all layers at once, and without
    differentiating parameters. The path of a greedy search is in what `mipfast.locate` returns.
    """

    def __init__(self, model: nn.Module, stack: str = "text"):
        self.model = model
        self._where = {"modality": stack}
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
        """Scores [n,L,F], and with return_convergence_delta the completeness residuals [n,L].

        inputs: what model(**inputs) takes, with labels [n,S] (-100 = not scored): they are Captum's `target`, and
        `objective` says what is made of them. n_steps, method: as in Captum, except that four Gauss nodes are the
        default here and riemann_trapezoid's weights sum to 1. internal_batch_size: rows per replay; where n_steps
        times n are more, one node runs at a time, with n rows, which is the least. The residual is Captum's delta
        without sign and relative to the change of the objective, per layer. settings: further fields of LocateConfig.

        Raises InputError, ModelError or DivergedError (see `mipfast.errors`).
        """
        if internal_batch_size is not None and internal_batch_size < 1:
            raise InputError(f"internal_batch_size={internal_batch_size}; expected at least 1 row, or None for all")
        if return_convergence_delta and settings.get("combine", "sum") != "sum":
            raise InputError(
                f"return_convergence_delta with combine={settings['combine']!r}: a product of sums has no "
                "completeness residual; use combine='sum'"
            )
        rows = n_steps * find_labels(inputs).num_samples
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
        found = locate(self.model, inputs, **config)
        if return_convergence_delta:
            return found.scores, torch.tensor(found.report["residuals"])
        return found.scores
