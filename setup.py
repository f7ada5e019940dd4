"""Builds the C++ kernels of ``csrc/`` where there is a compiler; where there is none, k24 installs all the same and runs dense.

The kernels are a plain shared library: loaded by ctypes, it needs no header of Python's and serves every version of it. All else about the
package stands in pyproject.toml. ``CXX`` chooses the compiler, ``CXXFLAGS`` adds to its options.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
LIBRARY = Path("k24", "kernels", "_cpu.so")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno")

# Each file of kernels has its own instruction set, and api.cpp asks the CPU before it calls one. What is built here may run elsewhere, so
# never -march=native. They stand in the order of linking: of what several files bring along, such as templates of the standard library,
# the linker keeps the first copy, which must run on every CPU that any of the files runs on.
API = "csrc/api.cpp"
KERNELS = {
    "csrc/avx2.cpp": ("-mavx2", "-mfma"),
    "csrc/avx512.cpp": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mavx2"),
}


class NotBuiltError(Exception):
    """Why there will be no library."""


def run(command: list[str]) -> str:
    """Runs a compiler and returns what it printed.

    Raises:
        NotBuiltError: It cannot be started, or it failed.
    """
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise NotBuiltError(f"{command[0]} cannot be started: {error.strerror}") from error
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        raise NotBuiltError(f"{command[0]} failed: {next((line for line in lines if 'error' in line), lines[-1]).strip()}")
    return done.stdout


def build(library: Path, objects: Path) -> None:
    """Compiles and links.

    Args:
        library: The file to make.
        objects: A folder for what is made on the way.

    Raises:
        NotBuiltError: There is no compiler, or it failed.
    """
    chosen = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), "")
    if not chosen:
        raise NotBuiltError(f"there is no C++ compiler, none of {', '.join(COMPILERS)}")
    compiler = shlex.split(chosen)
    flags = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    for folder in (objects, library.parent):
        folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: str, *extra: str) -> str:
        target = str(objects / f"{Path(source).stem}.o")
        run([*compiler, *flags, *extra, "-c", source, "-o", target])
        return target

    x86 = run([*compiler, "-dumpmachine"]).startswith(("x86_64", "amd64"))
    kernels = [compiled(source, *isa) for source, isa in KERNELS.items() if x86]

    def linked(*threads: str) -> None:
        run([*compiler, *flags, *threads, "-shared", compiled(API, *threads), *kernels, "-o", str(library)])

    try:
        linked("-fopenmp")
    except NotBuiltError:  # a compiler without OpenMP: one thread, then
        linked()


class BuildKernels(build_ext):
    """Makes the library where setuptools would make a module."""

    def get_ext_filename(self, fullname: str) -> str:
        """The same name for every version of Python."""
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        """An older library must not outlive a build that fails."""
        if self.inplace:
            (ROOT / LIBRARY).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Builds the library, or says in one line why not."""
        library = Path(self.get_ext_fullpath(ext.name)).absolute()
        library.unlink(missing_ok=True)
        try:
            build(library, Path(self.build_temp).absolute())
        except NotBuiltError as reason:
            library.unlink(missing_ok=True)
            print(
                f"k24: the C++ kernels were not built, because {reason}. k24 works without them, but runs policies dense and slower; "
                "install a C++ compiler (Debian: apt install g++) and then k24 again.",
                file=sys.stderr,
            )


headers = [f"csrc/{path.name}" for path in sorted((ROOT / "csrc").glob("*.h"))]
setup(
    ext_modules=[Extension("k24.kernels._cpu", [API, *KERNELS], depends=headers, optional=True)],
    cmdclass={"build_ext": BuildKernels},
)
