"""How neurons are scored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from mipfast.errors import InputError
from mipfast.model.positions import TEXT_POSITIONS, VISION_POSITIONS, Positions, check_name
from mipfast.scoring.quadrature import quadrature

# What a modality means where the config leaves it open: score, positions, method, n_steps.
DEFAULTS: dict[str, dict[str, Any]] = {
    "text": {"score": "igi", "positions": "last_prompt", "method": "gausslegendre", "n_steps": 4},
    "vision": {"score": "ifi", "positions": "all", "method": "gaussradau", "n_steps": 2},
}
ONE_PASS: dict[str, Any] = {"method": "gaussradau", "n_steps": 1}  # its one node is the clean run of every layer
OBJECTIVES = ("logprob", "prob", "log_odds", "loss")
RELEASED_MAY_CHANGE = (
    "n_steps",
    "top_k",
    "stack",
    "memory_budget",
    "residuals",
    "progress",
)  # may differ from the `released` preset


@dataclass(frozen=True)
class LocateConfig:
    """How neurons are scored.

    modality: which tower. score: igi (integrated gradient) or ifi (integrated squared gradient); None, like positions,
    n_steps and method, takes the modality's default: text igi, last_prompt, 4 nodes of gausslegendre; vision ifi, all
    patches, 2 nodes of gaussradau. top_k: neurons the path keeps per layer. search: greedy (the path's earlier neurons
    are scaled too), pointwise (no path), or one-pass, which is approximate: the gradient at the clean run alone, of all
    layers at once (docs/search.md says how far off). combine: sum (integrated gradient), product (NeuronPath's joint
    score), released (see LocateConfig.released). objective: logprob, prob, log_odds (larger supports the answer) or
    loss. stack: name of the vision tower where a model has several. memory_budget: bytes of activations one replay may
    keep, or "auto": most of what is free. Fewer steps, then fewer samples go into one replay, and where it still runs
    out of memory the search goes on with half; the scores are the same. residuals: for which batches of a call the
    completeness residual is measured, which costs a forward pass per layer: the first, all or none. progress: a bar
    over batches.
    """

    modality: Literal["text", "vision"] = "text"
    score: Literal["igi", "ifi"] | None = None
    positions: Positions | None = None
    n_steps: int | None = None
    method: str | None = None
    top_k: int = 5
    search: Literal["greedy", "pointwise", "one-pass"] = "greedy"
    combine: Literal["sum", "product", "released"] = "sum"
    objective: Literal["logprob", "prob", "log_odds", "loss"] = "logprob"
    stack: str | None = None
    memory_budget: int | Literal["auto"] = "auto"
    residuals: Literal["first", "all", "none"] = "first"
    progress: bool = False

    @classmethod
    def released(cls, modality: Literal["text", "vision"]) -> LocateConfig:
        """The settings that reproduce the released code's numbers (docs/released.md); only those in
        RELEASED_MAY_CHANGE may be changed."""
        return cls(
            modality=modality,
            score="igi" if modality == "text" else "ifi",
            positions="first",
            n_steps=4,
            method="riemann_left",
            combine="released",
            objective="loss",
        )

    def resolved(self) -> LocateConfig:
        """The same with the modality's defaults filled in. Raises InputError for a value that is not one of the
        above."""
        choices = {
            "modality": tuple(DEFAULTS),
            "score": (None, "igi", "ifi"),
            "search": ("greedy", "pointwise", "one-pass"),
            "combine": ("sum", "product", "released"),
            "objective": OBJECTIVES,
            "residuals": ("first", "all", "none"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r}; expected one of {', '.join(map(str, allowed))}")
        if self.memory_budget != "auto" and not (isinstance(self.memory_budget, int) and self.memory_budget > 0):
            raise InputError(f"memory_budget={self.memory_budget!r}; expected 'auto' or a number of bytes")
        defaults = DEFAULTS[self.modality] | (ONE_PASS if self.search == "one-pass" else {})
        config = replace(self, **{k: v for k, v in defaults.items() if getattr(self, k) is None})
        if config.search == "one-pass":
            single = {"combine": "sum", **ONE_PASS}
            other = [f"{k}={getattr(config, k)!r}" for k, v in single.items() if getattr(config, k) != v]
            if other:
                raise InputError(
                    f"search='one-pass' with {', '.join(other)}; it has the one node alpha = 1, and combine='sum': "
                    "leave these fields open, or use search='pointwise'"
                )
        assert config.method is not None and config.n_steps is not None  # the defaults filled them
        quadrature(config.method, config.n_steps)
        named = TEXT_POSITIONS if config.modality == "text" else VISION_POSITIONS
        check_name(config.positions, named)
        if config.combine == "product" and config.score == "ifi":
            raise InputError("combine='product' multiplies gradients and activations, score='ifi' has none: use 'igi'")
        if config.combine == "released":
            preset = LocateConfig.released(config.modality)
            # by repr: positions may be a tensor
            pairs = [
                (k, repr(v), repr(getattr(config, k))) for k, v in vars(preset).items() if k not in RELEASED_MAY_CHANGE
            ]
            mixed = [f"{name}={found}" for name, wanted, found in pairs if found != wanted]
            if mixed:
                raise InputError(
                    f"{', '.join(mixed)} cannot be mixed into the released code's settings; start from "
                    f"LocateConfig.released({config.modality!r}) and change only {', '.join(RELEASED_MAY_CHANGE)}"
                )
        return config
