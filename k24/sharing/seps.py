"""SePS: agents are put into clusters before training, and those of a cluster share a network.

Re-implemented from the facts of Christianos, Papoudakis, Rahman and Albrecht, "Scaling Multi-Agent Reinforcement Learning with Selective
Parameter Sharing", ICML 2021 (arXiv 2102.07475). The team plays at random. An auto-encoder then learns what comes of it: its encoder sees
which slot acts, and nothing else; its decoder sees the code, the observation and the action, and predicts what follows and the reward.
Slots whose rewards and dynamics are alike get codes that are alike, and k-means on the codes makes the clusters.

Prediction errors are in units of the target's variance over all rows. Where the number of clusters is not given, it is the smallest for
which the decoder predicts about as well from the centres of the clusters as from each slot's own code: no slot may lose more than
``tolerance`` at any target. That may be one cluster, if identities explain nothing, or one for each slot; measures of separation, such as
the silhouette, could say neither.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from k24.errors import UsageError
from k24.sharing.base import Experience, Role, Sharing, SlotLayer
from k24.sharing.dense import DenseLinear
from k24.sparse.slots import Phase, SlotWeights

# k-means: as many starts, and at most as many rounds of each.
_STARTS, _ROUNDS = 10, 50
# As many rows are enough to compare numbers of clusters by.
_JUDGED = 8192


@dataclass(frozen=True)
class SePSConfig:
    """Settings of the SePS baseline."""

    clusters: int | None = None
    """Networks; when not given, the fewest that random play can be predicted with about as well as with one per agent."""
    random_play: int = 5000
    """Environment steps of random play before training, at least; they are not counted as steps of the run."""
    tolerance: float = 0.05
    """Share of a target's variance that an agent's prediction may lose by being put into a cluster, where clusters is not given."""
    code: int = 10
    """Features of an agent's code."""
    hidden: int = 64
    """Hidden units of the decoder."""
    lr: float = 3e-3
    """Learning rate of the auto-encoder (Adam)."""
    epochs: int = 10
    """Passes over what was played."""
    batch_size: int = 128
    """Rows of a gradient step."""
    kl_weight: float = 1e-4
    """Weight of the codes' divergence from a standard normal distribution."""

    def __post_init__(self) -> None:
        """Checks each value."""
        for name in ("random_play", "code", "hidden", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} (={getattr(self, name)}) of seps must be at least 1")
        if self.clusters is not None and self.clusters < 1:
            raise UsageError(f"clusters (={self.clusters}) must be at least 1, or left out to be chosen by what is played")
        if not self.tolerance > 0 or not self.lr > 0 or not self.kl_weight >= 0:
            raise UsageError(
                f"seps needs tolerance (={self.tolerance}) and lr (={self.lr}) above 0 and kl_weight (={self.kl_weight}) not below it"
            )


