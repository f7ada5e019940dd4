"""Small pictures of flat worlds, drawn with numpy alone.

VMAS draws through pyglet and needs a display or EGL, which servers and containers seldom have. A picture of circles and boxes
is enough to watch a team, and this way it looks the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_PAPER = 255
# Each way; their mean is a pixel, so that edges are smooth.
_SUBPIXELS = 3


@dataclass(frozen=True)
class Mark:
    """One thing to draw.

    Attributes:
        centre: ``(x, y)`` in world units, y upwards.
        half: Half width and half height in world units; of a round mark, both are its radius.
        colour: Red, green and blue, each from 0 to 1.
        round: A circle where true, else a box.
        angle: Turn of a box, radians anticlockwise.
        outline: Whether to draw a dark edge, to tell agents from what lies about.
        hollow: Whether it is a place and no body: pale, with an edge of its colour.
    """

    centre: tuple[float, float]
    half: tuple[float, float]
    colour: tuple[float, float, float]
    round: bool = True
    angle: float = 0.0
    outline: bool = False
    hollow: bool = False


def draw(marks: Sequence[Mark], size: int = 320, least_span: float = 1.2) -> Tensor:
    """Draws marks in order, later ones on top.

    The view is a square around the origin, as wide as it must be to hold every centre.

    Args:
        marks: What to draw.
        size: Height and width in pixels.
        least_span: World units from the origin to the edge that are always in view.

    Returns:
        uint8 ``[size, size, 3]``.
    """
    reach = [max(abs(mark.centre[0]), abs(mark.centre[1])) + max(mark.half) for mark in marks if np.isfinite(mark.centre).all()]
    # A ball that was knocked out of the field must not shrink everything else to a dot.
    span = min(max([least_span, *reach]), 5 * least_span)
    fine = size * _SUBPIXELS
    axis = (np.arange(fine) + 0.5) / fine * 2 * span - span
    x, y = axis[None, :], -axis[:, None]
    pixel = 2 * span / size
    image = np.full((fine, fine, 3), _PAPER, dtype=np.uint8)
    for mark in marks:
        dx, dy = x - mark.centre[0], y - mark.centre[1]
        # Something thinner than a pixel would fall between pixel centres.
        half = np.maximum(mark.half, pixel)
        if mark.round:
            depth = half[0] - np.sqrt(dx**2 + dy**2)
        else:
            cos, sin = np.cos(mark.angle), np.sin(mark.angle)
            depth = np.minimum(half[0] - np.abs(cos * dx + sin * dy), half[1] - np.abs(cos * dy - sin * dx))
        colour = np.clip(np.asarray(mark.colour), 0, 1) * 255
        fill, edge = (colour * 0.3 + _PAPER * 0.7, colour) if mark.hollow else (colour, colour * 0.4)
        image[depth >= 0] = np.round(fill).astype(np.uint8)
        if mark.outline or mark.hollow:
            image[(depth >= 0) & (depth < 1.5 * pixel)] = np.round(edge).astype(np.uint8)
    return torch.from_numpy(image).view(size, _SUBPIXELS, size, _SUBPIXELS, 3).float().mean((1, 3)).round().to(torch.uint8)
