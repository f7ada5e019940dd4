"""Targets and losses as pure functions: tensors in, tensors out.

Time is in the names: ``v_tp1[t]`` is the value of the state that step t led to. What looks along time takes ``[T, ...]`` with time
first, and two flags per step. ``terminated``: the task ended with this step, so nothing follows. ``last``: this is the episode's last
recorded step, for whatever reason; the recursion stops there and bootstraps from ``v_tp1`` unless the task ended.
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


def gae(reward: Tensor, value: Tensor, value_tp1: Tensor, terminated: Tensor, last: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, equation 16).

    ``A_t = δ_t + γ·λ·A_{t+1}`` with ``δ_t = r_t + γ·v_{t+1} - v_t``. Behind an episode's last step the advantage is 0, and behind the
    task's end ``v_{t+1}`` too. So a time limit bootstraps from ``value_tp1``, which is why that is not ``value[1:]``.

    Args:
        reward: ``[T, ...]``.
        value: ``[T, ...]``, of the state that step t was taken in.
        value_tp1: ``[T, ...]``, of the state it led to.
        terminated: bool ``[T, ...]``.
        last: bool ``[T, ...]``; the final row counts as last in any case.
        gamma: Discount.
        lam: λ; 0 gives one-step errors, 1 discounted returns less the value.

    Returns:
        ``[T, ...]``.
    """
    delta = reward + gamma * torch.where(terminated, 0.0, value_tp1) - value
    advantages = torch.empty_like(delta)
    following = torch.zeros_like(delta[0])
    for t in reversed(range(delta.shape[0])):
        following = delta[t] + gamma * lam * torch.where(last[t], 0.0, following)
        advantages[t] = following
    return advantages


