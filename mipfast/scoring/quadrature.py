"""Quadrature rules on [0, 1], named as in Captum. Unlike Captum's, every rule's weights sum to 1."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.polynomial import legendre

from mipfast.errors import InputError

Rule = tuple[np.ndarray, np.ndarray]


def _gauss_legendre(n: int) -> Rule:
    x, w = legendre.leggauss(n)
    return (x + 1) / 2, w / 2


def _gauss_radau(n: int) -> Rule:
    """Right Gauss-Radau: the last node is alpha = 1; exact to degree 2n - 2."""
    coefficients = np.zeros(n + 1)
    coefficients[-2:] = 1  # P_{n-1} + P_n has the left rule's nodes as roots, -1 among them
    x = np.sort(legendre.legroots(coefficients))
    x[0] = -1
    last = np.zeros(n)
    last[-1] = 1
    w = (1 - x) / (n * legendre.legval(x, last)) ** 2
    return (1 - x[::-1]) / 2, w[::-1] / 2


def _trapezoid(n: int) -> Rule:
    if n < 2:
        raise InputError(f"riemann_trapezoid needs n_steps >= 2 (both ends are nodes), found {n}")
    w = np.full(n, 1 / (n - 1))
    w[[0, -1]] /= 2
    return np.linspace(0, 1, n), w


RULES: dict[str, Callable[[int], Rule]] = {
    "gausslegendre": _gauss_legendre,
    "gaussradau": _gauss_radau,
    "riemann_left": lambda n: (np.arange(n) / n, np.full(n, 1 / n)),
    "riemann_right": lambda n: ((np.arange(n) + 1) / n, np.full(n, 1 / n)),
    "riemann_middle": lambda n: ((np.arange(n) + 0.5) / n, np.full(n, 1 / n)),
    "riemann_trapezoid": _trapezoid,
}


def quadrature(method: str, n_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(nodes [n_steps], weights [n_steps]), float64, nodes ascending.

    Raises InputError for an unknown method or fewer nodes than the rule has."""
    if method not in RULES:
        raise InputError(f"unknown quadrature method {method!r}; expected one of {', '.join(RULES)}")
    if n_steps < 1:
        raise InputError(f"n_steps must be at least 1, found {n_steps}")
    nodes, weights = RULES[method](n_steps)
    return torch.tensor(nodes.copy()), torch.tensor(weights.copy())
