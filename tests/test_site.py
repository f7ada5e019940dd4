"""The documentation site: every link of its pages leads somewhere, and every module has a page."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import k24

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    spec = importlib.util.spec_from_file_location("_site", ROOT / "docs/_site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path_factory.mktemp("site")
    module.write(out)
    return out


def test_links_lead_somewhere(site: Path) -> None:
    links = 0
    for page in site.rglob("*.md"):
        for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target):
                links += 1
                assert (page.parent / target).exists(), f"{page.relative_to(site)} links to {target}"
    assert links > 100


def test_links_to_modules_lead_to_their_pages_and_others_become_text(site: Path) -> None:
    assert "](api/k24.suites.md)" in (site / "sweep.md").read_text(encoding="utf-8")
    results = (site / "results.md").read_text(encoding="utf-8")
    assert "examples/hetero_regression.py" in results and "](../" not in results
    index = (site / "index.md").read_text(encoding="utf-8")
    assert "](algorithm.md)" in index and "docs/algorithm.md)" not in index


def test_every_module_has_a_page_and_every_public_name_a_docstring(site: Path) -> None:
    for path in (ROOT / "k24").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if parts[-1] != "__main__":
            assert f"::: {name}\n" in (site / f"api/{name}.md").read_text(encoding="utf-8")
            assert f"({name}.md)" in (site / "api/index.md").read_text(encoding="utf-8")
    public = [name for name in k24.__all__ if callable(getattr(k24, name))]
    assert public and all(getattr(k24, name).__doc__ for name in public)
