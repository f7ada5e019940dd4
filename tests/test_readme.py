"""The README's commands work, in order, in one folder: as they stand, or made shorter where they would train or measure for long."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from k24.cli import main

README = Path(__file__).parents[1] / "README.md"
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for block in re.findall(r"```\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines()
    if line.startswith("k24 ")
]
SHORT = {
    "train": ["--final-episodes", "4", "--eval-episodes", "4", "--log-every", "200"],
    "sweep": ["--dry-run"],
    "bench train": ["--repeats", "1", "--threads", "1"],
    "bench env": ["--seconds", "0.2"],
    "bench inference": ["--repeats", "2"],
}
SHORT_TASK = {
    "mpe/simple_spread": ["--steps", "800"],
    "mamujoco/HalfCheetah-2x3": shlex.split("--steps 400 --warmup 200 --batch-size 50 --hidden 16 --workers 0 --env-args max_steps=20"),
    "smax/smacv2_5_units": shlex.split("--steps 400 --batch-size 8 --envs 4 --hidden 16"),
    "my_package.my_env:make": ["--steps", "400"],
}
MY_ENV = re.findall(r"```python\n(# my_env\.py.*?)```", (README.parent / "docs/environments.md").read_text(encoding="utf-8"), re.DOTALL)


def short(command: list[str]) -> list[str]:
    """A command with options that make it short; everything else stands as it is written."""
    name = " ".join(command[:2]) if command[0] == "bench" else command[0]
    return [*command, *(SHORT_TASK[command[1]] if name == "train" else []), *SHORT.get(name, [])]


def test_the_readme_from_its_first_command_to_its_last(tmp_path, monkeypatch, capfd):
    pytest.importorskip("ray"), pytest.importorskip("jaxmarl"), pytest.importorskip("gymnasium_robotics")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/__init__.py").touch()
    (tmp_path / "my_package/my_env.py").write_text(MY_ENV[0], encoding="utf-8")
    assert len(COMMANDS) > 12
    for command in COMMANDS:
        status = main(short(command))
        said = capfd.readouterr()
        assert status == 0, f"k24 {' '.join(command)}: {said.err[-2000:]}"
        if command[0] in ("eval", "train", "bench", "export"):
            json.loads(said.out.splitlines()[-1])
    for made in ("episode.gif", "masks.png", "policy.safetensors", "report/report.md"):
        assert (tmp_path / made).stat().st_size > 100
