"""The Chinese pages keep in step with the English ones: the same sections, code, tables, numbers and links."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TWINS = sorted((DOCS / "zh").glob("*.md"))
CHINESE = "\u4e00-\u9fff"
CODE = re.compile(r"`[^`\n]*`")
TARGET = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)")
THOUSANDS = {"k": 1_000, "M": 1_000_000, "万": 10_000}


@dataclass
class Section:
    """What stands under one heading, its code blocks apart from its prose and its tables."""

    level: int
    title: str
    prose: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)  # a fenced one begins with its fence and language


def split(text: str) -> list[Section]:
    """Sections of a page in their order; what is before the first heading would be a section of level 0."""
    sections, fenced, indented = [Section(0, "")], False, False
    for line in text.splitlines():
        here = sections[-1]
        if line.startswith("```"):
            here.blocks += [line] if not fenced else []
            fenced = not fenced
        elif fenced:
            here.blocks[-1] += f"\n{line}"
        elif line.startswith("    "):
            here.blocks.append(line) if not indented else here.blocks.append(f"{here.blocks.pop()}\n{line}")
        elif heading := re.match(r"(#+) (.*)", line):
            sections.append(Section(len(heading[1]), heading[2]))
        else:
            (here.rows if line.startswith("|") else here.prose).append(line)
        indented = not fenced and line.startswith("    ")
    return sections if sections[0].prose else sections[1:]


@cache
def page(path: Path) -> list[Section]:
    return split(path.read_text(encoding="utf-8"))


def slug(title: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def numbers(text: str) -> set[float]:
    """Numbers outside code and link targets: 10 000 = 10000, 20 万 = 200k, a minus sign like a hyphen before a digit."""
    text = TARGET.sub("]", CODE.sub("`", text)).replace("−", "-")
    text = re.sub(r"(?<=\d) (?=\d{3}\b)", "", text)
    found = re.findall(r"((?<![\w)])-)?(\d+(?:\.\d+)?)(?:( ?万|k\b|M\b))?", text)
    return {float(f"{sign}{digits}") * THOUSANDS.get(unit.strip(), 1) for sign, digits, unit in found}


def target(source: Path, there: str, anchor: str) -> str:
    """Where a link leads, alike for a page and its twin: headings by their number, `docs/zh/` as `docs/`. Raises if it leads nowhere."""
    if re.match(r"[a-z]+:", there):
        return f"{there}#{anchor}"
    path = (source.parent / there).resolve() if there else source
    assert path.exists(), f"{source.name} links to {there}, which does not exist"
    heading = ""
    if anchor:
        slugs = [slug(section.title) for section in page(path)]
        assert anchor in slugs, f"{source.name} links to {there}#{anchor}, but that page has only {', '.join(slugs)}"
        heading = f"#{slugs.index(anchor)}"
    place = path.relative_to(ROOT).as_posix().replace("docs/zh/", "docs/") if path.is_relative_to(ROOT) else str(path)
    return place + heading


def targets(source: Path, text: str) -> list[str]:
    found = [target(source, *link) for link in TARGET.findall(text)]
    return sorted(link for link in found if link != f"docs/{source.name}")  # without the line that leads to the other language


def pairs(twin: Path) -> list[tuple[str, Section, Section]]:
    """Sections of the English page with those of its twin, and how a message names them."""
    english, chinese = page(DOCS / twin.name), page(twin)
    for one, other in zip(english, chinese, strict=False):
        assert one.level == other.level, f"{twin}: '{other.title}' is of level {other.level}, and '{one.title}' of {one.level}"
    titles = [section.title for section in english]
    assert len(english) == len(chinese), f"{twin} has {len(chinese)} headings, its English page {len(english)}: {titles}"
    found = zip(english, chinese, strict=True)
    return [(f"docs/zh/{twin.name}, '{other.title}' (English '{one.title}')", one, other) for one, other in found]


def differences(one: str, other: str, exact: bool) -> str:
    """What of a text's code and numbers its translation lacks, or has beyond it. Words may become small numbers ("three" 3)."""
    codes, theirs = set(CODE.findall(one)), set(CODE.findall(other))
    figures, their_figures = numbers(one), numbers(other)
    beyond = {n for n in their_figures - figures - numbers(one.replace("`", " ")) if n not in range(21)}
    lacks = sorted(codes - theirs) + [f"{n:g}" for n in sorted(figures - their_figures)]
    extra = (sorted(theirs - codes) if exact else []) + [f"{n:g}" for n in sorted(beyond)]
    return "; ".join(f"{what} {', '.join(items)}" for what, items in (("lacks", lacks), ("has besides", extra)) if items)


def half_width(line: str) -> str:
    """The first ASCII punctuation next to a Chinese character."""
    found = re.search(rf"[{CHINESE}][,:;!?()]|[,:;!?()][{CHINESE}]", TARGET.sub("]", CODE.sub("`", line)))
    return found[0] if found else ""


