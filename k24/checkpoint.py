"""Checkpoints that survive a kill at any moment.

A checkpoint is written under a temporary name, flushed to disk and renamed, and only then named in ``index.json``
together with its SHA-256, by the same three steps. Whoever reads the index therefore finds whole files. The last two
are kept, of a finished run the last; reading uses torch's ``weights_only`` mode, which runs no code.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from k24.errors import LAST_GOOD, CheckpointError, RunError
from k24.files import atomic_file, write_atomically

FORMAT = 5
KEEP = 2


class _Hashed:
    """A file that takes the checksum of what is written to it: the whole of a checkpoint is never in memory twice."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()
        self.failed: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.failed = error  # torch raises one of its own for it, which does not say why
            raise

    def flush(self) -> None:
        self._file.flush()


def save_checkpoint(folder: Path, steps: int, state: dict[str, Any], keep: int = KEEP) -> Path:
    """Writes a checkpoint and forgets all but the last few.

    Args:
        folder: ``checkpoints/`` of a run; made if missing.
        steps: Environment steps done, part of the file's name.
        state: Tensors, numbers, strings, and containers of them.
        keep: How many stay, this one among them.

    Raises:
        RunError: It cannot be written; those before are as they were.
    """
    path, written = folder / f"step_{steps:012d}.pt", None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            written = _Hashed(file)
            torch.save({"format": FORMAT, "steps": steps, "state": state}, written)  # type: ignore[arg-type]
        _name_in_index(folder, path, steps, written.digest.hexdigest(), keep)
    except (OSError, RuntimeError) as error:
        failed = error if isinstance(error, OSError) else written.failed if written else None
        if failed is None:
            raise
        said = f"cannot write checkpoint {path} ({failed.strerror or failed}): make room or mend the disk, then --resume goes on"
        raise RunError(f"{said}; {LAST_GOOD}") from error
    return path


def _name_in_index(folder: Path, path: Path, steps: int, digest: str, keep: int) -> None:
    """Names a whole file in the index, and removes the files that are no longer named."""
    entries = [e for e in _read_index(folder) if e["file"] != path.name and (folder / e["file"]).is_file()]
    entries.append({"file": path.name, "steps": steps, "sha256": digest})
    write_atomically(folder / "index.json", json.dumps(entries[-keep:], indent=1).encode())
    kept = {e["file"] for e in entries[-keep:]}
    for old in (*folder.glob("step_*.pt*"), *folder.glob("index.json*.tmp")):
        if old.name not in kept:
            old.unlink(missing_ok=True)


def load_checkpoint(folder: Path, device: torch.device | str = "cpu", mapped: bool = False) -> tuple[int, dict[str, Any]] | None:
    """Reads the newest checkpoint.

    Args:
        folder: ``checkpoints/`` of a run.
        device: Where tensors go.
        mapped: Leave tensors in the file until they are looked at, for those who want the policy and not the replay.

    Returns:
        Environment steps done and the state, or None if there is no checkpoint yet.

    Raises:
        CheckpointError: The newest checkpoint is damaged or of another format, or all that there were are gone.
    """
    written = _read_index(folder)
    if not written:
        return None
    entries = [e for e in written if (folder / e["file"]).is_file()]
    if not entries:
        raise CheckpointError(f"checkpoint {folder / written[-1]['file']} is gone: restore it, or start over with another --out")
    path, digest = folder / entries[-1]["file"], entries[-1]["sha256"]
    before = (
        f"delete it to go on from {entries[-2]['file']}" if len(entries) > 1 else "there is no earlier one: start over with another --out"
    )
    try:
        with open(path, "rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == digest
        if not same:
            raise CheckpointError(
                f"checkpoint {path} is damaged or cut short ({path.stat().st_size} bytes, its checksum differs): {before}"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one error is enough for a file that is none of ours
            content = torch.load(path, map_location=device, weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        if _read_index(folder) != written:
            return load_checkpoint(folder, device, mapped)  # a training has saved since, and removed it
        raise CheckpointError(f"checkpoint {path} is gone: {before}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} is none of ours, or holds more than tensors and plain values (none of it was run): {before}"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({' '.join(str(error).split())[:120]}): {before}") from error
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if type(found) is not type(FORMAT) or found != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {found}, this k24 reads format {FORMAT}: use the k24 version that wrote it, or start over"
        )
    steps, state = content.get("steps"), content.get("state")
    if type(steps) is not int or not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {path} holds no run: {before}")
    return steps, state


def _read_index(folder: Path) -> list[dict[str, Any]]:
    path = folder / "index.json"
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, list) or not entries:
            raise TypeError("expected a list of checkpoints")
        return [{"file": Path(e["file"]).name, "steps": int(e["steps"]), "sha256": str(e["sha256"])} for e in entries]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: restore it, or start over with another --out") from error
