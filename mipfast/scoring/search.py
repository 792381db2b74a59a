"""Integrated gradients of FFN neurons along a greedy path through the layers: IGI for text, IFI for vision.

MIP-Editor (arXiv 2511.06793) sections 3.1-3.2; where its released code differs from the definitions here, the
definitions are the ones with a completeness theorem.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from mipfast.errors import InputError, ModelError, configured
from mipfast.files import versions
from mipfast.model.accelerated import accelerated
from mipfast.model.batch import BATCH, Batch, Labels
from mipfast.model.patching import frozen_eval, lock_of, unwrapped
from mipfast.model.positions import text_rows
from mipfast.model.remembered import remembered
from mipfast.model.sites import Sites, Stack, find_sites
from mipfast.scoring import adaptive, fixed, memory
from mipfast.scoring.attribution import Attribution, convergence
from mipfast.scoring.capture import NATIVE, Capture, capture, with_baseline
from mipfast.scoring.config import LocateConfig
from mipfast.scoring.joint import joint_search, released_vision
from mipfast.scoring.plan import plan
from mipfast.scoring.self_check import difference, first_samples, plain_scores, replayed_scores

log = logging.getLogger("mipfast")


def locate(
    model: nn.Module,
    batch: Batch | Iterable[Batch],
    config: LocateConfig | None = None,
    *,
    counterfactuals: Batch | Iterable[Batch] | None = None,
    **overrides: Any,
) -> Attribution:
    """Score every FFN neuron of one tower for every sample, and follow the influential path.

    MIP-Editor (arXiv 2511.06793) 3.1-3.2. With a_lpj the clean activation of neuron j at position p in layer l, and
    nodes alpha_k with weights w_k on [0, 1], IGI is score_l(j) = sum_p a_lpj sum_k w_k dF_k/da_lpj, and IFI is
    sum_k w_k sum_p (dF_k/da_lpj)^2. In layers before l the clean activations stand at the chosen positions with the
    path's entries times alpha_k; in layer l alpha_k times all. docs/search.md says how exact and how dear each search
    is.

    The model is left as it was found. Threads may locate at the same time: on two models side by side, on one model one
    after the other.

    Args:
        model: a transformers model, in whatever mode; see `find_sites`.
        batch: what model(**batch) takes, with labels [n,S] int64 (-100 = not scored), or an iterable of such. For
            positions="subject" also subject [n,S] bool or int, true on the tokens of what is asked about; the model is
            not given it.
        config: how neurons are scored; None is LocateConfig().
        counterfactuals: batches aligned with the one batch (labels of its shape, as many chosen positions per sample),
            such as the same questions about other people. With b the mean of their clean activations,
            b + alpha_k (a - b) stands wherever alpha_k a stood, and IGI multiplies by a - b: what the batches share
            scores nothing. Costs one forward pass per batch; only with combine="sum".
        **overrides: fields of LocateConfig, in place of config's.

    Returns:
        Scores [n,L,F] float32 and path [n,L,k] int64 of all batches' samples in order, on the CPU, and a report. NaN
        and -1 in layers that config.layers leaves out.

    Raises:
        InputError: for a config or a batch that cannot be used, or one sample that does not fit into memory.
        ModelError: for a model without known FFNs.
        DivergedError: for activations or scores that are not finite.

    Example:
        >>> import torch
        >>> from mipfast import locate
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes))
        >>> batch = {"input_ids": torch.tensor([[5, 7, 9, 11]]), "labels": torch.tensor([[-100, -100, -100, 11]])}
        >>> found = locate(model, batch, top_k=3)
        >>> found.scores.shape, found.path.shape
        (torch.Size([1, 2, 24]), torch.Size([1, 2, 3]))
        >>> found.path[0, 0, 0] == found.scores[0, 0].argmax()
        tensor(True)
    """
    config = configured(LocateConfig, config, overrides).resolved()
    assert config.positions is not None
    nodes, weights = config.rule() if config.tol is None else (torch.tensor([0.5]), torch.ones(1))
    sites = find_sites(model)
    stack = choose_stack(sites, config)
    model = unwrapped(model)
    if not 1 <= config.top_k <= stack.num_neurons:
        raise InputError(f"top_k={config.top_k} of {stack.num_neurons} neurons per layer of {stack.name}; lower top_k")
    layers = config.scored(stack.num_layers)
    if not isinstance(batch, Iterable):
        raise InputError(f"found a {type(batch).__name__} in the place of a batch; {BATCH}")
    batches = [batch] if isinstance(batch, Mapping) else batch
    others = _counterfactuals(batch, counterfactuals, config)
    parts: list[Located] = []
    if any(p.is_inference() for p in model.parameters()):
        raise ModelError(
            "the model was made or moved inside torch.inference_mode(), and torch takes no gradient through such "
            "weights: load it outside, or under torch.no_grad()"
        )
    with lock_of(model), torch.inference_mode(False), frozen_eval(model), ExitStack() as faster:
        call = _Call(model, sites, stack, config, nodes, weights, remembered(model))
        for one in tqdm(batches, desc=f"locate {config.modality}", disable=not config.progress):
            try:
                if config.positions == "subject":  # before anything runs, whichever sample has none that can be used
                    text_rows(one, config.positions)
                if not parts:
                    checked = _check_route(call, one, faster)
                parts.append(_with_memory(call, one, others, first=not parts))
            except InputError as error:
                raise InputError(f"batch {len(parts)}: {error}") from error
        if not parts:
            raise InputError("no batch to locate on: the iterable was empty")
        found = _concatenated(parts)
        dead = found.path[:, :, 0] < 0
    wide = partial(_of_stack, layers=layers, depth=stack.num_layers)
    off = wide(found.error, torch.nan)
    return Attribution(
        wide(found.scores, torch.nan),
        wide(found.path, -1),
        {
            "config": config.written(),
            "approximate": config.search == "one-pass",
            "baseline": "counterfactual" if others else "zero",
            "counterfactuals": len(others),
            "stack": stack.name,
            "layers": layers,
            "fingerprint": sites.fingerprint(),
            "objective": f"larger {'opposes' if config.objective == 'loss' else 'supports'} the answer",
            "residuals": [row and _by_layer(row, layers, stack.num_layers) for row in found.residuals],
            "num_labels": found.counts.tolist(),
            **_quality(found, config, layers, off),
            "layers_without_gradient": list(compress(layers, dead.all(0).tolist())),
            "without_gradient": [list(compress(layers, one)) for one in dead.tolist()],
            "self_check": checked,
            "seed": None,  # nothing here is drawn at random
            "versions": versions(),
        },
        off,
    )


def objective_value(logits: torch.Tensor, labels: Labels, objective: str) -> torch.Tensor:
    """F of every row: logits [m·n,q,V] at the label positions -> [m·n], in float32 or float64."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    copies = len(logits) // labels.num_samples
    target = labels.target.to(logits.device).repeat(copies, 1)[..., None]
    mask = labels.mask.to(logits.device).repeat(copies, 1)
    if objective == "log_odds":
        logits = logits.to(dtype)
        chosen = logits.gather(-1, target) - logits.scatter(-1, target, -torch.inf).logsumexp(-1, keepdim=True)
    else:  # forward and backward: 48 bytes per bfloat16 logit; gather - logsumexp takes 68, and three times as long
        chosen = logits.log_softmax(-1, dtype=dtype).gather(-1, target)
    per_label = chosen[..., 0].where(mask, 0)
    if objective == "prob":
        return per_label.sum(1).exp()
    if objective == "loss":
        return -per_label.sum(1) / mask.sum(1)
    return per_label.sum(1)


