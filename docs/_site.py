"""Writes the pages of the documentation site: those of this folder, the READMEs as the first ones, and one for every module.

    python docs/_site.py build/docs

Pages link to files of the repository, which a site does not have. Links to modules go to their page, other such links become plain text.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
FIRST = {"README.md": "index.md", "README.zh-CN.md": "zh/index.md"}  # first page of each language


def module_pages() -> dict[str, str]:
    """Text of each module's page, by its place in the site."""
    pages = {}
    for path in sorted((ROOT / "k24").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if parts[-1] != "__main__":
            pages[f"api/{name}.md"] = f"# {name}\n\n::: {name}\n"
    return pages


def on_site(text: str, source: Path, place: Path, pages: dict[str, str]) -> str:
    """A page with links as they are in the site.

    Args:
        text: Markdown.
        source: Its file in the repository.
        place: Its file in the site, relative.
        pages: Generated ones, by place.
    """
    up = "../" * (len(place.parts) - 1)

    def target(link: str) -> str | None:
        """Where a file of the repository is in the site."""
        if re.match(r"[a-z]+:", link):
            return link
        path = (source.parent / link).resolve().relative_to(ROOT)
        if path.parts[0] == "docs" and len(path.parts) > 1:
            return up + path.relative_to("docs").as_posix()
        if str(path) in FIRST:
            return up + FIRST[str(path)]
        module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        return f"{up}api/{module}.md" if f"api/{module}.md" in pages else None

    def link(found: re.Match[str]) -> str:
        there = target(found[2])
        return f"[{found[1]}]({there}{found[3] or ''})" if there else found[1]

    return LINK.sub(link, IMAGE.sub(lambda found: f"![{found[1]}]({target(found[2])})", text))


def write(out: Path) -> None:
    """Writes all pages into a folder, which is emptied first."""
    shutil.rmtree(out, ignore_errors=True)
    pages = module_pages()
    sources = {Path(place): ROOT / name for name, place in FIRST.items()}
    for path in sorted((ROOT / "docs").rglob("*")):
        if path.suffix == ".md":
            sources[path.relative_to(ROOT / "docs")] = path
        elif path.suffix in (".png", ".gif"):
            copy = out / path.relative_to(ROOT / "docs")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    texts = {place: on_site(source.read_text(encoding="utf-8"), source, place, pages) for place, source in sources.items()}
    index = "\n".join(f"* [{place[4:-3]}]({place[4:]})" for place in pages)
    texts[Path("api/index.md")] = f"# Reference\n\nEvery module, from its docstrings.\n\n{index}\n"
    for place, text in {**{Path(p): t for p, t in pages.items()}, **texts}.items():
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        (out / place).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
