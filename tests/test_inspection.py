"""Looking at masks: nets out of the ordinary, and the order of agents in the picture; what the numbers are is held where schemes are."""

from __future__ import annotations

from itertools import pairwise

import torch
from test_kernels import linear

from k24.inspection import chain, inspect_net, plot_inspection
from k24.kernels import Linear, Net
from k24.sparse.patterns import PatternSet


def test_agents_that_are_alike_stand_side_by_side():
    pairs = [(0, 3), (1, 4), (2, 5)]
    distance = torch.full((6, 6), 0.5)
    for one, other in pairs:
        distance[one, other] = distance[other, one] = 0.3
    order = chain(distance)
    assert order == [0, 3, 1, 4, 2, 5]


def test_each_agent_has_one_place():
    for agents in (1, 2, 7):
        distance = torch.rand(agents, agents)
        order = chain(distance)
        assert sorted(order) == list(range(agents)) and order[0] == 0
        for here, there in pairwise(order):
            left = set(range(agents)) - set(order[: order.index(there)])
            assert float(distance[here, there]) == min(float(distance[here, k]) for k in left)


def test_patterns_of_two_kinds_are_not_counted_together(tmp_path):
    coarse = PatternSet(4, 8)
    codes = torch.randint(0, coarse.n_patterns, (3, 8, 1), dtype=torch.uint8)
    mixed = Net((linear(16, 8), Linear(torch.randn(1, 8, 8), torch.zeros(1, 8), codes, coarse)), 3)
    found = inspect_net(mixed)
    assert found["pattern_usage"] is None and found["pattern_entropy"] is None
    assert found["macs_per_act"] == 3 * (8 * 8 + 8 * 4) and 0 <= found["dead_weight_frac"] < 1 and found["mask_hamming"] > 0.2
    plot_inspection(found, tmp_path / "masks.png", r"mpe/$\frac$ [/x]")
    assert (tmp_path / "masks.png").stat().st_size


def test_groups_without_a_choice_have_no_usage():
    found = inspect_net(Net((linear(2, 3),), 3))
    assert found["pattern_usage"] is None and found["pattern_entropy"] is None


def test_a_layer_for_all_is_not_spread_out():
    """In memory it would be 34 GB."""
    found = inspect_net(Net((linear(2048, 2048, masked=False),), 2048))
    assert found["macs_per_act"] == 2048**3 and found["mask_hamming"] == 0