def unseen_emphasis(line: str) -> str:
    """The first bold text that CommonMark does not see: it ends (begins) with punctuation, and a letter follows (precedes) at once."""
    for bold in re.finditer(r"\*\*([^*]+)\*\*", CODE.sub("`", line)):
        before, after = bold.string[: bold.start()][-1:], bold.string[bold.end() :][:1]
        if re.match(r"\w\W", before + bold[1][0]) or re.match(r"\W\w", bold[1][-1] + after):
            return bold[0]
    return ""


def test_there_are_twins_and_each_has_its_english_page() -> None:
    assert {"algorithm.md", "implementation.md", "user-guide.md"} <= {twin.name for twin in TWINS}
    assert [twin.name for twin in TWINS if not (DOCS / twin.name).exists()] == []


@pytest.mark.parametrize("twin", TWINS, ids=lambda p: p.name)
def test_each_links_to_the_other_right_under_its_title(twin: Path) -> None:
    for source, line in ((twin, f"[English](../{twin.name})"), (DOCS / twin.name, f"[中文](zh/{twin.name})")):
        assert source.read_text(encoding="utf-8").split("\n\n")[1] == line, f"{source}: its second paragraph must be {line}"


@pytest.mark.parametrize("twin", TWINS, ids=lambda p: p.name)
def test_code_blocks_are_the_same(twin: Path) -> None:
    for where, one, other in pairs(twin):
        lines, theirs = ("\n".join(section.blocks).splitlines() for section in (one, other))
        wrong = next(((line, its) for line, its in zip_longest(lines, theirs) if line != its), None)
        assert wrong is None, f"{where}: the code has {wrong[1]!r} where the English has {wrong[0]!r}"
        assert len(one.blocks) == len(other.blocks), f"{where}: {len(other.blocks)} code blocks, English {len(one.blocks)}"


@pytest.mark.parametrize("twin", TWINS, ids=lambda p: p.name)
def test_tables_have_the_same_rows_with_the_same_code_and_numbers(twin: Path) -> None:
    for where, one, other in pairs(twin):
        codes = [CODE.findall(row) for row in other.rows]
        near = [row for row in one.rows if CODE.findall(row) not in codes] or one.rows
        assert len(one.rows) == len(other.rows), f"{where}: {len(other.rows)} lines of tables, English {len(one.rows)}; see {near[:1]}"
        for row, its in zip(one.rows, other.rows, strict=True):
            assert row.count(" |") == its.count(" |"), f"{where}: other cells in {its}"
            assert not (wrong := differences(row, its, exact=True)), f"{where}: {wrong} in {its}"


@pytest.mark.parametrize("twin", TWINS, ids=lambda p: p.name)
def test_prose_has_the_code_and_numbers_of_the_english(twin: Path) -> None:
    for where, one, other in pairs(twin):
        joined = " ".join(one.prose), " ".join(other.prose)  # code may run over the end of a line
        assert not (wrong := differences(*joined, exact=False)), f"{where}: {wrong}"


@pytest.mark.parametrize("twin", TWINS, ids=lambda p: p.name)
def test_links_lead_where_the_english_ones_lead(twin: Path) -> None:
    for where, one, other in pairs(twin):
        ours, theirs = ([*section.prose, *section.rows] for section in (one, other))
        links, their_links = targets(DOCS / twin.name, "\n".join(ours)), targets(twin, "\n".join(theirs))
        assert links == their_links, f"{where}: links lead to {their_links}, English {links}"


@pytest.mark.parametrize("twin", TWINS, ids=lambda p: p.name)
def test_chinese_is_set_with_its_own_punctuation(twin: Path) -> None:
    for section in page(twin):
        for line in [section.title, *section.prose, *section.rows]:
            assert not (wrong := half_width(line)), f"{twin}: {wrong!r} wants the full width in {line}"
            assert not (wrong := unseen_emphasis(line)), f"{twin}: GitHub shows the stars of {wrong!r} in {line}"


def test_what_differs_is_found() -> None:
    assert differences("`a` 200k of 10 000, −1.5", "10000 中的 20 万，-1.5，`a`", exact=True) == ""
    assert differences("`a` and `b`, 0.25", "`a` 与 0.52，三", exact=True) == "lacks `b`, 0.25; has besides 0.52"
    assert differences("three", "3 个 `c`", exact=True) == "has besides `c`" and differences("three", "3 个 `c`", exact=False) == ""
    assert half_width("掩码,温度") == "码," and not half_width("掩码，`温,度`：[a](b,c) 1,2")
    assert unseen_emphasis("**温度。**后") and unseen_emphasis("见**“温度”** ") and not unseen_emphasis("**温度**，**掩码**。 **“温度”**。")
    sections = split("# A\n\n    x\n      y\n\n## B: *b*, c\n\n```sh\n# no heading\n```\n\n| 1 |\n|---|\ntext\n")
    assert [(s.level, s.title, s.blocks, len(s.rows)) for s in sections] == [
        (1, "A", ["    x\n      y"], 0),
        (2, "B: *b*, c", ["```sh\n# no heading"], 2),
    ]
    assert slug("Module B: from scores, to `x`") == "module-b-from-scores-to-x" and slug("模块 B：模式投影、二") == "模块-b模式投影二"
