"""Quadrature on [0, 1]: degree of exactness, weights, and the ends each rule visits."""

import pytest
import torch

from mipfast.errors import InputError
from mipfast.scoring.quadrature import RULES, quadrature

# (rule, degree up to which n nodes integrate a polynomial exactly)
DEGREE = {
    "gausslegendre": lambda n: 2 * n - 1,
    "gaussradau": lambda n: 2 * n - 2,
    "riemann_left": lambda n: 0,
    "riemann_right": lambda n: 0,
    "riemann_middle": lambda n: 1,
    "riemann_trapezoid": lambda n: 1,
}


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("n", [2, 3, 4, 7, 12])
def test_exact_to_its_degree_and_not_beyond(method, n):
    nodes, weights = quadrature(method, n)
    degree = DEGREE[method](n)
    for power in range(degree + 1):
        assert (weights * nodes**power).sum().item() == pytest.approx(1 / (power + 1), abs=1e-13)
    if n < 7:  # beyond, the first inexact power of a Gauss rule is off by less than rounding
        assert (weights * nodes ** (degree + 1)).sum().item() != pytest.approx(1 / (degree + 2), abs=1e-9)


@pytest.mark.parametrize("method", RULES)
def test_nodes_ascend_within_the_unit_interval(method):
    nodes, weights = quadrature(method, 5)
    assert nodes.dtype == weights.dtype == torch.float64
    assert (nodes.diff() > 0).all() and nodes.min() >= 0 and nodes.max() <= 1
    assert (weights > 0).all()


def test_ends():
    assert quadrature("gaussradau", 3)[0][-1] == 1 and quadrature("gaussradau", 1)[0].tolist() == [1.0]
    assert quadrature("riemann_left", 4)[0].tolist() == [0, 0.25, 0.5, 0.75]
    assert quadrature("riemann_right", 4)[0].tolist() == [0.25, 0.5, 0.75, 1]
    assert quadrature("riemann_trapezoid", 2)[0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("method", "n", "says"),
    [("simpson", 4, "gausslegendre"), ("gausslegendre", 0, "n_steps"), ("riemann_trapezoid", 1, "2")],
)
def test_bad_rules_are_named(method, n, says):
    with pytest.raises(InputError, match=says):
        quadrature(method, n)
