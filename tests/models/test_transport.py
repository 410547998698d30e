"""Catches a transport plan that is not the algorithm's, moves mass to padding, or misses the exact optimum it approaches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from capfilt.models.vilt.transport import cosine_cost, transport_distance, transport_plan

LEFT = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
RIGHT = torch.tensor(
    [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool
)


def cost() -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    left = torch.randn(*LEFT.shape, 8, generator=generator)
    right = torch.randn(*RIGHT.shape, 8, generator=generator)
    return cosine_cost(left, right)


def one_pair(matrix: np.ndarray, beta: float, iterations: int) -> np.ndarray:
    """The algorithm on one pair without padding, as the paper writes it: cell by cell, in double precision."""
    m, n = matrix.shape
    plan, rows, columns = np.ones((m, n)), np.full(m, 1 / m), np.zeros(n)
    for _ in range(iterations):
        step = np.exp(-matrix / beta) * plan
        for j in range(n):
            columns[j] = 1 / (n * sum(step[i, j] * rows[i] for i in range(m)))
        for i in range(m):
            rows[i] = 1 / (m * sum(step[i, j] * columns[j] for j in range(n)))
        for i in range(m):
            for j in range(n):
                plan[i, j] = rows[i] * step[i, j] * columns[j]
    return plan


def exact(matrix: np.ndarray) -> float:
    """The least cost of the linear programme."""
    m, n = matrix.shape
    sums = [np.kron(np.eye(m), np.ones(n)), np.kron(np.ones(m), np.eye(n))]
    masses = np.concatenate([np.full(m, 1 / m), np.full(n, 1 / n)])
    return float(linprog(matrix.ravel(), A_eq=np.concatenate(sums), b_eq=masses).fun)


@pytest.mark.parametrize("iterations", [1, 50])
def test_padded_pairs_get_the_plan_that_each_gets_alone(iterations):
    matrix = cost()
    found = transport_plan(matrix, LEFT, RIGHT, iterations=iterations)
    for number in range(3):
        rows, columns = LEFT[number], RIGHT[number]
        alone = one_pair(matrix[number][rows][:, columns].double().numpy(), 0.5, iterations)
        expected = torch.zeros(matrix.shape[1:])
        expected[rows[:, None] & columns[None, :]] = torch.from_numpy(alone).float().flatten()
        torch.testing.assert_close(found[number], expected, atol=1e-6, rtol=1e-4)
    assert not found[3].any()


def test_many_iterations_reach_the_linear_programme():
    matrix = cost()
    near = transport_distance(matrix, LEFT, RIGHT, iterations=3000)
    few = transport_distance(matrix, LEFT, RIGHT, iterations=1)
    for number in range(3):
        best = exact(matrix[number][LEFT[number]][:, RIGHT[number]].double().numpy())
        assert near[number].item() == pytest.approx(best, abs=1e-3)
        assert few[number].item() > best + 1e-2 or number == 1


def test_the_gradient_is_the_costs_under_a_fixed_plan_and_never_a_nan():
    matrix = cost().requires_grad_()
    transport_distance(matrix, LEFT, RIGHT).sum().backward()
    torch.testing.assert_close(matrix.grad, transport_plan(matrix, LEFT, RIGHT))
    same = torch.ones(1, 3, 4, requires_grad=True)
    far = cosine_cost(same, -same)
    distance = transport_distance(far, torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool))
    distance.backward()
    assert distance.item() == pytest.approx(2.0, abs=1e-5)
    assert torch.isfinite(same.grad).all()
