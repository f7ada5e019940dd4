"""What the documents say must be true: code runs, links lead somewhere, commands and metric names exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from test_twins import slug

from k24.cli import COMMANDS
from k24.sharing import SCHEMES

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http:", "https:")):
            continue
        there = page.parent / target if target else page
        assert there.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            text = re.sub(r"^```.*?^```", "", there.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
            assert anchor in map(slug, re.findall(r"^#+ (.*)", text, re.MULTILINE)), (
                f"{page.name} links to {target}#{anchor}, which is no heading"
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, page.name, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_exist(page: Path) -> None:
    for command in re.findall(r"(?:^|`)k24 ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.MULTILINE):
        assert command in COMMANDS, f"{page.name} speaks of 'k24 {command}'"


def test_every_scheme_is_described() -> None:
    text = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
    for scheme in SCHEMES:
        assert f"| `{scheme}` |" in text


def test_the_table_of_bytes_in_the_readme_is_what_the_script_prints() -> None:
    root = Path(__file__).parents[1]
    table = runpy.run_path(str(root / "benchmarks" / "sizes.py"))["table"]
    assert table([3, 8, 64], 128) in (root / "README.md").read_text(encoding="utf-8")