class AutoEncoder(nn.Module):
    """Predicts what follows from a slot's code, and what the slot saw and did.

    Of one-hot identities an encoder is a table: a mean and a standard deviation for each slot. Means start at zero, all alike, so that
    only what is different in the slots' experience moves their codes apart.

    Args:
        n_slots: Slots (A).
        inputs: Features of an observation and an action together.
        targets: Features that are predicted.
        config: Settings.
    """

    def __init__(self, n_slots: int, inputs: int, targets: int, config: SePSConfig) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(n_slots, config.code))
        self.log_std = nn.Parameter(torch.full((n_slots, config.code), -1.0))
        first, second = nn.Linear(config.code + inputs, config.hidden), nn.Linear(config.hidden, config.hidden)
        self.decoder = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(config.hidden, targets))

    def loss(self, slots: Tensor, inputs: Tensor, targets: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
        """Evidence lower bound, up to its sign and what is constant, with a weight on the divergence.

        Args:
            slots: int64 ``[N]``.
            inputs: ``[N, inputs]``.
            targets: ``[N, targets]``.
            noise: Standard normal ``[N, code]``.
            kl_weight: Weight of ``KL(N(mean, std²) ‖ N(0, 1))``.
        """
        codes = self.mean[slots] + self.log_std[slots].exp() * noise
        error = (self.decoder(torch.cat([codes, inputs], 1)) - targets).square().sum(1).mean()
        divergence = 0.5 * (self.mean.square() + (2 * self.log_std).exp() - 1 - 2 * self.log_std)
        return error + kl_weight * divergence.sum(1)[slots].mean()

    @torch.no_grad()
    def errors(self, codes: Tensor, slots: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Each slot's mean squared error at each target ``[A, targets]`` with given codes ``[A, code]``; 0 for a slot without rows."""
        error = (self.decoder(torch.cat([codes[slots], inputs], 1)) - targets).square()
        total = error.new_zeros(len(codes), error.shape[1]).index_add_(0, slots, error)
        return total / torch.bincount(slots, minlength=len(codes)).clamp_min(1)[:, None]


def find_clusters(experience: Experience, n_slots: int, config: SePSConfig, generator: torch.Generator) -> list[int]:
    """The cluster of each slot, counted from 0 in the order in which slots first have them.

    Args:
        experience: Random play.
        n_slots: Slots (A).
        config: Settings.
        generator: Source of the random numbers, on the CPU.
    """
    slots, obs, actions, reward, next_obs = (t.cpu() for t in experience[1:])
    inputs = torch.cat([_standardised(obs), actions], 1)
    # The change is predicted, because what stays as it is says nothing of the slot.
    targets = _standardised(torch.cat([next_obs - obs, reward[:, None]], 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        model = AutoEncoder(n_slots, inputs.shape[1], targets.shape[1], config)
    optimiser = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    for _ in range(config.epochs):
        for rows in torch.randperm(len(slots), generator=generator).split(config.batch_size):
            noise = torch.randn(len(rows), config.code, generator=generator)
            optimiser.zero_grad(set_to_none=True)
            model.loss(slots[rows], inputs[rows], targets[rows], noise, config.kl_weight).backward()
            optimiser.step()
    codes = model.mean.detach()
    if config.clusters is not None:
        return _in_order(k_means(codes, min(config.clusters, n_slots), generator))
    judged = [part[torch.randperm(len(slots), generator=torch.Generator().manual_seed(0))[:_JUDGED]] for part in (slots, inputs, targets)]
    own = model.errors(codes, *judged)
    for count in range(1, n_slots):
        labels = k_means(codes, count, generator)
        if bool((model.errors(_centres(codes, labels, count)[labels], *judged) - own <= config.tolerance).all()):
            return _in_order(labels)
    return list(range(n_slots))


def _standardised(values: Tensor) -> Tensor:
    """Columns with mean 0 and variance 1; those that never change are 0."""
    spread = values.std(0, correction=0)
    return torch.where(spread > 1e-6, (values - values.mean(0)) / spread.clamp_min(1e-6), 0.0)


def k_means(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The best of several runs of Lloyd's algorithm from k-means++ starts (Arthur and Vassilvitskii 2007).

    Args:
        points: ``[N, F]``.
        count: Clusters, at most N.
        generator: Source of the random numbers.

    Returns:
        int64 ``[N]``, the cluster of each point; fewer than ``count`` are in use only where points coincide.
    """
    points, best, labels = points.double(), float("inf"), torch.zeros(len(points), dtype=torch.int64)
    for _ in range(_STARTS):
        centres = points[torch.randint(len(points), (1,), generator=generator)]
        while len(centres) < count:
            chance = torch.cdist(points, centres).square().amin(1) + 1e-12
            centres = torch.cat([centres, points[torch.multinomial(chance, 1, generator=generator)]])
        for _ in range(_ROUNDS):
            nearest = torch.cdist(points, centres).argmin(1)
            moved = torch.where((torch.bincount(nearest, minlength=count) > 0)[:, None], _centres(points, nearest, count), centres)
            if torch.equal(moved, centres):
                break
            centres = moved
        distance, nearest = torch.cdist(points, centres).min(1)
        if float(distance.square().sum()) < best:
            best, labels = float(distance.square().sum()), nearest
    return labels


def _centres(points: Tensor, labels: Tensor, count: int) -> Tensor:
    """Mean of each cluster's points; 0 for one without any."""
    total = points.new_zeros(count, points.shape[1]).index_add_(0, labels, points)
    return total / torch.bincount(labels, minlength=count).clamp_min(1)[:, None]


def _in_order(labels: Tensor) -> list[int]:
    names: dict[int, int] = {}
    return [names.setdefault(label, len(names)) for label in labels.tolist()]


class Clusters(nn.Module):
    """The cluster of each slot, one and the same for all layers and for the critics of the agents.

    Attributes:
        of: int64 ``[A]``.
        steps: int64, environment steps of random play that it rests on; 0 before any.
    """

    of: Tensor
    steps: Tensor

    def __init__(self, of: Tensor) -> None:
        super().__init__()
        self.register_buffer("of", of)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def used(self) -> int:
        """Clusters that have a slot."""
        return len(set(self.of.tolist()))


class ClusterLinear(SlotLayer):
    """A linear map per cluster.

    Attributes:
        each: The clusters' weights ``[K, O, I]`` and biases ``[K, O]``.
    """

    def __init__(self, in_features: int, out_features: int, n_clusters: int, clusters: Clusters) -> None:
        super().__init__()
        self.in_features, self.out_features, self.n_slots = in_features, out_features, len(clusters.of)
        self.clusters = clusters
        self.each = DenseLinear(in_features, out_features, n_clusters, own_weight=True, own_bias=True)

    def materialise(self, phase: Phase = "train") -> SlotWeights:
        """Each slot's are those of its cluster."""
        of = self.clusters.of
        return SlotWeights(self.each.weight.index_select(0, of), self.each.bias.index_select(0, of))


class SePS(Sharing):
    """The scheme. As published, agents of a cluster are not told apart: nets append no agent index.

    There are as many networks as there may be clusters; those that get no slot are never trained. Until :meth:`prepare` is called, slot i
    is in cluster i modulo their number.

    Args:
        n_slots: Agents.
        config: Settings.
    """

    agent_id = False
    critics = 2  # each costs a network of its own

    def __init__(self, n_slots: int, config: SePSConfig | None = None) -> None:
        super().__init__(n_slots)
        self.config = config or SePSConfig()
        self._most = min(self.config.clusters or n_slots, n_slots)
        self._clusters = Clusters(torch.arange(n_slots) % self._most)
        decided = n_slots == 1 or (self.config.clusters is not None and self._most in (1, n_slots))
        self.random_play = 0 if decided else self.config.random_play

    def _make(self, in_features: int, out_features: int, role: Role) -> nn.Module:
        return ClusterLinear(in_features, out_features, self._most, self._clusters)

    def prepare(self, experience: Experience, generator: torch.Generator) -> None:
        """Puts the slots into clusters."""
        if not self.random_play or not len(experience.slots):
            return
        of = find_clusters(experience, self.n_slots, self.config, generator)
        self._clusters.of.copy_(torch.tensor(of))
        self._clusters.steps.fill_(experience.steps)

    def follow(self, policy: Sharing) -> None:
        """Has the policy's clusters, where it is of this kind."""
        if isinstance(policy, SePS) and policy.n_slots == self.n_slots:
            assert not self.layers, "layers have the clusters that they were made with"
            self._clusters = policy._clusters

    def idle(self) -> int:
        """Networks of clusters that have no slot."""
        spare = self._most - self._clusters.used
        return spare * sum(sum(p[0].numel() for p in layer.parameters()) for layer in self.layers)

    def metrics(self) -> dict[str, float]:
        """Clusters in use, and the environment steps of random play that they rest on."""
        return {"clusters": float(self._clusters.used), "random_play_steps": float(self._clusters.steps)}
