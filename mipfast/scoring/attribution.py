"""What `locate` returns: scores and path of every sample, with a report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mipfast.files import load_artefact, save_artefact


@dataclass(eq=False)
class Attribution:
    """scores [n,L,F] float32; path [n,L,k] int64, best first, -1 where a layer got no gradient. report: config, whether
    the search is approximate, baseline (zero or counterfactual) and number of counterfactuals, sign of the objective,
    completeness residuals [n][L] (None where not measured), layers without gradient, labels per sample, stack,
    fingerprint, versions."""

    scores: torch.Tensor
    path: torch.Tensor
    report: dict[str, Any] = field(default_factory=dict)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write attribution.safetensors and attribution.json."""
        save_artefact(folder, "attribution", {"scores": self.scores, "path": self.path}, self.report)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Attribution:
        """Raises ArtefactError for a missing or damaged file."""
        tensors, report = load_artefact(folder, "attribution", tensors=("scores", "path"), facts=("stack", "config"))
        return cls(tensors["scores"], tensors["path"], report)


def per_label(attribution: Attribution) -> torch.Tensor:
    """Scores [n,L,F] as if the objective were a mean over the sample's labels."""
    power = 2 if attribution.report["config"]["score"] == "ifi" else 1
    counts = torch.tensor(attribution.report["num_labels"], dtype=torch.float32)
    if attribution.report["config"]["objective"] == "loss":
        power = 0  # already a mean
    return attribution.scores / counts[:, None, None] ** power
