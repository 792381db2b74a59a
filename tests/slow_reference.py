"""Locating, from its definition: one sample, one quadrature step, one full forward of the model at a time.

Nothing is cached, batched or skipped; it is what the fast engine has to equal. FFN output projections are
found by the literal module names of the tiny models.

    a_l       clean input of block l's output projection at the chosen positions, [positions, neurons]
    F         the objective of one sample (`objective_of`)
    at alpha  in layers < l the projection's input at the chosen positions is overwritten by the clean a, its
              path entries times alpha; in layer l by alpha * a_l; everything else runs as it is
    IGI       sum over positions of a_l times the mean gradient dF/da_l along alpha
    IFI       sum over positions of the mean squared gradient
    carry     the same integral through the path entries of layers < l, so that IGI + carry = F(1) - F(0)
    baseline  b, the mean of the counterfactual batches' a, or zero: b + alpha * (a - b) stands for alpha * a, and
              IGI and carry multiply by a - b
"""

import re

import numpy as np
import torch
from tiny import split

PEFT = r"(base_model\.model\.)?"  # the wrapper of a LoRA projection bears the projection's name
TEXT = PEFT + r"(model\.((language|text)_model\.)?layers\.\d+\.mlp\.down_proj|transformer\.h\.\d+\.mlp\.c_proj"
TEXT += r"|transformer\.h\.\d+\.mlp\.dense_4h_to_h|model\.decoder\.layers\.\d+\.fc2)"
VISION = (
    PEFT + r"model\.(visual\.blocks\.\d+\.mlp\.(down_proj|fc2|linear_fc2)"
    r"|vision_(tower|model)\.(.+\.)?layers?\.\d+\.mlp\.fc2"
    r"|vision_(tower|encoder)\.transformer\.layers\.\d+\.feed_forward\.down_proj)"
)


def slow_locate(
    model,
    batch,
    modality="text",
    positions=None,
    n_steps=None,
    method=None,
    top_k=5,
    objective="logprob",
    search="greedy",
    score=None,
    stack=None,
    counterfactuals=(),
):
    """-> scores [n, L, F], path [n, L, k], residual [n, L], all in the model's own precision."""
    text = modality == "text"
    positions = positions if positions is not None else ("last_prompt" if text else "all")
    method = method or ("gausslegendre" if text else "gaussradau")
    nodes, weights = quadrature(method, n_steps or (4 if text else 2))
    score = score or ("igi" if text else "ifi")

    found = []
    for i in range(len(batch["input_ids"])):
        sample = split(batch, i, keep_padding=True)
        others = [split(other, i, keep_padding=True) for other in counterfactuals]
        rule = nodes, weights
        settings = positions, rule, top_k, objective, search, score, stack or ""
        found.append(_one_sample(model, sample, others, text, *settings))
    scores, path, residual = zip(*found, strict=True)
    return torch.stack(scores), torch.stack(path), torch.stack(residual)


def _one_sample(model, sample, others, text, positions, rule, top_k, objective, search, score, stack):
    pattern = TEXT if text else VISION
    layers = [m for name, m in model.named_modules() if re.fullmatch(pattern, name) and name.startswith(stack)]

    def clean_run(inputs):
        clean, value = _run(model, inputs, layers, {}, None, objective)
        tokens = clean[0].flatten(0, -2)
        rows = text_positions(inputs, positions) if text else vision_positions(len(tokens), positions)
        return rows, [a.flatten(0, -2)[rows] for a in clean], value

    rows, act, value = clean_run(sample)
    base = [torch.zeros_like(a) for a in act]
    for other in others:
        for total, a in zip(base, clean_run(other)[1], strict=True):
            total += a / len(others)
    away = [a - b for a, b in zip(act, base, strict=True)]

    all_scores, path, residuals = [], [], []
    for layer in range(len(layers)):
        on_path = [torch.zeros_like(act[0][0], dtype=torch.bool) for _ in range(layer)]
        if search == "greedy":
            for mask, chosen in zip(on_path, path, strict=True):
                mask[chosen[chosen >= 0]] = True

        def inputs_at(alpha, layer=layer, on_path=on_path):
            between = [b + alpha * d for b, d in zip(base, away, strict=True)]
            earlier = [torch.where(m, x, a) for m, x, a in zip(on_path, between, act, strict=False)]
            return [x.detach().requires_grad_() for x in [*earlier, between[layer]]]

        igi = torch.zeros_like(act[layer][0])
        ifi = torch.zeros_like(igi)
        carried = 0.0
        arrived = False
        for alpha, weight in zip(*rule, strict=True):
            leaves = inputs_at(alpha)
            _, at_alpha = _run(model, sample, layers, dict(enumerate(leaves)), rows, objective)
            *earlier, own = torch.autograd.grad(at_alpha, leaves, allow_unused=True)
            if own is not None:
                arrived |= bool(own.any())
                igi += weight * (away[layer] * own).sum(0)
                ifi += weight * own.square().sum(0)
            for mask, d, gradient in zip(on_path, away, earlier, strict=False):
                if gradient is not None:
                    carried += weight * (d * gradient)[:, mask].sum().item()

        scores = igi if score == "igi" else ifi
        best = torch.sort(scores, descending=True, stable=True).indices[:top_k]
        path.append(best if arrived else torch.full_like(best, -1))
        all_scores.append(scores)

        _, at_zero = _run(model, sample, layers, dict(enumerate(inputs_at(0.0))), rows, objective)
        change = (value - at_zero).item()
        error = abs(igi.sum().item() + carried - change)
        residuals.append(error if abs(change) < 1e-3 else error / abs(change))
    return torch.stack(all_scores), torch.stack(path), torch.tensor(residuals, dtype=torch.float64)


