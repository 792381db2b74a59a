"""Scores of one sample by an integrator that is not ours: scipy's, of the whole vector of a layer at a time, from the
definition (`slow_reference`), along a given path."""

import re

import numpy as np
import torch
from scipy.integrate import quad_vec
from slow_reference import TEXT, VISION, _run, text_positions, vision_positions


def oracle(model, sample, path=None, modality="text", positions="last_prompt", objective="logprob", score="igi"):
    """(scores [L,F] float64, their error [L] by the integrator's own account) of one sample. path [L,k]: scaled in the
    layers below the one that is scored; None for none."""
    pattern = TEXT if modality == "text" else VISION
    layers = [m for name, m in model.named_modules() if re.fullmatch(pattern, name)]
    clean = [a.flatten(0, -2) for a in _run(model, sample, layers, {}, None, objective)[0]]
    tokens = len(clean[0])
    rows = text_positions(sample, positions) if modality == "text" else vision_positions(tokens, positions)
    act = [a[rows] for a in clean]
    scores, errors = [], []
    for layer, own in enumerate(act):
        masks = [torch.zeros_like(own[0], dtype=torch.bool) for _ in range(layer)]
        if path is not None:
            for mask, chosen in zip(masks, path, strict=False):
                mask[chosen[chosen >= 0]] = True

        def integrand(alpha, layer=layer, own=own, masks=masks):
            earlier = [torch.where(mask, alpha * a, a) for mask, a in zip(masks, act, strict=False)]
            leaf = (alpha * own).requires_grad_()
            value = _run(model, sample, layers, dict(enumerate([*earlier, leaf])), rows, objective)[1]
            (gradient,) = torch.autograd.grad(value, [leaf], allow_unused=True)
            gradient = torch.zeros_like(own) if gradient is None else gradient
            return (own * gradient if score == "igi" else gradient.square()).sum(0).detach().double().numpy()

        found, off = quad_vec(integrand, 0, 1, epsabs=1e-10, epsrel=1e-6, norm="2", limit=200)
        scores.append(found)
        errors.append(off)
    return torch.tensor(np.stack(scores)), torch.tensor(errors)
