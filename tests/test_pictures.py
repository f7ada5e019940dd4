"""The pictures of the documents: each is drawn, the same every time, and shows what was computed or measured."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_pictures", ROOT / "docs/_pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules["_pictures"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["architecture", "speed"])
def test_a_picture_is_drawn_the_same_every_time(pictures, tmp_path, name):
    for folder in ("once", "again"):
        pictures.example.cache_clear()
        pictures.main([name, "--out", str(tmp_path / folder)])
    once = tmp_path / "once" / f"{name}.png"
    assert once.read_bytes() == (tmp_path / "again" / f"{name}.png").read_bytes()
    with Image.open(once) as drawn:
        assert drawn.width == 1800, "twice the width of a README"
        pixels = torch.tensor(list(drawn.convert("L").resize((180, 60)).tobytes()))
    assert (pixels < 250).float().mean() > 0.1, "nothing is drawn"
    assert (ROOT / "docs/img" / f"{name}.png").exists()


def test_the_help_says_who_draws_what(pictures, capsys):
    with pytest.raises(SystemExit):
        pictures.main(["--help"])
    said = capsys.readouterr().out
    for command in (*pictures.PICTURES, "k24 inspect RUN --png", "k24 report DIR", "k24 eval RUN --gif"):
        assert command in said


def test_the_masks_of_the_example_are_those_that_the_formula_gives(pictures):
    found = pictures.example()
    masks = found.mask.view(3, 8, 2, 4)
    assert (masks.sum(-1) == 2).all() and set(masks.unique().tolist()) == {0, 1}
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 3
    # The two highest of each four scores, from the formula in words.
    scores = found.weight.abs() * found.alpha.exp()
    torch.testing.assert_close(found.score, scores)
    best = scores.view(masks.shape).topk(2, -1).indices
    assert torch.equal(torch.zeros_like(masks).scatter(-1, best, 1), masks)
    # A pattern's probability is that of its scores' product to the power of 1 / temperature.
    product = torch.stack([(scores.view(masks.shape) * p + 1 - p).prod(-1) for p in found.patterns])
    for temperature, pi in zip(pictures.TEMPERATURES, found.pi, strict=True):
        torch.testing.assert_close(pi, (product.double().log() / temperature).softmax(0).float(), atol=1e-3, rtol=1e-3)


def test_the_group_that_is_shown_tells_the_agents_apart(pictures):
    found = pictures.example()
    row, group = found.group()
    assert found.pi[-1, :, :, row, group].argmax(0).unique().numel() == 3
    surest = found.pi[:, :, :, row, group].amax(1)
    assert (surest.diff(dim=0) > -1e-4).all() and (surest[-1] > 0.9).all()


def test_the_file_holds_three_bits_for_each_group(pictures):
    found = pictures.example()
    assert found.packed.shape == (3, 8 * 2 * 3 // 8)
    bits = (found.packed[..., None] >> torch.arange(8)) & 1
    codes = (bits.view(3, 8, 2, 3) * torch.tensor([1, 2, 4])).sum(-1)
    assert torch.equal(found.patterns[codes].view(3, 8, 8), found.mask)


def test_medians_and_ranges(pictures):
    cases = [{"envs": 4, **dict.fromkeys(pictures.RIVALS, value)} for value in (3.0, 0.5, 2.0, 7.0)]
    assert pictures.gains({"rows": cases}) == {4: dict.fromkeys(pictures.RIVALS, pictures.Gain(2.5, 0.5, 7.0, 4))}


@pytest.mark.parametrize(("value", "shown"), [(10.8625, "10.9x"), (2.4455, "2.4x"), (1.5775, "1.6x"), (1.3475, "1.35x"), (0.93, "0.95x")])
def test_how_a_gain_is_written(pictures, value, shown):
    assert str(pictures.Gain(value, value, value, 1)) == shown


def test_the_picture_of_speed_shows_every_measured_case(pictures):
    measured = json.loads(pictures.MEASURED.read_text(encoding="utf-8"))[pictures.GRID]
    found = pictures.gains(measured)
    assert list(found) == [1, 8, 32] and sum(by["over_eager"].cases for by in found.values()) == len(measured["rows"])
    for case in measured["rows"]:
        for key in pictures.RIVALS:
            gain = found[case["envs"]][key]
            assert gain.low <= case[key] <= gain.high and gain.low <= gain.middle <= gain.high
    figure = pictures.speed()
    for axis in figure.axes:
        left, right = axis.get_xlim()
        drawn = [x for line in axis.lines for x in line.get_xdata()]
        assert left < min(drawn) <= 1 and max(drawn) < right, "a case lies outside the picture"
    pictures.plt.close(figure)


def test_the_readme_has_the_numbers_of_the_picture(pictures):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([\d.]+x) \| ([\d.]+x) \| ([\d.]+x) \| ([\d.]+x) \| ([\d.]+x) \|$", text, re.MULTILINE)
    found = pictures.gains(json.loads(pictures.MEASURED.read_text(encoding="utf-8"))[pictures.GRID])
    assert rows == [(str(n), *(str(gain) for gain in by_rival.values())) for n, by_rival in found.items()]
