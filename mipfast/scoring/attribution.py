"""What `locate` returns: scores and path of every sample, with a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mipfast.errors import DivergedError
from mipfast.files import load_artefact, save_artefact
from mipfast.scoring.capture import Capture
from mipfast.scoring.config import LocateConfig


@dataclass(eq=False)
class Attribution:
    """What `locate` found of n samples, in one stack of L layers with F neurons each.

    Example:
        >>> import torch
        >>> from mipfast import Attribution
        >>> scores, path = torch.tensor([[[0.1, 0.9, -0.3]]]), torch.tensor([[[1, 0]]])
        >>> found = Attribution(scores, path, {"stack": "model.layers", "config": {"score": "igi"}})
        >>> found.save_pretrained("located")
        >>> Attribution.from_pretrained("located").path.tolist()
        [[[1, 0]]]
    """

    scores: torch.Tensor
    """[n,L,F] float32; NaN in layers that were not scored."""
    path: torch.Tensor
    """[n,L,k] int64: the neurons of the k largest scores, best first; -1 where a layer's gradient is missing or exactly
    zero for a sample, whose scores there are 0, and where a layer was not scored."""
    report: dict[str, Any] = field(default_factory=dict)
    """config, stack, versions and the model's fingerprint; layers, those that were scored: what is by layer is None in
    the others; whether the search is approximate; baseline (zero or counterfactual) and number of counterfactuals; sign
    of the objective; completeness residuals [n][L] (None where not measured); layers_without_gradient, those that have
    none in any sample, and without_gradient, of every sample its layers; labels per sample; self_check, the relative
    difference to plain autograd on the first samples, in one layer at one node (None where it could not be taken: out
    of memory). With tol also nodes [n][L], unconverged, the [sample, layer] whose error is above tol, and margins
    [n][L]: the k-th score minus the next over the error of the scores; below 1 the choice of the path is not
    settled."""
    error: torch.Tensor = field(default=None)  # type: ignore[assignment]  # as wide as the scores
    """[n,L] float32: estimate of ||scores - s*|| over ||scores||, or over a thousandth of the sample's largest layer's
    where that is larger (of those that were scored); s* the integral that the nodes stand for, along the path that this
    call chose. NaN for a fixed rule, and in layers that were not scored."""

    def __post_init__(self) -> None:
        if self.error is None:
            self.error = torch.full(self.scores.shape[:2], torch.nan)

    @property
    def layers(self) -> list[int]:
        """Those that were scored, ascending: all, in a report that does not say."""
        return self.report.get("layers", list(range(self.scores.shape[1])))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the scores and the path, attribution.safetensors, and the report, attribution.json.

        Args:
            folder: made where it is not there; an attribution in it is replaced.
        """
        tensors = {"scores": self.scores, "path": self.path, "error": self.error}
        save_artefact(folder, "attribution", tensors, self.report)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Attribution:
        """Read what `save_pretrained` wrote.

        Args:
            folder: the one that was written.

        Returns:
            The same attribution.

        Raises:
            ArtefactError: for a missing or damaged file.
        """
        tensors, report = load_artefact(folder, "attribution", tensors=("scores", "path"), facts=("stack", "config"))
        scores = tensors["scores"]
        return cls(scores, tensors["path"], report, tensors.get("error", torch.full(scores.shape[:2], torch.nan)))


# Entries of a report that are one for each sample; `unconverged` follows from `error`.
PER_SAMPLE = ("residuals", "num_labels", "without_gradient", "nodes", "margins")


def convergence(error: torch.Tensor, config: dict[str, Any]) -> dict[str, Any]:
    """What a report says of errors [n,L] that were controlled, NaN in layers that were not scored: unconverged; nothing
    for a fixed rule."""
    if not config.get("tol"):
        return {}
    return {"unconverged": (error > _rounded(config["tol"])).nonzero().tolist()}


def _rounded(tol: float) -> float:
    return tol * (1 + 1e-5)  # errors are float32


def converged(attribution: Attribution) -> str | None:
    """A line on how far the errors were brought down; None for a fixed rule.

    Args:
        attribution: of `locate`, or as `mipfast.streaming.read` gives it.

    Returns:
        Such as "converged to 0.01: 98.7% of 240 layers of samples; worst 0.034 (sample 3, layer 0)".

    Example:
        >>> import torch
        >>> report = {"config": {"tol": 0.01}}
        >>> scores, path = torch.ones(1, 2, 3), torch.zeros(1, 2, 1, dtype=torch.int64)
        >>> converged(Attribution(scores, path, report, torch.tensor([[0.02, 0.001]])))
        'converged to 0.01: 50.0% of 2 layers of samples; worst 0.02 (sample 0, layer 0)'
    """
    tol, layers = attribution.report["config"].get("tol"), attribution.layers
    error = attribution.error[:, layers]
    if not tol or not error.numel():
        return None
    sample, at = divmod(int(error.argmax()), len(layers))
    share = (error <= _rounded(tol)).double().mean().item()
    worst = f"worst {error.max().item():.2g} (sample {sample}, layer {layers[at]})"
    return f"converged to {tol:g}: {share:.1%} of {error.numel()} layers of samples; {worst}"


def strongest(score: torch.Tensor, top_k: int, stack: str, layers: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The neurons [n,L,k] of the largest scores [n,L,F] of these L layers, descending, ties to the lowest index.
    Raises DivergedError where a score is not finite; dtype: of the activations that it came from."""
    if not bool((finite := score.isfinite()).all()):
        layer = layers[int((~finite).any(2).any(0).int().argmax())]
        raise DivergedError(f"scores of {stack} layer {layer} are not finite; try a wider dtype than {dtype}")
    return score.sort(dim=2, descending=True, stable=True).indices[..., :top_k]


def chosen(
    captured: Capture, config: LocateConfig, s1: torch.Tensor, s2: torch.Tensor, layers: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores [n,L,F], path [n,L,k]) of these L layers, from the sums over nodes [n,L,F]."""
    score = s1 if config.score == "igi" else s2
    path = strongest(score, config.top_k, captured.stack.name, layers, captured.outputs[0].dtype)
    # both sums: the squares of a small gradient may vanish, and so may its product with activations of zero
    return score, path.masked_fill(((s1 == 0) & (s2 == 0)).all(2, keepdim=True), -1)


def per_label(attribution: Attribution) -> torch.Tensor:
    """Scores [n,L,F] as if the objective were a mean over the sample's labels; NaN in layers that were not scored."""
    power = 2 if attribution.report["config"]["score"] == "ifi" else 1
    counts = torch.tensor(attribution.report["num_labels"], dtype=torch.float32)
    if attribution.report["config"]["objective"] == "loss":
        power = 0  # already a mean
    return attribution.scores / counts[:, None, None] ** power
