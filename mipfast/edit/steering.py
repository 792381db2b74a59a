"""Where RMisU steers to: a direction drawn at random, or learned so that the answer is least likely once the hidden
states are there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from mipfast.edit.config import RMisUConfig
from mipfast.errors import InputError
from mipfast.model.batch import Batch, check_many
from mipfast.model.likelihood import cross_entropy
from mipfast.model.patching import frozen_eval, unwrapped
from mipfast.model.positions import Positions, text_rows
from mipfast.model.sites import check_layer, find_sites


def steering_target(
    config: RMisUConfig, forget: torch.Tensor, kept: torch.Tensor, direction: torch.Tensor | None = None
) -> torch.Tensor:
    """Where RMisU steers to: steering_coeff times its unit times the direction.

    Args:
        config: steering_coeff, unit, direction and seed count.
        forget: [T,D], `hidden_states` of the first forget batch, before training.
        kept: [R,D], the same of retain batches.
        direction: [D], of any length, such as `learned_direction` returns; None draws what config.direction says.

    Returns:
        [D], in kept's dtype and on its device.

    Raises:
        InputError: without a direction where config says learned.

    Example:
        >>> import torch
        >>> from mipfast import RMisUConfig, steering_target
        >>> forget, kept = torch.ones(3, 4), torch.ones(5, 4)
        >>> steering_target(RMisUConfig(), forget, kept).norm()  # the retain states' mean norm
        tensor(2.)
    """
    u = draw_direction(config.direction, kept.shape[-1], config.seed) if direction is None else direction
    return target_length(config, forget, kept) * (u / u.norm()).to(kept)


def target_length(config: RMisUConfig, forget: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """steering_coeff times its unit, of the same hidden states: scalar."""
    measured = {"retain": kept, "forget": forget}.get(config.unit)
    unit = torch.ones_like(kept[0, 0]) if measured is None else measured.norm(dim=-1).mean()
    return config.steering_coeff * unit


def find_target(
    model: nn.Module,
    config: RMisUConfig,
    layer: int,
    batches: Sequence[Batch],
    forget: torch.Tensor,
    kept: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, float]]:
    """(steering_target, and of a learned direction what it is for: the mean `answer_log_prob` with hidden states on it,
    and on the draw that it began with). batches: of the forget set; the first STEPS count."""
    if config.direction != "learned":
        return steering_target(config, forget, kept), {}
    length = target_length(config, forget, kept).item()
    learned = learned_direction(model, batches, layer, config.positions, length, config.seed)
    drawn = draw_direction("gaussian", len(learned), config.seed)
    targets = {name: steering_target(config, forget, kept, u) for name, u in (("drawn", drawn), ("learned", learned))}
    values: dict[str, list[float]] = {name: [] for name in targets}
    with frozen_eval(model), torch.no_grad():
        for i in range(min(STEPS, len(batches))):
            batch = batches[i]
            for name, target in targets.items():
                values[name].append(answer_log_prob(model, batch, layer, config.positions, target).item())
    return targets["learned"], {f"answer_log_prob_{name}": fmean(some) for name, some in values.items()}


STEPS, LR = 40, 0.1


def draw_direction(kind: str, size: int, seed: int) -> torch.Tensor:
    """[size], float64, of any length, on the CPU, so that every device gets the same one. kind: gaussian, or uniform on
    [0,1) as in RMU's code (arXiv 2403.03218). Raises InputError for another kind."""
    draws = {"gaussian": torch.randn, "uniform": torch.rand}
    if kind not in draws:
        raise InputError(
            f"direction={kind!r} is not drawn; expected gaussian or uniform, or give steering_target what "
            "mipfast.learned_direction returns"
        )
    return draws[kind](size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def answer_log_prob(model: Any, batch: Batch, layer: int, positions: Positions, target: torch.Tensor) -> torch.Tensor:
    """Mean log-probability of a batch's label tokens, the hidden states behind text block `layer` being target [D] at
    the chosen positions and what they are elsewhere. Scalar, float32 at least, differentiable in the target."""
    rows = text_rows(batch, positions).index

    def replace(module: nn.Module, args: tuple, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        values = target.to(state).expand(len(rows), -1)
        moved = state.detach().flatten(0, 1).index_copy(0, rows.to(state.device), values).view_as(state)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    with find_sites(model).text.blocks[layer].register_forward_hook(replace):
        return -cross_entropy(model, batch)


def learned_direction(
    model: nn.Module,
    batches: Iterable[Batch],
    layer: int,
    positions: Positions,
    length: float,
    seed: int = 0,
    steps: int = STEPS,
) -> torch.Tensor:
    """The direction that makes the answers least likely once the hidden states stand on it.

    Minimises the batches' mean `answer_log_prob` at the target length · u: steps of Adam, a batch each, in order and
    over again, from the seed's gaussian draw, u made of unit length after every step. The right answer becomes
    unlikely, which does not make all answers equally likely: on the demo's base one wrong word takes nearly all.

    Args:
        model: a transformers model, left as it was.
        batches: of the forget set, as model(**batch) takes them, with labels.
        layer: the text block whose output is steered.
        positions: where, as in RMisUConfig.
        length: the target's, as `steering_target(RMisUConfig(), forget, kept).norm().item()` finds it.
        seed: of the draw it begins with.
        steps: of Adam.

    Returns:
        Unit vector [D], float32 at least.

    Raises:
        InputError: for no batches or one in the place of many, a layer that the model does not have, unknown
            positions, a length that is not positive and finite, and fewer steps than one.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from mipfast import learned_direction
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> tokens = torch.arange(6)[None]
        >>> batches = [{"input_ids": tokens, "labels": tokens}]
        >>> learned_direction(model, batches, layer=0, positions="last_prompt", length=3.0, steps=2).shape
        torch.Size([16])
    """
    check_many("batches", batches)
    batches = batches if isinstance(batches, Sequence | Subset) else list(batches)
    if not len(batches):
        raise InputError("0 batches; expected at least one")
    model = unwrapped(model)
    check_layer(layer, find_sites(model).text)
    if not isinstance(length, int | float) or not 0 < length < math.inf:
        raise InputError(f"length={length!r}; expected a positive number, as steering_target(...).norm().item()")
    if not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps={steps!r}; expected an integer of at least 1")
    parameter = next(model.parameters())
    size = unwrapped(model).config.get_text_config().hidden_size
    start = draw_direction("gaussian", size, seed).to(parameter.device)
    # sqrt(D) long, so that an entry is about 1 and LR means the same angle at every width
    v = (size**0.5 / start.norm() * start).to(torch.promote_types(parameter.dtype, torch.float32)).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=LR)
    with frozen_eval(model), torch.enable_grad():
        for step in range(steps):
            value = answer_log_prob(model, batches[step % len(batches)], layer, positions, length * v / v.norm())
            (v.grad,) = torch.autograd.grad(value, v)
            optimizer.step()
            with torch.no_grad():
                v *= size**0.5 / v.norm()
    return v.detach() / v.detach().norm()
