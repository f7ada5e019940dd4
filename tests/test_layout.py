"""How the package is laid out: who may import whom, what an import loads, and who may print.

A part of k24 is a module or folder, named by its path below ``k24`` with dots. To add one, give it a row in ``LAYERS``.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "k24"

# What each part may import of k24, besides itself and `errors`. A name allows what lies below it too ("envs" allows "envs.base"); the
# row with the longest name that fits a module is the one that counts.
#
# Two wings stand on `sparse` and `actions`: running (kernels, policy) and training (everything else up to `train`). A policy is run where
# nothing of the training wing is installed, so only the parts under "where the wings meet" may see both.
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "strict": set(),
    "allocator": set(),
    "actions": set(),
    # running
    "sparse": set(),
    "kernels": {"sparse"},
    "artifact": {"files", "strict", "actions", "sparse", "kernels"},
    "policy": {"actions", "artifact", "kernels", "sparse"},
    "onnx": {"actions", "kernels"},
    # training
    "sharing": {"sparse"},
    "nets": {"sparse", "sharing"},
    "envs.base": set(),
    "envs": {"envs.base"},
    "learners": {"actions", "sparse", "nets", "sharing", "envs.base"},
    "config": {"files", "sparse", "sharing", "nets", "envs", "learners"},
    "checkpoint": {"config", "files"},
    # where the wings meet
    "evaluate": {"actions", "sparse", "policy", "sharing", "nets", "envs", "learners", "config", "checkpoint"},
    "export": {"sparse", "kernels", "policy", "onnx", "nets", "files", "evaluate"},
    "inspection": {"sparse", "kernels", "artifact", "learners", "export", "evaluate"},
    # on top
    "train": {"allocator", "files", "sparse", "sharing", "nets", "envs", "learners", "config", "checkpoint", "evaluate", "inspection"},
    "bench": {
        *("allocator", "sparse", "kernels", "policy", "sharing", "nets", "envs", "learners", "config", "checkpoint"),
        *("artifact", "onnx", "export", "evaluate", "train"),
    },
    "report": {"files", "strict", "policy", "config", "evaluate", "export", "inspection", "bench"},
    "suites": set(),
    "presets": {"config"},
    "sweep": {"strict", "envs", "config", "checkpoint", "evaluate", "train"},
    "commands": {
        *("allocator", "sparse", "artifact", "sharing", "nets", "envs", "learners", "config", "checkpoint"),
        *("export", "evaluate", "inspection", "train", "bench", "suites", "presets", "sweep", "report"),
    },
    "cli": {"commands"},
    "__main__": {"cli"},
    "__init__": {"sparse", "policy"},  # the public names
}
RUNNING_WING = ("files", "strict", "actions", "sparse", "kernels", "artifact", "policy")
MAY_PRINT = {"cli", "commands", "__main__", "envs.worker"}  # a worker is a process of its own


def modules(package: Path) -> dict[str, Path]:
    """Maps the dotted name below ``package`` to each of its files; a folder is its ``__init__``, the package itself ``__init__``."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


def is_within(name: str, part: str) -> bool:
    """Whether the dotted name is the part or lies below it."""
    return name == part or name.startswith(part + ".")


def part_of(name: str) -> str | None:
    """Finds the row of ``LAYERS`` that a module falls under."""
    return max((part for part in LAYERS if is_within(name, part)), key=len, default=None)


def imports(name: str, files: dict[str, Path], types_too: bool = True) -> Iterator[tuple[str, int]]:
    """Yields (module of k24, line) for each import in a module, also those inside functions.

    Args:
        name: The module, as in ``files``.
        files: What ``modules`` found.
        types_too: Whether imports under ``if TYPE_CHECKING`` count.
    """
    path = files[name]
    package = ["k24", *name.split(".")] if name != "__init__" else ["k24"]
    if path.stem != "__init__":
        package.pop()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in for_types and not types_too:
            continue
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - (node.level - 1)] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            # `from k24.envs import base` takes a module, `from k24.envs import make` a name of the folder's __init__.
            below = [(f"{base}.{alias.name}".removeprefix("k24."), base) for alias in node.names]
            targets = [f"k24.{module}" if module in files else base for module, base in below]
        for target in dict.fromkeys(targets):
            if is_within(target, "k24"):
                yield target.removeprefix("k24").removeprefix(".") or "__init__", node.lineno


def layer_errors(package: Path) -> list[str]:
    """Lists every import that goes the wrong way, and every file that no row covers."""
    files = modules(package)
    errors = []
    for name, path in files.items():
        part = part_of(name)
        if part is None:
            errors.append(f"{path}: no row in LAYERS of tests/test_layout.py covers {name!r}: add one")
            continue
        for target, line in imports(name, files):
            if not any(is_within(target, allowed) for allowed in {"errors", part, *LAYERS[part]}):
                errors.append(f"{path}:{line}: {part} imports {target}; it may import {', '.join(sorted(LAYERS[part])) or 'only errors'}")
    return errors


def import_cycle(package: Path) -> list[str]:
    """Finds modules that need each other in a circle when they run, as a path through it; empty when there is none."""
    files = modules(package)
    try:
        TopologicalSorter({name: {target for target, _ in imports(name, files, types_too=False)} for name in files}).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def output_errors(package: Path) -> list[str]:
    """Lists every place outside the command line that prints or ends the process."""
    forbidden = {"print", "exit", "quit", "sys.exit", "os._exit", "sys.stdout.write", "sys.stderr.write", "SystemExit"}
    errors = []
    for name, path in modules(package).items():
        if part_of(name) in MAY_PRINT:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            used = node.func if isinstance(node, ast.Call) else node.exc if isinstance(node, ast.Raise) else None
            if isinstance(used, ast.Name | ast.Attribute) and ast.unparse(used) in forbidden:
                errors.append(f"{path}:{node.lineno}: {ast.unparse(used)}: only the command line prints and exits; return it, or raise")
    return errors


