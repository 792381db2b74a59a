"""How many neurons a path takes: found on the model itself, by what pruning them does to what is to be kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from mipfast.edit.neuron_path import Aggregate, NeuronPath, check_ranked
from mipfast.edit.prune import check_prunable, prune
from mipfast.edit.train import take_batches
from mipfast.errors import DivergedError, InputError
from mipfast.model.batch import Batch
from mipfast.model.fingerprint import unchanged
from mipfast.model.likelihood import token_nll
from mipfast.model.patching import frozen_eval, unwrapped
from mipfast.model.sites import find_sites
from mipfast.scoring.attribution import Attribution

log = logging.getLogger("mipfast")

RISE = 0.1  # nats of forget NLL: what counts as forgetting, and as still more of it per doubling of the path
FAR = 20  # times max_damage: two sizes in a row beyond it, and larger ones are not tried
MOST = 0.25  # of the neurons: beyond it nothing is selective


def fit_path(
    model: nn.Module,
    forget: Iterable[Batch],
    retain: Iterable[Batch],
    located: Attribution | Sequence[Attribution],
    kept: Attribution | Sequence[Attribution],
    *,
    max_damage: float = 0.01,
    aggregate: Aggregate = "snr",
) -> NeuronPath:
    """The path whose size the model itself says: as many neurons as forget, and no more than do no harm.

    Neurons are ranked once, over the whole stack. One of them is pruned, two, four, ... up to a quarter, each size with
    forward passes alone and then undone. The damage of a size is what it adds to the retain set's NLL; it need not grow
    with the size, so every one is tried, until two in a row do twenty times what is allowed. Of those that do at most
    max_damage the smallest is taken from which on the forget set's NLL rises by less than 0.1 nats per doubling. Where
    the next size is too damaging and would forget more, three in between are tried too.

    NLLs are means over samples of a sample's mean over its label tokens: nats per token, in which long answers count no
    more than short ones. As a mean, answers that become likelier make up for others that do not: give answers that the
    model knows, of which none has much to gain.

    Args:
        model: a transformers model; afterwards, and after any error or interruption, what it was, bit for bit.
        forget: re-iterable of batches as model(**batch) takes them, with labels.
        retain: the same of what is to be kept, by which damage is judged. Give others than those behind kept: the
            ranking avoids what hurts those, so that on them damage looks smaller than it is.
        located: attributions of the forget set.
        kept: attributions of what is to be kept, every one a group, as `NeuronPath.select` takes them; general
            knowledge among them. Empty for aggregate="mean".
        max_damage: nats per token that the retain set's NLL may rise by.
        aggregate: mean, contrast or snr, as in `NeuronPath.select`. Of several stacks every one gives the same share.

    Returns:
        A NeuronPath. Its origin has aggregate, scope, max_damage; neurons, their number; forgets, whether the forget
        set's NLL rises by 0.1 nats at all: where no harmless size does that, the largest of them is taken, with a
        warning; and the curve, [{"neurons", "forget", "damage"}], in nats, which begins with the unpruned model.

    Raises:
        InputError: for what `NeuronPath.select` refuses, aggregate="union", which ranks nothing, and where not one size
            is harmless.
        ModelError: for weights that a prune would not reach, as `prune` does.
        ArtefactError: for another model's attributions.
        DivergedError: where the model's own NLL is not finite.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from mipfast import fit_path, locate
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> forget, kept, retain = ({"input_ids": t, "labels": t} for t in torch.arange(18).view(3, 1, 6))
        >>> attributions = locate(model, forget, n_steps=4), locate(model, kept, n_steps=4)
        >>> path = fit_path(model, [forget], [retain], *attributions, max_damage=1.0)
        >>> [point["neurons"] for point in path.origin["curve"]], path.origin["forgets"]  # of random weights
        ([0, 1, 2, 4, 8], False)
    """
    check_ranked(aggregate)
    scores, others = ([one] if isinstance(one, Attribution) else list(one) for one in (located, kept))

    def select(share: float) -> NeuronPath:
        return NeuronPath.select(scores, share, aggregate=aggregate, retain=others, scope="stack")

    return fit_size(model, forget, retain, select, scores, max_damage)


class Size(NamedTuple):
    """What a size was found to do: nats of the forget answers' NLL, and by how much it raises the retain answers'."""

    path: NeuronPath
    forget: float
    damage: float


def fit_size(
    model: nn.Module,
    forget: Iterable[Batch],
    retain: Iterable[Batch],
    select: Callable[[float], NeuronPath],
    located: Sequence[Attribution],
    max_damage: float = 0.01,
) -> NeuronPath:
    """`fit_path` of whatever select chooses: the path of a share of every stack's neurons. located: what it chooses
    from."""
    if not 0 < max_damage < math.inf:
        raise InputError(f"max_damage={max_damage}; expected a positive number of nats, such as 0.01")
    model, (forget, retain) = unwrapped(model), take_batches(forget, retain)
    num_neurons = min((one.scores[0].numel() for one in located), default=1)  # the first size is one of each stack
    grid = [2**i for i in range(max(1, int(MOST * num_neurons)).bit_length())]
    paths = [select(size / num_neurons) for size in grid]
    sites = find_sites(model)
    check_prunable(model, [sites[one.report["stack"]] for one in located])  # before hours of forward passes
    with unchanged(model):  # every prune is undone before the next asks which model this is
        before, kept = Size(NeuronPath(), _mean_nll(model, forget), 0.0), _mean_nll(model, retain)
        if not math.isfinite(before.forget + kept):
            raise DivergedError(f"the model's NLL is {before.forget} on forget, {kept} on retain; check its weights")

        def tried(path: NeuronPath) -> Size:
            with prune(model, path):
                return Size(path, _mean_nll(model, forget), _mean_nll(model, retain) - kept)

        sizes: list[Size] = []
        for path in paths:
            sizes.append(tried(path))
            if len(sizes) > 1 and all(not one.damage <= FAR * max_damage for one in sizes[-2:]):
                break
        at = _choose(sizes, before, max_damage)
        if at is not None and at + 1 < len(sizes) and sizes[at + 1].forget - sizes[at].forget >= RISE:
            between = sorted({round(grid[at] * 2 ** (i / 4)) for i in (1, 2, 3)} - {grid[at], grid[at + 1]})
            sizes[at + 1 : at + 1] = [tried(select(size / num_neurons)) for size in between]
            at = _choose(sizes, before, max_damage)
    curve = [{"neurons": one.path.num_neurons, "forget": one.forget, "damage": one.damage} for one in (before, *sizes)]
    table = "".join("\n{neurons:>9}{forget:>13.3f}{damage:>+11.4f}".format(**point) for point in curve)
    log.info("neurons pruned, NLL of forget answers, damage to retain answers (nats per token):%s", table)
    if at is None:
        raise InputError(
            f"no size is harmless: pruning {curve[1]['neurons']} neurons raises the NLL of retain answers by "
            f"{sizes[0].damage:.3g} nats, and the best of {len(sizes)} sizes by {min(s.damage for s in sizes):.3g}; "
            f"expected at most max_damage={max_damage:g}. Rank by attributions of more of what is to stay (kept), or "
            "allow more damage"
        )
    chosen = sizes[at]
    count, forgets = chosen.path.num_neurons, chosen.forget - before.forget >= RISE
    said = f"{count} neurons: NLL of forget answers {before.forget:.3g} -> {chosen.forget:.3g}, damage "
    said += f"{chosen.damage:+.2g}"
    if forgets:
        log.info("%s", said)
    else:
        log.warning("%s: no size within max_damage=%g forgets by %g nats; the largest is taken", said, max_damage, RISE)
    found = {"max_damage": max_damage, "neurons": count, "forgets": forgets, "curve": curve}
    return NeuronPath(chosen.path, chosen.path.fingerprint, chosen.path.origin | found)


def _choose(sizes: Sequence[Size], before: Size, max_damage: float) -> int | None:
    """Which of the sizes, in order: of the harmless ones that forget the smallest that no larger one rises above by
    RISE per doubling; where none forgets the largest; None where none is harmless."""
    harmless = [i for i, one in enumerate(sizes) if one.damage <= max_damage]
    forgetting = [i for i in harmless if sizes[i].forget - before.forget >= RISE]

    def doublings(i: int, j: int) -> float:
        return math.log2(sizes[j].path.num_neurons / sizes[i].path.num_neurons)

    def at_its_floor(i: int) -> bool:
        return all(sizes[j].forget - sizes[i].forget < RISE * doublings(i, j) for j in harmless if j > i)

    return next(filter(at_its_floor, forgetting), harmless[-1] if harmless else None)


def _mean_nll(model: nn.Module, batches: Iterable[Batch]) -> float:
    with frozen_eval(model), torch.no_grad():
        samples = [tokens.mean().double() for batch in batches for tokens in token_nll(model, batch)]
    return torch.stack(samples).mean().item()
