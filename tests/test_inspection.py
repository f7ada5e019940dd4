"""Looking at masks: the order of agents in the picture; what the numbers are is held where schemes are."""

from __future__ import annotations

from itertools import pairwise

import torch

from k24.inspection import chain


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
