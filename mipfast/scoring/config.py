"""How neurons are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import Any, Literal

import torch

from mipfast.errors import InputError, check_counts, check_fields
from mipfast.model.positions import TEXT_POSITIONS, VISION_POSITIONS, Positions, check_name
from mipfast.scoring.quadrature import quadrature

# What a modality means where the config leaves it open.
DEFAULTS: dict[str, dict[str, Any]] = {
    "text": {"score": "igi", "positions": "last_prompt", "method": "gausslegendre", "n_steps": 4},
    "vision": {"score": "ifi", "positions": "all", "method": "gaussradau", "n_steps": 2},
}
ONE_PASS: dict[str, Any] = {"method": "gaussradau", "n_steps": 1}  # its one node is the clean run of every layer
# The first layer of three language models asks for 40 to 70 nodes, one sample in twenty for more.
CONTROLLED: dict[str, Any] = {"tol": 0.01, "max_nodes": 129, "method": None, "n_steps": None}
# The settings of the released code, and what may differ from them.
RELEASED: dict[str, Any] = {
    "positions": "first",
    "n_steps": 4,
    "method": "riemann_left",
    "combine": "released",
    "objective": "loss",
}
RELEASED_MAY_CHANGE = ("n_steps", "top_k", "stack", "memory_budget", "residuals", "progress")


@dataclass(frozen=True)
class LocateConfig:
    """How neurons are scored: the fields of `locate`.

    Raises:
        InputError: for a value that no call could use; the text names the field, what was found and what is expected.

    Example:
        >>> from mipfast import LocateConfig
        >>> LocateConfig().resolved().tol, LocateConfig(n_steps=4).resolved().method
        (0.01, 'gausslegendre')
        >>> LocateConfig(search="beam")
        Traceback (most recent call last):
        mipfast.errors.InputError: search='beam'; expected greedy, pointwise or one-pass
    """

    modality: Literal["text", "vision"] = "text"
    """Tower to score: text or vision."""
    score: Literal["igi", "ifi"] | None = None
    """Integrated gradient (igi) or integrated squared gradient (ifi); None is igi for text, ifi for vision."""
    positions: Positions | None = None
    """Rows that are scaled: last_prompt, answer, first, prompt, all, subject (the batch's own mark of the tokens that a
    question is about), or indices; of pictures all, first, or indices. None is last_prompt for text, all for vision."""
    tol: float | None = None
    """Relative error of a layer's scores, in the 2-norm, to which nodes are added where it is larger; None is 0.01,
    where neither n_steps nor method asks for a fixed rule. Attribution.error has what is left of it."""
    max_nodes: int | None = None
    """With tol: nodes of one layer of one sample at which to stop, with a warning; None is 129."""
    n_steps: int | None = None
    """Nodes of a fixed rule, whose error nobody watches; None with a method is 4 for text, 2 for vision."""
    method: str | None = None
    """Fixed rule: gausslegendre, gaussradau, riemann_left, riemann_right, riemann_middle or riemann_trapezoid.
    None with n_steps is gausslegendre for text, gaussradau for vision."""
    layers: Sequence[int] | None = None
    """Indices of the layers that are scored, kept ascending; None is all. A greedy search, and combine='product', score
    a layer along the path through all below it, so there they are 0..k without a gap."""
    top_k: int = 5
    """Neurons that the path keeps per layer."""
    search: Literal["greedy", "pointwise", "one-pass"] = "greedy"
    """greedy scales the path's neurons of earlier layers too; pointwise has no path.
    one-pass is approximate: the gradient at the clean run alone, of all layers at once (docs/search.md: how far)."""
    combine: Literal["sum", "product", "released"] = "sum"
    """sum is the integrated gradient, product NeuronPath's joint score; released see LocateConfig.released."""
    objective: Literal["logprob", "prob", "log_odds", "loss"] = "logprob"
    """What is differentiated; larger supports the answer, except for loss."""
    stack: str | None = None
    """Name of the vision tower, where a model has several."""
    memory_budget: int | Literal["auto"] = "auto"
    """Bytes of activations that one replay may keep; auto is most of what is free.
    Fewer steps, then fewer samples go into one replay, half where it still runs out; the scores are the same."""
    residuals: Literal["first", "all", "none"] = "first"
    """Batches of a call whose completeness residual is measured, which costs a forward pass per layer."""
    progress: bool = False
    """Show a bar over batches."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_counts(self, "top_k")
        if self.layers is not None:
            self._sort_layers(self.layers)
        if self.memory_budget != "auto" and self.memory_budget < 1:
            raise InputError(f"memory_budget={self.memory_budget}; expected 'auto' or a number of bytes")
        config = vars(self) | self._open()
        if self.search == "one-pass":
            single = {"combine": "sum", **ONE_PASS}
            if other := [f"{name}={config[name]!r}" for name, value in single.items() if config[name] != value]:
                raise InputError(
                    f"search='one-pass' with {', '.join(other)}; it has the one node alpha = 1, and combine='sum': "
                    "leave these fields open, or use search='pointwise'"
                )
        if config["tol"] is None:
            quadrature(config["method"], config["n_steps"])
        if self.tol is not None:
            self._check_tol()
        if self.max_nodes is not None and (config["tol"] is None or self.max_nodes < 5):
            raise InputError(
                f"max_nodes={self.max_nodes}; expected at least 5, and no fixed rule (n_steps, method) with it"
            )
        check_name(config["positions"], TEXT_POSITIONS if self.modality == "text" else VISION_POSITIONS)
        if self.combine == "product" and config["score"] == "ifi":
            raise InputError("combine='product' multiplies gradients and activations, score='ifi' has none: use 'igi'")
        if self.combine == "released":
            defaults = {name: field.default for name, field in self.__dataclass_fields__.items()}
            preset = defaults | DEFAULTS[self.modality] | RELEASED | {"modality": self.modality}
            # by repr: positions may be a tensor
            pairs = [(k, repr(config[k]), repr(v)) for k, v in preset.items() if k not in RELEASED_MAY_CHANGE]
            if mixed := [f"{name}={found}" for name, found, wanted in pairs if found != wanted]:
                raise InputError(
                    f"{', '.join(mixed)} cannot be mixed into the released code's settings; start from "
                    f"LocateConfig.released({self.modality!r}) and change only {', '.join(RELEASED_MAY_CHANGE)}"
                )
        if self.layers is not None and (self.search == "greedy" or self.combine == "product"):
            self._check_no_gap(self.layers)

    @classmethod
    def released(cls, modality: Literal["text", "vision"]) -> LocateConfig:
        """The settings that reproduce the released code's numbers (docs/released.md); only those in
        RELEASED_MAY_CHANGE may be changed."""
        return cls(modality=modality, score="igi" if modality == "text" else "ifi", **RELEASED)

    def resolved(self) -> LocateConfig:
        """The same with the modality's defaults in the fields that were left open."""
        return replace(self, **self._open())

    def written(self) -> dict[str, Any]:
        """The fields as JSON gives them back."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in fields.items()}

    def scored(self, num_layers: int) -> list[int]:
        """The layers that are scored, of a stack of so many, ascending. Raises InputError for one that it lacks."""
        if self.layers is None:
            return list(range(num_layers))
        if outside := [layer for layer in self.layers if layer >= num_layers]:
            raise InputError(
                f"layers={list(self.layers)}: the stack has no {', '.join(map(str, outside))}; expected indices in "
                f"0..{num_layers - 1}"
            )
        return list(self.layers)

    def _sort_layers(self, given: Sequence[int]) -> None:
        indices = [one for one in given if isinstance(one, Integral) and not isinstance(one, bool) and one >= 0]
        if not given or len(set(indices)) < len(given):
            raise InputError(
                f"layers={given!r}; expected distinct indices of layers, 0 or more, such as range(8), or None for all"
            )
        object.__setattr__(self, "layers", tuple(sorted(map(int, indices))))

    def _check_no_gap(self, layers: Sequence[int]) -> None:
        if missing := sorted(set(range(layers[-1])) - set(layers)):
            raise InputError(
                f"layers={list(layers)} with search={self.search!r}, combine={self.combine!r} leaves out "
                f"{', '.join(map(str, missing))}, and a layer is scored along the path through all below it; expected "
                f"range({layers[-1] + 1}), or search='pointwise' with combine='sum', which has no path"
            )

    def _check_tol(self) -> None:
        assert self.tol is not None
        if not 0 < self.tol < 1:
            raise InputError(f"tol={self.tol}; expected a number between 0 and 1, such as 0.01")
        given = {"n_steps": self.n_steps, "method": self.method}
        if other := [f"{name}={value!r}" for name, value in given.items() if value is not None]:
            raise InputError(f"tol={self.tol} with {', '.join(other)}, a fixed rule; leave one of them out")
        if self.combine != "sum" or self.search == "one-pass":
            raise InputError(
                f"tol={self.tol} with combine={self.combine!r}, search={self.search!r}; it controls the integrals of "
                "combine='sum' in a greedy or pointwise search: leave tol out"
            )

    def rule(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(nodes, weights) of the quadrature, see `quadrature`."""
        config = vars(self) | self._open()
        return quadrature(config["method"], config["n_steps"])

    def _open(self) -> dict[str, Any]:
        """What the fields that were left open mean."""
        defaults = dict(DEFAULTS[self.modality])
        if self.search == "one-pass":
            defaults |= ONE_PASS
        elif self.combine == "sum" and self.n_steps is None and self.method is None:
            defaults |= CONTROLLED
        return {name: value for name, value in defaults.items() if getattr(self, name) is None}
