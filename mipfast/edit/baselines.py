"""What RMisU is compared with: GA, GradDiff, KL minimisation, NPO, RMU, adaptive RMU and MANU, on the same data, by the
same loop, with the same report as `misdirect`.

Notation: F a forget batch, R a retain batch, CE(D) the mean cross-entropy over D's label tokens, NLL(x) the summed one
of a sample, theta0 the weights before training. Only label tokens count: prompts and padding have no part in any loss.
What a loss needs of theta0 is measured before the first step and kept; there is no second model.

To add one: a dataclass of its settings that derives from `Method` and says its lr and losses, and a line in METHODS.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from mipfast import ops
from mipfast.edit.config import RMisUConfig, check_steps
from mipfast.edit.hidden import hidden_states
from mipfast.edit.misdirect import steering_layer
from mipfast.edit.prune import check_prunable, prune
from mipfast.edit.steering import steering_target
from mipfast.edit.train import Losses, Trainable, descend, order, take_batches, training
from mipfast.errors import DivergedError, InputError, configured
from mipfast.model.batch import Batch, attended, read_batch, without_labels
from mipfast.model.likelihood import cross_entropy, log_probs, sample_nll
from mipfast.model.patching import frozen_eval, unwrapped
from mipfast.model.sites import Stack, find_sites

Numbered = Mapping[int, Batch]  # batches by their numbers
Pair = tuple[int, int]  # the numbers of a step's forget batch and its retain batch
Terms = Callable[[Pair], Iterator[Losses]]
Loss = Callable[[int], torch.Tensor]  # of the batch with a number


@dataclass(frozen=True)
class BaselineConfig:
    """How a baseline is trained."""

    steps: int | None = None
    """Optimiser steps; None takes epochs."""
    epochs: int = 1
    """Passes over the forget batches."""
    lr: float | None = None
    """Of Adam without weight decay; None is the method's own."""
    seed: int = 0
    """Of the order of batches, and RMU's direction."""
    progress: bool = False
    """Show a bar."""


