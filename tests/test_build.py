"""Building the C++ kernels: where there is a compiler a library comes out, where there is none the installation goes on without.

Each build runs setup.py in a copy of what it needs, the way pip does. Where the compiler is not the point, a script stands in for it.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_kernels import assert_equals_reference, operands, recurrent

from k24.kernels import cpu

ROOT = Path(__file__).parents[1]
LIBRARY = Path("k24", "kernels", "_cpu.so")
GXX = shutil.which("g++")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="compilers are called as on POSIX systems")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The package as far as building it goes."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for module in ("k24/__init__.py", "k24/kernels/__init__.py"):
        (tree / module).parent.mkdir(exist_ok=True)
        (tree / module).touch()
    return tree


def build(tree: Path, what: str = "build_editable", **environment: str) -> list[str]:
    """Has setuptools build into ``out/``; returns the lines of the output that are ours."""
    (tree / "out").mkdir(exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CXXFLAGS")}
    command = [sys.executable, "-W", "ignore", "-c", f"from setuptools import build_meta; build_meta.{what}('out')"]
    done = subprocess.run(command, cwd=tree, env=clean | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("k24")]


def compiler(folder: Path, machine: str = "x86_64-linux-gnu", refuses: str = "-no-such-flag") -> tuple[str, Path]:
    """A compiler that makes empty files and writes down how it was called, except when asked for a thing it does not know."""
    script, log = folder / "cxx", folder / "log"
    script.write_text(f"""#!/bin/sh
echo "$*" >> {log}
case " $* " in
  *" -dumpmachine "*) echo {machine}; exit 0 ;;
  *" {refuses} "*) printf 'warning: this and that\\nx.cpp:1: error: {refuses} is not known\\nmore\\n' >&2; exit 1 ;;
esac
while [ "$1" != -o ]; do shift; done
: > "$2"
""")
    script.chmod(0o755)
    return str(script), log


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/nonexistent/c++"}, "/nonexistent/c++ cannot be started: No such file or directory"),
        ({"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}, "/nonexistent/c++ cannot be started"),
        ({"PATH": "/nonexistent"}, "there is no C++ compiler, none of c++, g++, clang++"),
        ({"CXX": "false"}, "false failed: exit status 1"),
    ],
)
def test_without_a_compiler_it_installs_all_the_same(tree: Path, environment: dict[str, str], reason: str) -> None:
    (tree / LIBRARY).write_bytes(b"from an older version")
    (said,) = build(tree, **environment)
    assert reason in said
    assert "runs policies dense" in said and "apt install g++" in said
    assert not (tree / LIBRARY).exists(), "an older library outlived a build that failed"
    assert list((tree / "out").glob("k24-*.whl"))


@pytest.mark.parametrize("refused", ["csrc/avx512.cpp", "csrc/api.cpp", "-shared"])
def test_with_a_compiler_that_fails_it_installs_all_the_same(tree: Path, refused: str) -> None:
    (said,) = build(tree, "build_wheel", CXX=compiler(tree, refuses=refused)[0])
    assert f"failed: x.cpp:1: error: {refused} is not known" in said
    (wheel,) = (tree / "out").glob("*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith((".so", ".o"))]


@pytest.mark.parametrize("what", ["build_wheel", "build_editable"])
def test_library_lands_in_the_package(tree: Path, what: str) -> None:
    assert build(tree, what, CXX=compiler(tree)[0]) == []
    (wheel,) = (tree / "out").glob("*.whl")
    assert (str(LIBRARY) in zipfile.ZipFile(wheel).namelist()) == (what == "build_wheel")
    assert (tree / LIBRARY).exists() == (what == "build_editable")


def test_source_distribution_can_be_built_from(tree: Path) -> None:
    build(tree, "build_sdist")
    (archive,) = (tree / "out").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        inside = {Path(*Path(name).parts[1:]) for name in packed.getnames()}
    used = {Path("csrc", name) for name in ("api.cpp", "avx2.cpp", "avx512.cpp")} | {p.relative_to(tree) for p in tree.glob("csrc/*.h")}
    assert used | {Path("setup.py")} <= inside


def calls(log: Path) -> dict[str, list[str]]:
    """Options by what they were for: a source, or linking. Of several calls the last."""
    lines = [line.split() for line in log.read_text().splitlines()]
    return {next((Path(o).stem for o in line if o.endswith(".cpp")), "link"): line for line in lines if "-o" in line}


def test_instruction_sets_stay_in_their_files(tree: Path) -> None:
    """Anything more in api.cpp, or linked before it, would run on machines that lack it."""
    cxx, log = compiler(tree)
    build(tree, CXX=cxx, CXXFLAGS="-DONE -DTWO")
    options = calls(log)
    sets = {name: sorted(o for o in line if o.startswith("-m")) for name, line in options.items()}
    assert sets == {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx2", "-mavx512bw", "-mavx512dq", "-mavx512f", "-mavx512vl", "-mfma"],
        "api": [],
        "link": [],
    }
    assert [Path(o).stem for o in options["link"] if o.endswith(".o")] == ["api", "avx2", "avx512"]
    for line in options.values():
        assert {"-O3", "-fvisibility=hidden", "-DONE", "-DTWO"} <= set(line)
        assert not [o for o in line if o.startswith("-I")], "a header of Python's may be missing"


def test_compiler_without_openmp(tree: Path) -> None:
    cxx, log = compiler(tree, refuses="-fopenmp")
    assert build(tree, CXX=f"env {cxx}") == []  # a compiler may be a command with arguments
    assert (tree / LIBRARY).exists()
    assert not any("-fopenmp" in line for line in calls(log).values())


def test_machine_without_kernels(tree: Path) -> None:
    cxx, log = compiler(tree, machine="aarch64-linux-gnu")
    assert build(tree, CXX=cxx) == []
    assert set(calls(log)) == {"api", "link"}
    # That is enough only if api.cpp asks for no kernel outside of what is compiled for x86.
    guarded = r"#if defined\(__x86_64__\).*?#endif"
    assert "K24_ISA" not in re.sub(guarded, "", (tree / "csrc" / "api.cpp").read_text(), flags=re.DOTALL)


@pytest.mark.skipif(GXX is None, reason="no g++")
def test_real_compiler(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it makes offers the C interface and nothing else, and runs. Not optimised, to be quick."""
    (tree / LIBRARY).write_bytes(b"from an older version")
    assert build(tree, CXX=str(GXX), CXXFLAGS="-O0") == []
    library = ctypes.CDLL(str(tree / LIBRARY))
    assert library.k24_best_isa() >= 0
    declared = set(re.findall(r"^K24_API .*?(k24_\w+)\(", (tree / "csrc" / "k24.h").read_text(), flags=re.MULTILINE))
    assert len(declared) >= 6 and all(hasattr(library, name) for name in declared)
    if nm := shutil.which("nm"):
        listed = subprocess.run([nm, "-D", "--defined-only", tree / LIBRARY], capture_output=True, text=True, check=True).stdout
        assert set(re.findall(r" [A-TX-Z] (\w+)$", listed, flags=re.MULTILINE)) == declared
    monkeypatch.setattr(cpu, "library_path", lambda: tree / LIBRARY)
    cpu._library.cache_clear()
    try:
        net = recurrent(10, 24, 5)
        if cpu.unavailable(net) is None:
            for layout in ("packed", "shared"):
                assert_equals_reference(cpu.Cpu(net, layout=layout), net, *operands(net, 20))
        else:
            assert cpu.best_isa() is None
    finally:
        cpu._library.cache_clear()