def _counterfactuals(
    batch: Batch | Iterable[Batch], given: Batch | Iterable[Batch] | None, config: LocateConfig
) -> Sequence[Batch]:
    """The batches whose mean is the baseline; none for the zero baseline."""
    if given is None:
        return []
    if not isinstance(batch, Mapping):
        raise InputError("counterfactuals are of one batch, found an iterable of batches; call locate once for each")
    if config.combine != "sum":
        raise InputError(f"combine={config.combine!r} is defined from zero; use combine='sum', or no counterfactuals")
    others = [given] if isinstance(given, Mapping) else list(given)
    if not others:
        raise InputError("no counterfactual batch: the iterable was empty; leave it out for the zero baseline")
    return others


def choose_stack(sites: Sites, config: LocateConfig) -> Stack:
    """The stack that a config is about. Raises InputError where the model has none."""
    if config.stack is not None:
        return sites[config.stack]
    if config.modality == "text":
        return sites.text
    if not sites.vision:
        raise InputError(
            f"modality='vision', but the model has only the text stack {sites.text.name}; expected a vision tower, or "
            "modality='text'"
        )
    return sites.vision[0]


@dataclass(frozen=True)
class Located:
    """Of n samples and the L layers that are scored: scores [n,L,F], path [n,L,k], labels [n], relative error of the
    scores [n,L], how far the k-th score lies above the next in terms of the error [n,L], nodes [n,L] (NaN and -1 where
    a fixed rule does not tell), residuals [n][L]."""

    scores: torch.Tensor
    path: torch.Tensor
    counts: torch.Tensor
    error: torch.Tensor
    margin: torch.Tensor
    nodes: torch.Tensor
    residuals: list[list[float] | None]

    @classmethod
    def by_fixed_rule(
        cls, scores: torch.Tensor, path: torch.Tensor, residuals: list[list[float] | None], counts: torch.Tensor
    ) -> Located:
        untold = torch.full(scores.shape[:2], torch.nan)
        return cls(scores, path, counts, untold, untold, torch.full_like(untold, -1, dtype=torch.int64), residuals)