def ppo_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: float, counted: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped surrogate, to be minimised (Schulman et al. 2017, arXiv 1707.06347, equation 7).

    ``-mean min(ρ·A, clip(ρ, 1 - ε, 1 + ε)·A)`` with the ratio ``ρ = exp(log_prob - old_log_prob)``. Log-ratios above 20 are taken as 20: an
    infinite ratio would be clipped, yet its gradient be ``0·∞``.

    Args:
        log_prob: Of the actions taken, now; any shape.
        old_log_prob: When they were taken; the same shape.
        advantage: The same shape, or one that broadcasts to it.
        clip: ε.
        counted: bool, broadcastable to it; None for all. What lies outside may be anything, NaN included.

    Returns:
        The loss; the share of ratios outside the clip range; and an estimate of the policy's divergence from the old one, ``mean (ρ - 1) -
        log ρ``, which is never negative. All scalars, the last two without gradient.
    """
    # Chosen before the exponential: a gradient of zero times an infinite ratio would be NaN.
    log_ratio = _chosen(log_prob - old_log_prob, counted).clamp(max=20.0)
    advantage = _chosen(advantage.expand_as(log_ratio), counted)
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    with torch.no_grad():
        clipped_fraction = masked_mean(((ratio - 1).abs() > clip).to(ratio.dtype), counted)
        approx_kl = masked_mean(ratio - 1 - log_ratio, counted)
    return -masked_mean(surrogate, counted), clipped_fraction, approx_kl


def clipped_value_loss(value: Tensor, old_value: Tensor, target: Tensor, clip: float, huber_delta: float, counted: Tensor | None) -> Tensor:
    """Value loss at its worst within reach of the old value (Yu et al. 2022, arXiv 2103.01955, appendix A).

    ``mean max(h(v - G), h(v_old + clip(v - v_old, -ε, ε) - G))``, where ``h(e)`` is ``e²/2`` up to ``|e| = δ`` and ``δ·(|e| - δ/2)`` beyond
    (Huber 1964). A value that has come more than ε closer to its target has no gradient left.

    Args:
        value: Any shape.
        old_value: The same shape: what the critic said when the targets were made.
        target: The same shape: G.
        clip: ε; 0 for a plain Huber loss.
        huber_delta: δ.
        counted: bool, broadcastable to it; None for all. What lies outside may be anything, NaN included.

    Returns:
        A scalar.
    """
    loss = _huber(_chosen(value - target, counted), huber_delta)
    if clip > 0:
        clipped = old_value + (value - old_value).clamp(-clip, clip)
        loss = torch.maximum(loss, _huber(_chosen(clipped - target, counted), huber_delta))
    return masked_mean(loss, counted)


def n_step_transitions(reward: Tensor, terminated: Tensor, valid: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """What N sampled steps and those that follow them earned, up to n steps in all or the episode's end.

    ``R = Σ_{k<m} γ^k·r_k``, so that ``R + discount·v`` with the value v of the state after m steps is an m-step return (Sutton and Barto
    2018, equation 7.1).

    Args:
        reward: ``[n, N]``, row k being k steps after the one that was sampled. Rows that are not valid may hold anything.
        terminated: bool ``[n, N]``.
        valid: bool ``[n, N]``, whether the step belongs to the same episode; row 0 always does. Nothing counts behind the first that does
            not, or behind one where the task ended.
        gamma: Discount.

    Returns:
        R ``[N]``; the discount ``[N]`` of what follows, ``γ^m``, or 0 where the task ended within; and m, int64 ``[N]``.
    """
    goes_on = (valid & ~terminated).cumprod(0).bool()
    counted = valid & torch.cat([torch.ones_like(valid[:1]), goes_on[:-1]])
    steps = counted.sum(0)
    powers = torch.pow(gamma, torch.arange(len(reward), dtype=reward.dtype, device=reward.device))
    returns = powers @ torch.where(counted, reward, 0.0)
    ended = (counted & terminated).any(0)
    return returns, torch.where(ended, 0.0, torch.pow(gamma, steps.to(reward.dtype))), steps


def td3_target(returns: Tensor, discount: Tensor, q_next: Tensor) -> Tensor:
    """Target of all K critics: the most cautious of them judges what follows.

    ``R + discount·min_k Q_k`` (Fujimoto et al. 2018, arXiv 1802.09477, algorithm 1, for two critics; Kaleidoscope, arXiv 2410.08540, for
    more, as masks on one network).

    Args:
        returns: ``[N]``, of :func:`n_step_transitions`.
        discount: ``[N]``, likewise.
        q_next: ``[K, N]``, the target critics' values of the state after the last step counted, with the target policy's action.

    Returns:
        ``[N]``.
    """
    return returns + discount * q_next.amin(0)


def smoothed(action: Tensor, noise_std: float, noise_clip: float, generator: torch.Generator | None = None) -> Tensor:
    """An action with clipped Gaussian noise, within [-1, 1] (Fujimoto et al. 2018, arXiv 1802.09477, equation 14).

    Args:
        action: Any shape, in [-1, 1].
        noise_std: Standard deviation of the noise.
        noise_clip: Its largest size.
        generator: Where the noise comes from; None for torch's global one.
    """
    noise = torch.empty_like(action).normal_(generator=generator) * noise_std
    return (action + noise.clamp(-noise_clip, noise_clip)).clamp(-1, 1)


def _huber(error: Tensor, delta: float) -> Tensor:
    """Square up to ``delta``, linear beyond."""
    size = error.abs()
    inside = size.clamp(max=delta)
    return inside * (size - inside / 2)


def _chosen(values: Tensor, counted: Tensor | None) -> Tensor:
    """``values`` where they count and 0 elsewhere, whatever stands there; its gradient likewise."""
    return values if counted is None else torch.where(counted, values, 0.0)


def masked_mean(values: Tensor, counted: Tensor | None) -> Tensor:
    """Mean of the values that count; 0 if none does.

    Args:
        values: Any shape.
        counted: bool, broadcastable to it; None for all. What lies outside may be anything, NaN included.
    """
    if counted is None:
        return values.mean()
    return _chosen(values, counted).sum() / counted.expand_as(values).sum().clamp_min(1)
