"""Joint scores from their definition: one sample, one quadrature step, one full forward of the model at a time.

    score_l(j) = (G_l(j) + C_l) * (a_l(j) + A_l)
    G_l(j)     = sum_k w_k dF/da_l(j) at alpha_k
    C_l, A_l   = the same gradient, and the activation, summed over the entering neurons of the layers before l

NeuronPath: all path neurons enter. Released code: of each layer only the last, the weakest; the score divided by the
number of steps.
"""

import re

import torch
from slow_reference import TEXT, VISION, _run, quadrature, text_positions, vision_positions
from tiny import split


def slow_joint(model, batch, modality="text", positions="first", method="riemann_left", n_steps=4, top_k=5,
               objective="loss", only_last=False):  # fmt: skip
    """-> scores [n,L,F], path [n,L,k]; every sample must have one position."""
    samples = [split(batch, i, keep_padding=True) for i in range(len(batch["input_ids"]))]
    rule = quadrature(method, n_steps)
    found = [
        _one_sample(model, one, modality == "text", positions, rule, top_k, objective, only_last) for one in samples
    ]
    scores, path = map(torch.stack, zip(*found, strict=True))
    return (scores / n_steps if only_last else scores), path


def _one_sample(model, sample, text, positions, rule, top_k, objective, only_last):
    layers = [m for name, m in model.named_modules() if re.fullmatch(TEXT if text else VISION, name)]
    clean, _ = _run(model, sample, layers, {}, None, objective)
    rows = text_positions(sample, positions) if text else vision_positions(clean[0].shape[-2], positions)
    assert len(rows) == 1
    act = [a.flatten(0, -2)[rows[0]] for a in clean]
    scores, path = [], []
    for layer in range(len(layers)):
        gradient, carried, entered = torch.zeros_like(act[layer]), 0.0, 0.0
        for alpha, weight in zip(*rule, strict=True):
            values = [a.clone() for a in act[: layer + 1]]
            for earlier, chosen in enumerate(path):
                values[earlier][chosen] *= alpha
            values[layer] *= alpha
            leaves = [v[None].requires_grad_() for v in values]
            _, value = _run(model, sample, layers, dict(enumerate(leaves)), rows, objective)
            grads = [g[0] for g in torch.autograd.grad(value, leaves)]
            gradient += weight * grads[layer]
            for earlier, chosen in enumerate(path):
                for neuron in chosen[-1:] if only_last else chosen:
                    carried += weight * grads[earlier][neuron]
        for earlier, chosen in enumerate(path):
            for neuron in chosen[-1:] if only_last else chosen:
                entered += act[earlier][neuron]
        score = (gradient + carried) * (act[layer] + entered)
        scores.append(score)
        path.append(score.sort(descending=True, stable=True).indices[:top_k])
    return torch.stack(scores), torch.stack(path)
