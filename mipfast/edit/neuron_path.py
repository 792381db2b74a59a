"""Which neurons to edit: a selection from attributions, or a random control of the same size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from mipfast.errors import InputError, check_value
from mipfast.files import load_artefact, save_artefact
from mipfast.model.sites import Sites
from mipfast.scoring.attribution import Attribution, per_label

Aggregate = Literal["mean", "union", "contrast", "snr"]
SNR_FLOOR = 0.1  # of the mean damage, added to every neuron's: without it, neurons that matter to nothing would win


class NeuronPath(dict[tuple[str, int], torch.Tensor]):
    """Which neurons to edit: {(stack name, layer): indices [k] int64, best first}.

    Args:
        neurons: the items.
        fingerprint: names and sizes of the model's stacks and a hash of its weights (`Sites.fingerprint`), by which
            `prune` and `misdirect` refuse another model's path; None checks nothing.
        origin: how it was chosen, for a report.

    Example:
        >>> import torch
        >>> from mipfast import NeuronPath
        >>> path = NeuronPath({("model.layers", 0): torch.tensor([3, 7]), ("model.layers", 1): torch.tensor([5])})
        >>> path.num_neurons, list(path.up_to("model.layers", 0))
        (3, [('model.layers', 0)])
    """

    def __init__(self, neurons: Any = (), fingerprint: dict | None = None, origin: dict | None = None):
        super().__init__(neurons)
        self.fingerprint = fingerprint or {"stacks": {}, "weights": ""}
        self.origin = origin or {}

    @property
    def num_neurons(self) -> int:
        """Of all layers together."""
        return sum(len(indices) for indices in self.values())

    @classmethod
    def select(
        cls,
        attributions: Attribution | Sequence[Attribution],
        fraction: float = 0.1,
        *,
        per_layer: int | None = None,
        aggregate: Aggregate = "mean",
        retain: Attribution | Sequence[Attribution] | None = None,
        scope: Literal["layer", "stack"] = "layer",
    ) -> NeuronPath:
        """The best neurons of every stack the attributions speak of, in the layers that were scored.

        Every sample's scores are first divided by its number of labels (IFI: its square), so that long answers do not
        dominate.

        Args:
            attributions: of the forget set; they may have the counterfactual baseline, which the origin then names.
            fraction: share of the scored layers' neurons, in (0, 1].
            per_layer: neurons of every layer, instead of fraction.
            aggregate: mean: mean forget score. contrast: minus the mean over the retain groups. union: every neuron on
                any sample's path, whatever the budget. snr: mean forget score / (D + 0.1 mean D), D the root mean
                square over the retain groups' samples, every group counted equally (docs/selection.md), its mean over
                the scored layers.
            retain: attributions with the zero baseline, each one group, for contrast and snr; without general knowledge
                beside the retain set, general knowledge is what breaks.
            scope: layer: the budget is every layer's. stack: fraction of all scored layers, wherever they are.

        Returns:
            A NeuronPath with the attributions' fingerprint, without layers that no gradient reached.

        Raises:
            InputError: for a budget of no neuron or larger than a layer, a missing retain set, attributions of
                different models or, in one stack, of different layers.

        Example:
            >>> import torch
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from mipfast import NeuronPath, locate
            >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
            >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
            >>> tokens = torch.arange(6)[None]
            >>> path = NeuronPath.select(locate(model, {"input_ids": tokens, "labels": tokens}), fraction=0.25)
            >>> {key: len(indices) for key, indices in path.items()}
            {('model.layers', 0): 6, ('model.layers', 1): 6}
        """
        forget, kept = _by_stack(attributions), _by_stack(retain or [])
        if not forget:
            raise InputError("no attributions to select from: the sequence was empty")
        check_value("aggregate", aggregate, Aggregate)
        if per_layer is None and aggregate != "union":
            check_fraction(fraction)
        fingerprints = [a.report["fingerprint"] for group in (*forget.values(), *kept.values()) for a in group]
        if any(f != fingerprints[0] for f in fingerprints):
            raise InputError("the attributions come from different models or weights; locate all of them on one")
        neurons: dict[tuple[str, int], torch.Tensor] = {}
        for stack, group in forget.items():
            if aggregate in ("contrast", "snr") and stack not in kept:
                raise InputError(f"aggregate={aggregate!r} needs retain attributions of {stack}; found none")
            layers = _same_layers(stack, [*group, *kept.get(stack, [])])
            if aggregate == "union":
                paths = torch.cat([a.path[:, layers] for a in group])
                chosen = [layer[layer >= 0].unique() for layer in paths.unbind(1)]
            else:
                score = _aggregate(group, kept.get(stack, []), aggregate, layers)
                chosen = _best(score, fraction, per_layer, scope)
            dead = set.intersection(*(set(a.report["layers_without_gradient"]) for a in group))
            neurons |= {(stack, i): c for i, c in zip(layers, chosen, strict=True) if len(c) and i not in dead}
        budget: dict[str, Any] = {"per_layer": per_layer} if per_layer else {"fraction": fraction, "scope": scope}
        baselines = sorted({a.report.get("baseline", "zero") for group in forget.values() for a in group})
        baseline = {} if baselines == ["zero"] else {"baseline": " and ".join(baselines)}
        return cls(neurons, fingerprints[0], {"aggregate": aggregate, **budget, **baseline})

    @classmethod
    def random(cls, sites: Sites, like: NeuronPath, seed: int = 0) -> NeuronPath:
        """The control: as many neurons of every layer as `like` has, drawn without replacement from all of them.

        Args:
            sites: of the model, see `find_sites`.
            like: the path whose size is taken.
            seed: of the draw.
        """
        generator = torch.Generator().manual_seed(seed)
        neurons = {
            (stack, layer): torch.randperm(sites[stack].num_neurons, generator=generator)[: len(indices)]
            for (stack, layer), indices in sorted(like.items())
        }
        return cls(neurons, sites.fingerprint(), {"aggregate": "random", "seed": seed})

    def __or__(self, other: Any) -> NeuronPath:  # type: ignore[override]
        """The neurons of both, this one's first."""
        if not isinstance(other, NeuronPath):
            return NotImplemented
        both = dict(self)
        for key, indices in other.items():
            mine = both.get(key, indices[:0])
            both[key] = torch.cat([mine, indices[~torch.isin(indices, mine)]])
        return NeuronPath(both, self.fingerprint, {"union of": [self.origin, other.origin]})

    def up_to(self, stack: str, layer: int) -> NeuronPath:
        """The path without the stack's neurons above layer, which a loss at that layer cannot train."""
        kept = {key: indices for key, indices in self.items() if key[0] != stack or key[1] <= layer}
        return NeuronPath(kept, self.fingerprint, self.origin)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write path.safetensors and path.json into the folder."""
        tensors = {f"{stack}/{layer}": indices for (stack, layer), indices in self.items()}
        save_artefact(folder, "path", tensors, {"fingerprint": self.fingerprint, "origin": self.origin})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> NeuronPath:
        """The path that save_pretrained wrote.

        Raises:
            ArtefactError: for a missing or damaged file.
        """
        tensors, facts = load_artefact(folder, "path", facts=("fingerprint", "origin"))
        split = {name: name.rsplit("/", 1) for name in sorted(tensors)}
        neurons = {(stack, int(layer)): tensors[name] for name, (stack, layer) in split.items()}
        return cls(neurons, facts["fingerprint"], facts["origin"])


def _by_stack(attributions: Attribution | Sequence[Attribution]) -> dict[str, list[Attribution]]:
    listed = [attributions] if isinstance(attributions, Attribution) else list(attributions)
    grouped: dict[str, list[Attribution]] = {}
    for attribution in listed:
        grouped.setdefault(attribution.report["stack"], []).append(attribution)
    return grouped


def _same_layers(stack: str, attributions: list[Attribution]) -> list[int]:
    """Those that all of them scored."""
    found = [a.layers for a in attributions]
    if other := next((layers for layers in found if layers != found[0]), None):
        raise InputError(
            f"attributions of {stack} have scores of layers {found[0]} and of {other}; expected the same ones in all: "
            "locate them with the same `layers`"
        )
    return found[0]


def _aggregate(forget: list[Attribution], retain: list[Attribution], how: Aggregate, layers: list[int]) -> torch.Tensor:
    """[L,F] of these L layers."""
    mean = torch.cat([per_label(a) for a in forget]).mean(0)[layers]
    if how == "contrast":
        return mean - torch.stack([per_label(a).mean(0) for a in retain]).mean(0)[layers]
    if how == "snr":
        damage = torch.stack([per_label(a).square().mean(0) for a in retain]).mean(0).sqrt()[layers]
        return mean / (damage + SNR_FLOOR * damage.mean())
    return mean


def check_fraction(fraction: float) -> None:
    """Raises InputError for a share of the neurons that is none."""
    if not 0 < fraction <= 1:
        raise InputError(f"fraction={fraction}; expected a share of the neurons in (0, 1]")


def check_ranked(aggregate: Aggregate) -> None:
    """Raises InputError for an aggregate that has no best neurons, and so no sizes to try."""
    if aggregate == "union":
        raise InputError("aggregate='union' ranks no neurons, so no size can be found; expected mean, contrast or snr")


def _best(score: torch.Tensor, fraction: float, per_layer: int | None, scope: str) -> list[torch.Tensor]:
    """Indices of the largest scores [L,F], best first, per layer."""
    num_layers, num_neurons = score.shape
    if scope not in ("layer", "stack"):
        raise InputError(f"scope={scope!r}; expected layer or stack")
    if scope == "stack":
        if per_layer is not None:
            raise InputError("per_layer and scope='stack' contradict each other; give a fraction")
        if not (k := round(fraction * score.numel())):
            raise InputError(
                f"fraction={fraction} of the stack's {score.numel()} neurons is none; expected at least one neuron's "
                f"share, {1 / score.numel():.2g}"
            )
        order = score.flatten().sort(descending=True, stable=True).indices[:k]
        return [order[order // num_neurons == layer] % num_neurons for layer in range(num_layers)]
    k = per_layer if per_layer is not None else round(fraction * num_neurons)
    if not 1 <= k <= num_neurons:
        raise InputError(f"a budget of {k} neurons per layer of {num_neurons}; expected 1 to {num_neurons}")
    return list(score.sort(dim=1, descending=True, stable=True).indices[:, :k])