def _run(model, sample, layers, overwrite, rows, objective):
    """One full forward, {layer: [positions, F]} written over the projections' inputs: inputs, objective."""
    seen = [None] * len(layers)

    def hook(layer):
        def overwritten(module, args):
            x = args[0]
            seen[layer] = x.detach()
            if layer in overwrite:
                flat = x.flatten(0, -2).index_copy(0, rows, overwrite[layer])
                return (flat.view_as(x), *args[1:])

        return overwritten

    handles = [module.register_forward_pre_hook(hook(i)) for i, module in enumerate(layers)]
    try:
        inputs = {name: x for name, x in sample.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return seen, objective_of(logits, sample["labels"][0], objective)


def objective_of(logits, labels, name):
    """F of one sample: logits [S, V], labels [S] with -100 where nothing is scored (and never at index 0)."""
    at = _scored(labels)
    logits, target = logits[at - 1], labels[at][:, None]
    logprob = logits.log_softmax(-1).gather(-1, target).sum()
    if name == "logprob":
        return logprob
    if name == "prob":
        return logprob.exp()
    if name == "loss":
        return -logprob / len(at)
    if name == "log_odds":
        rest = logits.scatter(-1, target, -torch.inf).logsumexp(-1, keepdim=True)
        return (logits.gather(-1, target) - rest).sum()
    raise ValueError(name)


def _scored(labels):
    """Indices t >= 1 that carry a label; the logits at t - 1 predict it."""
    at = (labels != -100).nonzero()[:, 0]
    return at[at > 0]


def text_positions(sample, positions):
    labels, at = sample["labels"][0], _scored(sample["labels"][0])
    attended = sample.get("attention_mask", torch.ones_like(sample["input_ids"]))[0].nonzero()[:, 0]
    last_prompt = at[0] - 1
    if positions == "last_prompt":
        return last_prompt[None]
    if positions == "answer":
        end = int(at[0])
        while end < len(labels) and labels[end] != -100:
            end += 1
        return torch.arange(int(last_prompt), end - 1)
    if positions == "first":
        return torch.tensor([0])
    if positions == "prompt":
        return attended[attended <= last_prompt]
    if positions == "all":
        return attended
    return torch.tensor(positions)


def vision_positions(count, positions):
    """Rows of one sample in the order in which the vision tower holds them."""
    if positions == "all":
        return torch.arange(count)
    return torch.tensor([0]) if positions == "first" else torch.tensor(positions)


def quadrature(method, n):
    """Nodes and weights on [0, 1], as floats; the weights sum to 1."""
    if method == "riemann_left":
        return [i / n for i in range(n)], [1 / n] * n
    if method == "riemann_right":
        return [(i + 1) / n for i in range(n)], [1 / n] * n
    if method == "riemann_middle":
        return [(i + 0.5) / n for i in range(n)], [1 / n] * n
    if method == "riemann_trapezoid":
        ends = [0.5 if i in (0, n - 1) else 1.0 for i in range(n)]
        return [i / (n - 1) for i in range(n)], [w / (n - 1) for w in ends]
    legendre = np.polynomial.Legendre
    if method == "gausslegendre":
        x = legendre.basis(n).roots()
    elif method == "gaussradau":  # P_n - P_{n-1} vanishes at the right end
        x = (legendre.basis(n) - legendre.basis(n - 1)).roots()
        x = np.append(np.sort(x.real)[:-1], 1.0)
    else:
        raise ValueError(method)
    x = np.sort(x.real)
    moments = np.zeros(n)  # the integrals of P_0 .. P_{n-1} over [-1, 1], halved
    moments[0] = 1
    weights = np.linalg.solve(np.polynomial.legendre.legvander(x, n - 1).T, moments)
    return ((x + 1) / 2).tolist(), weights.tolist()