@dataclass(frozen=True)
class _Call:
    """What is the same for every batch of a call; known: what is `remembered` of the model."""

    model: nn.Module
    sites: Sites
    stack: Stack
    config: LocateConfig
    nodes: torch.Tensor
    weights: torch.Tensor
    known: dict[Hashable, Any]

    @property
    def checked(self) -> set[str]:
        """What `plan` has found out about the tower."""
        return self.known.setdefault(("checked", self.stack.name), set())


def _check_route(call: _Call, batch: Batch, faster: ExitStack) -> float | None:
    """Enter the faster ways through the model, and leave them where they do not give what plain autograd gives on the
    first samples that the model was ever asked about. The relative difference; None where it could not be taken.
    Raises ModelError where the model's own code, replayed, gives something else."""
    model, config, name = call.model, call.config, type(call.model).__name__
    alpha = float(min(call.nodes, key=lambda node: abs(node - 0.5)))
    asked, expected = ("self_check", call.stack.name), None

    def objective(logits: torch.Tensor, labels: Labels) -> torch.Tensor:
        return objective_value(logits, labels, config.objective)

    assert config.positions is not None
    if asked not in call.known:
        with suppress(InputError, torch.OutOfMemoryError):  # the search says what is wrong with the whole batch
            samples = (model, call.sites, call.stack, *first_samples(model, batch, config.positions))
            expected = plain_scores(*samples, alpha, objective)
    if NATIVE not in call.checked:
        faster.enter_context(accelerated(model, call.sites.stacks, call.known))
    if expected is None or not bool(expected.isfinite().all()):
        return call.known.get(asked)
    wide = expected.element_size() > 2
    with suppress(torch.OutOfMemoryError):
        for native in (False, True):
            if native:
                faster.close()
                call.checked.add(NATIVE)
            captured = capture(*samples, call.checked)
            copies = 2 if memory.copies_that_fit(captured, config.memory_budget) > 1 else 1
            found = replayed_scores(captured, alpha, objective, copies)
            off = difference(found, expected, captured.rows.sample)
            if off <= (0.01 if wide else 0.25):  # rounding alone is .1 in bfloat16 after 15 blocks
                break
            wrong = f"{name}: {'native' if native else 'fast'} scores are off by {off:.1%} from plain autograd"
            log.warning("%s%s", wrong, "" if native else "; replaying natively")
        else:
            if wide:  # in 16 bits it may be rounding
                raise ModelError(f"{wrong}; mipfast does not know how this model runs: please report it")
        call.known[asked] = off
    return call.known.get(asked)