class Method(ABC):
    """A loss over one forget and one retain batch per step: gamma times the one's, plus alpha times the other's."""

    gamma: float = 1.0
    alpha: float = 1.0
    lr: ClassVar[float]

    def trainable(self, model: nn.Module) -> Trainable:
        """What trains: every parameter that requires a gradient, of a PeftModel the adapter's."""
        parts: dict[str, list[torch.Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parts.setdefault(re.split(r"\.\d+\.", name)[0].removesuffix(".weight"), []).append(parameter)
        return dict(parts)

    @abstractmethod
    def losses(
        self, model: nn.Module, forget: Numbered, retain: Numbered, first: Pair, seed: int
    ) -> tuple[Loss, Loss | None]:
        """The forget loss and the retain loss, or None: called before training, when what is kept of theta0 is
        measured.

        Args:
            model: at theta0.
            forget, retain: the batches that the run will see.
            first: the first step's pair.
            seed: the config's.
        """

    def terms(self, model: nn.Module, forget: Numbered, retain: Numbered, first: Pair, seed: int) -> Terms:
        """A function from a step's pair to the terms of its loss; each goes backward before the next is computed."""
        away, held = self.losses(model, forget, retain, first, seed)

        def of(pair: Pair) -> Iterator[Losses]:
            loss = away(pair[0])
            yield Losses(self.gamma * loss, loss)
            if held:
                loss = held(pair[1])
                yield Losses(self.alpha * loss, retain=loss)

        return of


@dataclass(frozen=True)
class GA(Method):
    """Gradient ascent: L = -CE(F).

    Jang et al., arXiv 2210.01504. MLLMU-Bench: lr 2e-5, 1 epoch, batch 4. Unbounded below: few steps."""

    lr: ClassVar[float] = 2e-5

    def losses(self, model, forget, retain, first, seed):
        return lambda i: -cross_entropy(model, forget[i]), None


@dataclass(frozen=True)
class GradDiff(Method):
    """Gradient difference: L = -gamma CE(F) + alpha CE(R), both terms in every step.

    Liu et al., arXiv 2203.12817; open-unlearning: gamma = alpha = 1, lr 1e-5, 10 epochs. MLLMU-Bench and MIP-Editor
    alternate whole epochs of either term instead."""

    gamma: float = 1.0
    """Weight of the forget term."""
    alpha: float = 1.0
    """Weight of the retain term."""
    lr: ClassVar[float] = 1e-5

    def losses(self, model, forget, retain, first, seed):
        return lambda i: -cross_entropy(model, forget[i]), lambda i: cross_entropy(model, retain[i])


@dataclass(frozen=True)
class KLMin(GradDiff):
    """KL minimisation: L = -gamma CE(F) + alpha mean KL(p_theta0 || p_theta) over R's label tokens.

    Maini et al., TOFU, arXiv 2401.06121: gamma = alpha = 1, lr 1e-5. open-unlearning averages over prompts and padding
    too; MLLMU-Bench sums over tokens, which weighs the term by their number. theta0's log-probabilities over the
    vocabulary are kept on the CPU at the label tokens of the retain batches that the run will see: 2 bytes (float16) x
    tokens x vocabulary, 0.3 GB for 1000 tokens of a vocabulary of 152k."""

    dtype: Literal["float16", "float32", "float64"] = "float16"
    """Of the log-probabilities that are kept."""

    def losses(self, model, forget, retain, first, seed):
        kept = _before(retain, lambda batch: log_probs(model, batch)[0].to("cpu", getattr(torch, self.dtype)))

        def divergence(i: int) -> torch.Tensor:
            now, _ = log_probs(model, retain[i])
            return F.kl_div(now, kept[i].to(now), reduction="none", log_target=True).sum(-1).mean()

        return lambda i: -cross_entropy(model, forget[i]), divergence


@dataclass(frozen=True)
class NPO(Method):
    """Negative preference optimisation: L = gamma (2/beta) mean log(1 + (pi_theta(x)/pi_theta0(x))^beta) + alpha CE(R),
    pi(x) = exp(-NLL(x)): the probability of the whole answer.

    Zhang et al., arXiv 2404.05868: beta 0.1, lr 1e-5; alpha = 0 is NPO, alpha = 1 NPO with retain. MLLMU-Bench takes
    the batch's mean CE for NLL and a model tuned on R for theta0, CLEAR applies the formula to every word of the
    vocabulary: both are other losses. Kept of theta0: one number per forget sample."""

    beta: float = 0.1
    """How soon a sample that has become unlikely stops counting: 0 would be gradient ascent."""
    gamma: float = 1.0
    """Weight of the forget term."""
    alpha: float = 0.0
    """Weight of the retain term; 0 leaves it out."""
    lr: ClassVar[float] = 1e-5

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise InputError(f"beta={self.beta}; expected a positive number")

    def losses(self, model, forget, retain, first, seed):
        kept = _before(forget, lambda batch: sample_nll(model, batch))

        def preference(i: int) -> torch.Tensor:
            behind = sample_nll(model, forget[i]) - kept[i]
            return -2 / self.beta * F.logsigmoid(self.beta * behind).mean()

        return preference, (lambda i: cross_entropy(model, retain[i])) if self.alpha else None


@dataclass(frozen=True)
class RMU(Method):
    """Representation misdirection: L = mean ||h(F) - c u||²/D + alpha mean ||h(R) - h_theta0(R)||²/D behind block
    layer; u uniform on [0,1) and normalised. Trains the FFN output projections of the last three blocks up to it.

    Li et al., WMDP, arXiv 2403.03218; their code: layer 7, c 20, alpha 100, lr 5e-5, 80 steps, means over padding too;
    here over the attended tokens. layer None is three fifths of the depth, as in `misdirect`. Kept of theta0: the
    hidden states of the retain batches that the run will see."""

    layer: int | None = None
    """The text block behind which hidden states are steered."""
    steering_coeff: float = 20.0
    """c, in units of `unit`."""
    unit: Literal["retain", "forget", "none"] = "none"
    """The mean hidden norm of the retain batches, of the first forget batch, or 1."""
    alpha: float = 100.0
    """Weight of the retain term."""
    direction: Literal["gaussian", "uniform"] = "uniform"
    """What u is drawn from."""
    positions: str = "all"
    """Whose hidden states count, as of `misdirect`."""
    lr: ClassVar[float] = 5e-5

    def trainable(self, model):
        if self.direction not in ("gaussian", "uniform"):
            raise InputError(
                f"direction={self.direction!r}; RMU draws one, expected gaussian or uniform (misdirect learns one)"
            )
        sites = find_sites(model)
        layer = steering_layer(self, sites)
        return {
            f"{sites.text.name}/{i}": [p for p in sites.text.outputs[i].parameters() if p.requires_grad]
            for i in range(max(0, layer - 2), layer + 1)
        }

    def losses(self, model, forget, retain, first, seed):
        sites = find_sites(model)
        layer = steering_layer(self, sites)
        steering = RMisUConfig(steering_coeff=self.steering_coeff, unit=self.unit, direction=self.direction, seed=seed)

        def hidden(batch: Batch) -> torch.Tensor:
            return hidden_states(model, batch, layer, self.positions, sites)

        kept = _before(retain, hidden)
        before = _before({first[0]: forget[first[0]]}, hidden)[first[0]]
        target = steering_target(steering, before, torch.cat(list(kept.values())))
        return (
            lambda i: ops.misdirection_loss(hidden(forget[i]), target),
            lambda i: ops.misdirection_loss(hidden(retain[i]), kept[i]),
        )


@dataclass(frozen=True)
class AdaptiveRMU(RMU):
    """RMU with a target as long as c times the mean hidden norm of the first forget batch.

    Dang et al., arXiv 2408.06223; their code: layer 7, c 5, alpha 1200, lr 5e-5, 150 or 500 steps."""

    steering_coeff: float = 5.0
    unit: Literal["retain", "forget", "none"] = "forget"
    alpha: float = 1200.0


@dataclass(frozen=True)
class MANU:
    """Modality-aware neuron unlearning: prune the neurons with the largest sum_k w_k (I_k(F) / (I_k(R) + 1e-5) - 1).

    z: a neuron's activation, clamped to ±1000. I_abs = E|z|, I_freq = P(|z| > 0.1), I_var = std z, I_rms = sqrt E z²;
    w = 2, 0, 2, 2. Liu et al., arXiv 2502.15910, and their code: 2 % of the vision towers' units and 2 % of the
    language model's, each ranked across layers. Adapted to neurons: z is what the output projection reads, where MANU
    prunes outputs of gate, up and down; all layers take part, where MANU lists three; E runs over all attended tokens,
    where MANU averages within a batch and then over positions. The language model's z come from every batch, the vision
    towers' from those with pixel_values."""

    fraction: float = 0.02
    """Of the neurons of the language model, and of the vision towers together."""
    weights: tuple[float, float, float, float] = (2.0, 0.0, 2.0, 2.0)
    """w: of I_abs, I_freq, I_var, I_rms."""

    def path(self, model: nn.Module, forget: Iterable[Batch], retain: Iterable[Batch]) -> dict[tuple[str, int], Any]:
        """{(stack, layer): indices}, for `prune`. Raises InputError for a fraction outside (0, 1]."""
        if not 0 < self.fraction <= 1:
            raise InputError(f"fraction={self.fraction}; expected a share of the neurons in (0, 1]")
        stacks = find_sites(model).stacks
        with frozen_eval(model), torch.no_grad():
            of_forget, of_retain = (_importances(model, stacks, batches) for batches in (forget, retain))
        neurons = {}
        groups = [stacks[:1], [stack for stack in stacks[1:] if {stack.name} <= of_forget.keys() & of_retain.keys()]]
        for group in filter(None, groups):
            scores = torch.cat([self._scores(of_forget[s.name], of_retain[s.name]).flatten() for s in group])
            best = scores.topk(round(self.fraction * len(scores))).indices
            start = 0
            for stack in group:
                for layer in range(stack.num_layers):
                    inside = (best >= start) & (best < start + stack.num_neurons)
                    if bool(inside.any()):
                        neurons[stack.name, layer] = best[inside] - start
                    start += stack.num_neurons
        return neurons

    def _scores(self, forget: torch.Tensor, retain: torch.Tensor) -> torch.Tensor:
        """[L,F] from two [4,L,F]."""
        scores = torch.einsum("k,klf->lf", torch.tensor(self.weights).to(forget), forget / (retain + 1e-5) - 1)
        if not bool(scores.isfinite().all()):
            raise DivergedError("the neurons' activations are not finite; check the model's weights and dtype")
        return scores


METHODS: dict[str, Method | MANU] = {
    "ga": GA(),
    "graddiff": GradDiff(),
    "kl": KLMin(),
    "npo": NPO(),
    "npo+retain": NPO(alpha=1.0),
    "rmu": RMU(),
    "adaptive-rmu": AdaptiveRMU(),
    "manu": MANU(),
}
"""By the names that `run` takes; settings are the papers'."""


def run(
    model: nn.Module,
    method: str | Method | MANU,
    forget: Iterable[Batch],
    retain: Iterable[Batch],
    config: BaselineConfig | None = None,
) -> dict[str, Any]:
    """Unlearn in place by a method that RMisU is compared with.

    Trained is, in eval mode, every parameter that requires a gradient (freeze what should stay; of a PeftModel the
    adapter), RMU's three projections, or nothing: MANU prunes for good. After any error or interruption the model is
    what it was, bit for bit: what trains is kept on the CPU meanwhile.

    Args:
        model: a transformers model.
        method: a name in METHODS, or an instance with other settings.
        forget: a re-iterable of batches as model(**batch) takes them, with labels. A step takes one forget and one
            retain batch, in the order that `misdirect` takes them with the same seed.
        retain: likewise.
        config: length, learning rate, seed.

    Returns:
        A report with the keys of `misdirect`'s, of MANU also the "path".

    Raises:
        InputError: for an unknown method, or where nothing could train.
        ModelError: for weights that training, or MANU's prune, would not reach: offloaded, sharded or quantised.
        DivergedError: for a loss that is not finite.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from mipfast import baselines
        >>> size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2))
        >>> forget, retain = ({"input_ids": ids, "labels": ids} for ids in torch.randint(32, (2, 1, 5)))
        >>> report = baselines.run(model, "graddiff", [forget], [retain], baselines.BaselineConfig(steps=3))
        >>> report["method"], report["steps"], len(report["forget_loss"])
        ('GradDiff', 3, 3)
        >>> sorted(baselines.METHODS)
        ['adaptive-rmu', 'ga', 'graddiff', 'kl', 'manu', 'npo', 'npo+retain', 'rmu']
    """
    started = time.monotonic()
    config = configured(BaselineConfig, config, {})
    method = METHODS.get(method, method) if isinstance(method, str) else method
    if not isinstance(method, Method | MANU):
        raise InputError(f"method={method!r}; expected {', '.join(METHODS)}, or an instance of mipfast.baselines'")
    forget, retain = take_batches(forget, retain)
    model = unwrapped(model)
    if isinstance(method, MANU):
        check_prunable(model, find_sites(model).stacks)
        path = method.path(model, forget, retain)
        prune(model, path).commit()
        return _report(method, config, started, path=path, steps=0, trained={}, forget_loss=[], retain_loss=[])
    lr = method.lr if config.lr is None else config.lr
    config = replace(config, lr=lr)
    check_steps(config)
    trainable = method.trainable(model)
    if not any(trainable.values()):
        raise InputError(f"{type(method).__name__} has nothing to train: no parameter it edits requires a gradient")
    steps = config.steps if config.steps is not None else config.epochs * len(forget)
    pairs = list(zip(*order(config.seed, (len(forget), len(retain)), steps), strict=True))
    with training(model, trainable) as leaves:
        forgotten, kept = {f: forget[f] for f, _ in pairs}, {r: retain[r] for _, r in pairs}
        terms = method.terms(model, forgotten, kept, pairs[0], config.seed)
        epoch = max(len(forget), len(retain))
        report = descend(leaves, terms, pairs, lr, epoch, type(method).__name__, config.progress)
    return _report(method, config, started, **report)


def _report(method: Any, config: BaselineConfig, started: float, **report: Any) -> dict[str, Any]:
    return report | {
        "method": type(method).__name__,
        "config": asdict(config) | asdict(method),
        "seed": config.seed,
        "seconds": time.monotonic() - started,
    }


def _before(batches: Numbered, measure: Callable[[Batch], torch.Tensor]) -> dict[int, torch.Tensor]:
    """What is measured of theta0, by the batches' numbers."""
    with torch.no_grad():
        return {i: measure(batch) for i, batch in batches.items()}


def _importances(model: nn.Module, stacks: Sequence[Stack], batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
    """{stack name: I_abs, I_freq, I_var, I_rms [4,L,F]} of the stacks that ran, in float64."""
    sums = {s.name: torch.zeros(4, s.num_layers, s.num_neurons, dtype=torch.float64) for s in stacks}
    counts = {s.name: torch.zeros(s.num_layers, 1, dtype=torch.float64) for s in stacks}

    def add(stack: Stack, layer: int, attended: torch.Tensor | None) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            z = args[0].flatten(0, -2)
            z = (z if attended is None else z[attended.flatten()]).double().clamp(-1e3, 1e3)
            moments = torch.stack([z.abs().sum(0), (z.abs() > 0.1).sum(0), z.sum(0), z.square().sum(0)])
            sums[stack.name][:, layer] += moments.cpu()
            counts[stack.name][layer] += len(z)

        return hook

    for batch in batches:
        batch, _ = read_batch(model, batch)
        seen = attended(batch)
        with ExitStack() as hooks:
            for stack in stacks:
                for layer, output in enumerate(stack.outputs):
                    which = seen if stack is stacks[0] else None
                    hooks.enter_context(output.register_forward_pre_hook(add(stack, layer, which)))
            model(**without_labels(batch), use_cache=False)
    importances = {}
    for name, moments in sums.items():
        if bool(counts[name].any()):
            size, often, mean, square = moments / counts[name].clamp_min(1)
            importances[name] = torch.stack([size, often, (square - mean**2).clamp_min(0).sqrt(), square.sqrt()])
    return importances
