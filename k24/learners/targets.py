"""Targets and losses as pure functions: tensors in, tensors out.

Time is in the names: ``v_tp1[t]`` is the value of the state that step t led to. All take ``[T, ...]`` with time first,
and two flags per step. ``terminated``: the task ended with this step, so nothing follows. ``last``: this is the
episode's last recorded step, for whatever reason; the recursion stops there and bootstraps from ``v_tp1`` unless the
task ended.
"""

from __future__ import annotations

import torch
from torch import Tensor


def n_step_targets(reward: Tensor, v_tp1: Tensor, terminated: Tensor, last: Tensor, gamma: float, n: int = 1) -> Tensor:
    """n-step returns, shortened where the episode ends.

    ``G^(1)_t = r_t + γ·v_{t+1}``, and ``G^(n)_t = r_t + γ·G^(n-1)_{t+1}`` while step t is not the last one (Sutton and
    Barto 2018, section 7.1). Where the task ended, what follows ``r_t`` is 0.

    Args:
        reward: ``[T, ...]``.
        v_tp1: ``[T, ...]``.
        terminated: bool ``[T, ...]``.
        last: bool ``[T, ...]``; the final row counts as last in any case.
        gamma: Discount.
        n: Steps.

    Returns:
        ``[T, ...]``.
    """
    goes_on = (~terminated).to(reward.dtype) * gamma
    target = reward + goes_on * v_tp1
    for _ in range(n - 1):
        following = torch.where(last[:-1], v_tp1[:-1], target[1:])
        target = torch.cat([reward[:-1] + goes_on[:-1] * following, target[-1:]])
    return target


def td_lambda_targets(reward: Tensor, v_tp1: Tensor, terminated: Tensor, last: Tensor, gamma: float, lam: float) -> Tensor:
    """λ-returns of a value function without importance weights (Peng's Q(λ), as PyMARL uses it).

    ``G_t = r_t + γ·[(1-λ)·v_{t+1} + λ·G_{t+1}]``, with ``G_{t+1} = v_{t+1}`` at an episode's last step (Sutton and Barto
    2018, equation 12.18).

    Args:
        reward: ``[T, ...]``.
        v_tp1: ``[T, ...]``.
        terminated: bool ``[T, ...]``.
        last: bool ``[T, ...]``; the final row counts as last in any case.
        gamma: Discount.
        lam: λ; 0 gives one-step targets.

    Returns:
        ``[T, ...]``.
    """
    goes_on = (~terminated).to(reward.dtype) * gamma
    if lam == 0:
        return reward + goes_on * v_tp1
    targets = torch.empty_like(v_tp1)
    following = v_tp1[-1]
    for t in reversed(range(reward.shape[0])):
        following = torch.where(last[t], v_tp1[t], following)
        targets[t] = reward[t] + goes_on[t] * ((1 - lam) * v_tp1[t] + lam * following)
        following = targets[t]
    return targets


def greedy_value(q_select: Tensor, q_evaluate: Tensor, avail: Tensor | None = None) -> Tensor:
    """Value of the best action, chosen by one set of action values and judged by another.

    With the online net's values to choose and the target net's to judge this is double Q-learning (van Hasselt et al. 2016, arXiv
    1509.06461, equation 4); with the target's for both, plain Q-learning.

    Args:
        q_select: ``[..., U]``.
        q_evaluate: ``[..., U]``.
        avail: bool ``[..., U]``, actions that may be chosen; None for all.

    Returns:
        ``[...]``.
    """
    if avail is not None:
        q_select = q_select.masked_fill(~avail, -torch.inf)
    return q_evaluate.gather(-1, q_select.argmax(-1, keepdim=True)).squeeze(-1)


def masked_mse(error: Tensor, valid: Tensor | None) -> Tensor:
    """Mean square of the errors that count.

    Args:
        error: Any shape.
        valid: bool, broadcastable to it; None for all.
    """
    if valid is None:
        return error.square().mean()
    counts = valid.expand_as(error)
    # Chosen, not multiplied by zero: what lies behind an episode's end may be anything, NaN included.
    return torch.where(counts, error, 0.0).square().sum() / counts.sum().clamp_min(1)