def _with_memory(call: _Call, batch: Batch, others: Sequence[Batch], first: bool) -> Located:
    """One batch, with as many steps per replay as memory holds; in halves where it does not hold one."""
    config = call.config
    measure = config.residuals == "all" or (config.residuals == "first" and first)
    assert config.positions is not None
    try:
        captured = capture(call.model, call.sites, call.stack, batch, config.positions, call.checked)
        if others:
            captured = with_baseline(captured, call.sites, others, config.positions)
        fitting = memory.copies_that_fit(captured, config.memory_budget)
        if fitting or captured.num_samples == 1:
            search = partial(_search if config.combine == "sum" else _joint, captured, config, call.nodes, call.weights)
            try:
                return search(max(fitting, 1), measure)
            except NotImplementedError as error:  # an autograd.Function without a forward derivative: Bloom's GELU
                lacks = f"{type(call.model).__name__} has no forward-mode derivative"
                if config.combine != "sum":
                    raise ModelError(f"{lacks}, which combine={config.combine!r} needs; use combine='sum'") from error
                log.warning("%s, so no residuals", lacks)
                return search(max(fitting, 1), False)
    except torch.OutOfMemoryError as error:
        if len(batch["labels"]) == 1:
            raise InputError(
                f"one step of one sample of {batch['labels'].shape[1]} tokens does not fit into memory; shorten it, or "
                "choose a smaller dtype"
            ) from error
    log.warning("%d samples do not fit into memory at once: going on with halves of them", len(batch["labels"]))
    halves, calls = zip(*(memory.halves(b, call.model.config) for b in (batch, *others)), strict=True), [call] * 2
    if not isinstance(config.positions, str) and (every := torch.as_tensor(config.positions)).ndim == 2:
        middle = len(batch["labels"]) // 2
        calls = [replace(call, config=replace(config, positions=p)) for p in (every[:middle], every[middle:])]
    parts = zip(calls, halves, strict=True)
    return _concatenated([_with_memory(own, half, half_others, first) for own, (half, *half_others) in parts])


def _concatenated(parts: list[Located]) -> Located:
    """The results of several batches as one, their samples in order."""

    def together(name: str) -> torch.Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    tensors = (together(name) for name in ("scores", "path", "counts", "error", "margin", "nodes"))
    scores, path, counts, error, margin, nodes = tensors
    rows = [row for part in parts for row in part.residuals]
    return Located(scores, path, counts, error, margin, nodes, rows)


def _joint(
    captured: Capture, config: LocateConfig, nodes: torch.Tensor, weights: torch.Tensor, fitting: int, measure: bool
) -> Located:
    """Joint scores, NeuronPath's or the released code's, which have no completeness to measure."""
    released, steps = config.combine == "released", min(len(nodes), fitting)
    if released and config.modality == "vision":
        scores, path = released_vision(captured, len(nodes), config.top_k)
    else:
        # at token 0, where the released code looks, there is no prefix to spare
        route = captured if released else plan(captured, clean_states=False)[0]
        scores, path = joint_search(
            route,
            nodes.split(steps),
            weights.split(steps),
            lambda logits: objective_value(logits, route.labels, config.objective),
            config.top_k,
            len(config.scored(captured.stack.num_layers)),
            greedy=config.search == "greedy",
            released=released,
        )
    return Located.by_fixed_rule(scores, path, [None] * captured.num_samples, captured.labels.mask.sum(1).cpu())