def loaded_by(statement: str) -> tuple[set[str], bool]:
    """Runs an import in a fresh process that already holds torch, numpy and safetensors.

    Returns:
        The top-level packages outside the standard library that it loaded, and whether it started CUDA.
    """
    program = f"""
import json, sys
import numpy, torch, safetensors.torch
before = set(sys.modules)
{statement}
new = {{name.partition(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)
compilers = {{"torch._inductor", "torch._dynamo", "torch.utils.cpp_extension", "triton"}} & (set(sys.modules) - before)
print(json.dumps([sorted(new | compilers), torch.cuda.is_initialized()]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded, cuda = json.loads(done.stdout.splitlines()[-1])
    return set(loaded), cuda


def test_imports_go_one_way() -> None:
    assert not (errors := layer_errors(PACKAGE)), "\n" + "\n".join(errors)


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert not (cycle := import_cycle(PACKAGE)), " <- ".join(cycle)


def test_table_of_layers_has_no_circle_and_no_unknown_name() -> None:
    assert {name for row in LAYERS.values() for name in row} <= set(LAYERS)
    TopologicalSorter(LAYERS).prepare()


def test_running_wing_sees_nothing_of_training() -> None:
    for part in RUNNING_WING:
        assert LAYERS[part] <= set(RUNNING_WING), part


def test_only_the_command_line_prints_or_exits() -> None:
    assert not (errors := output_errors(PACKAGE)), "\n" + "\n".join(errors)


def test_folders_are_one_level_deep_and_packages() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.relative_to(PACKAGE).parts) <= 2, f"{path}: folders inside folders"
        assert (path.parent / "__init__.py").exists(), f"{path.parent}: has no __init__.py, so it would not be installed"


@pytest.mark.parametrize("part", ["", *RUNNING_WING])
def test_import_needs_only_torch_numpy_safetensors(part: str) -> None:
    """So that the layers can be borrowed, and a policy run, where nothing else is installed."""
    loaded, cuda = loaded_by(f"import k24.{part}" if part else "import k24")
    assert loaded == {"k24"}
    assert not cuda, "importing started CUDA"


# The rules themselves, tried on small packages that break them.


def write_package(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "k24"
    for name, source in {"__init__.py": "", **files}.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source, encoding="utf-8")
    return package


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("sparse/layers.py", "from k24.sharing.schemes import make", "sparse imports sharing.schemes; it may import only errors"),
        ("sparse/layers.py", "from ..sharing import schemes", "sparse imports sharing.schemes"),
        ("sparse/layers.py", "import torch, k24.nets", "sparse imports nets"),
        ("sparse/layers.py", "import k24", "sparse imports __init__"),
        ("sparse/__init__.py", "from .. import nets", "sparse imports nets"),
        ("nets.py", "def late():\n    from . import envs", "k24/nets.py:2: nets imports envs"),
        ("learners/value.py", "from k24.envs.mpe import Mpe", "learners imports envs.mpe"),
        ("learners/value.py", "from k24 import envs", "learners imports envs"),
        ("learners/value.py", "if TYPE_CHECKING:\n    from k24.envs.mpe import Mpe, Other", "learners imports envs.mpe"),
        ("policy.py", "import k24.nets", "policy imports nets; it may import actions, artifact, kernels"),
        ("gadgets/new.py", "", "covers 'gadgets.new'"),
    ],
)
def test_layer_rule_catches(tmp_path: Path, file: str, source: str, message: str) -> None:
    others = {"sharing/__init__.py": "", "sharing/schemes.py": "", "nets.py": "", "envs/__init__.py": "", "envs/mpe.py": ""}
    errors = layer_errors(write_package(tmp_path, {**others, file: source}))
    assert len(errors) == 1
    assert message in errors[0]


def test_layer_rule_accepts_what_is_allowed(tmp_path: Path) -> None:
    package = write_package(
        tmp_path,
        {
            "errors.py": "",
            "__init__.py": "from k24.sparse import MaskedLinear",
            "sparse/__init__.py": "from .layers import MaskedLinear",
            "sparse/layers.py": "import k24like, torch\nfrom ..errors import UsageError\nfrom . import patterns",
            "sparse/patterns.py": "if TYPE_CHECKING:\n    from .layers import MaskedLinear",
            "envs/base.py": "",
            "learners/value.py": "from k24.envs.base import Step\nfrom k24.envs import base",
        },
    )
    assert layer_errors(package) == []
    assert import_cycle(package) == []


def test_cycle_rule_catches(tmp_path: Path) -> None:
    package = write_package(tmp_path, {"sparse/a.py": "from k24.sparse import b", "sparse/b.py": "def late():\n    from .a import x"})
    assert set(import_cycle(package)) == {"sparse.a", "sparse.b"}


@pytest.mark.parametrize(
    "source", ["print('x')", "import sys\nsys.exit(1)", "raise SystemExit", "raise SystemExit(2)", "import sys\nsys.stderr.write('x')"]
)
def test_output_rule_catches(tmp_path: Path, source: str) -> None:
    assert len(output_errors(write_package(tmp_path, {"nets.py": source, "cli.py": source}))) == 1


def test_loading_rule_catches() -> None:
    loaded, _ = loaded_by("import rich, torch._dynamo")
    assert {"rich", "torch._dynamo"} <= loaded