def _search(
    captured: Capture, config: LocateConfig, nodes: torch.Tensor, weights: torch.Tensor, fitting: int, measure: bool
) -> Located:
    """Layer by layer along the path, or of all layers at once where there is none."""

    def value_of(logits: torch.Tensor) -> torch.Tensor:
        return objective_value(logits, captured.labels, config.objective)

    if config.tol is not None:
        return _adaptive(captured, config, fitting, measure)
    full, search = value_of(captured.logits), fixed.greedy if config.search == "greedy" else fixed.pointwise
    scores, path, totals, at_zero = search(captured, config, nodes, weights, fitting, measure, value_of)
    residuals: list[Any] = [None] * captured.num_samples
    if at_zero is not None:
        residuals = _residuals(totals, full - at_zero)
    counts = captured.labels.mask.sum(1).cpu()
    return Located.by_fixed_rule(scores.float().cpu(), path.cpu(), residuals, counts)


def _residuals(totals: torch.Tensor, change: torch.Tensor) -> list[list[float] | None]:
    """How far totals [L,n] are from the changes of F that they should sum to, relative where these are not small."""
    off = (totals - change).abs()
    return torch.where(change.abs() < 1e-3, off, off / change.abs()).T.tolist()


def _adaptive(captured: Capture, config: LocateConfig, fitting: int, measure: bool) -> Located:
    """With as many nodes as every layer of every sample asks for."""
    search = adaptive.greedy if config.search == "greedy" else adaptive.pointwise
    scores, path, layers = search(
        captured, config, fitting, measure, partial(objective_value, objective=config.objective)
    )
    residuals: list[Any] = [None] * captured.num_samples
    if measure:
        full = objective_value(captured.logits, captured.labels, config.objective)
        totals = torch.stack([layer.s1.sum(1) + layer.carried for layer in layers])
        residuals = _residuals(totals, full - torch.stack([layer.at_zero for layer in layers]))
    norms, off = scores.norm(dim=2), torch.stack([layer.error for layer in layers], 1)
    floor = adaptive.SMALL * norms.amax(1, keepdim=True)
    ordered = scores.topk(min(config.top_k + 1, scores.shape[2]), dim=2).values
    gap = ordered[..., config.top_k - 1] - ordered[..., -1] if ordered.shape[2] > config.top_k else torch.inf
    return Located(
        scores.float().cpu(),
        path.cpu(),
        captured.labels.mask.sum(1).cpu(),
        (off / norms.maximum(floor)).nan_to_num(0.0).float().cpu(),
        (gap / off).nan_to_num(0.0, posinf=torch.finfo(torch.float32).max).float().cpu(),
        torch.tensor([layer.nodes for layer in layers]).T,
        residuals,
    )


def _of_stack(scored: torch.Tensor, empty: float, layers: list[int], depth: int) -> torch.Tensor:
    """As wide as the stack [n,depth,...], of these layers' [n,L,...]; `empty` in the others."""
    if len(layers) == depth:
        return scored
    wide = scored.new_full((len(scored), depth, *scored.shape[2:]), empty)
    wide[:, layers] = scored
    return wide


def _by_layer(row: list[Any], layers: list[int], depth: int) -> list[Any]:
    """The same of one sample's list; None, which is JSON, in the others."""
    found = dict(zip(layers, row, strict=True))
    return [found.get(layer) for layer in range(depth)]


def _quality(found: Located, config: LocateConfig, layers: list[int], error: torch.Tensor) -> dict[str, Any]:
    """What a report says of the quadrature, where its error was controlled; error [n,depth]: the stack's."""
    if config.tol is None:
        return {}
    report = convergence(error, {"tol": config.tol})
    if unconverged := report["unconverged"]:
        sample, at = divmod(int(found.error.argmax()), len(layers))
        worst = sample, layers[at], found.error.max()
        log.warning(
            "%d of %d layers of samples are not known to tol=%g after %d nodes, sample %d layer %d worst: %.2g; see "
            "Attribution.error",
            *(len(unconverged), found.error.numel(), config.tol, config.max_nodes, *worst),
        )
    rows = {"nodes": found.nodes, "margins": found.margin}
    depth = error.shape[1]
    return {name: [_by_layer(row, layers, depth) for row in rows[name].tolist()] for name in rows} | report
