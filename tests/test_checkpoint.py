"""Checkpoints: whole or not there, whatever happens while one is written, and refused with one clear line when damaged."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from k24 import checkpoint, files
from k24.checkpoint import load_checkpoint, save_checkpoint
from k24.errors import CheckpointError, RunError
from k24.files import write_atomically


def _state(value: float) -> dict:
    return {"weight": torch.full((3, 4), value), "list": [(torch.tensor(value), None)], "number": value, "text": "ü", "flag": True}


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def _value(folder: Path) -> float:
    found = load_checkpoint(folder)
    assert found is not None
    return found[1]["number"]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 10 and 20."""
    for steps in (10, 20):
        save_checkpoint(tmp_path, steps, _state(steps))
    return tmp_path


def _sign(folder: Path) -> None:
    """Makes the index vouch for the newest checkpoint as it is now."""
    entries = json.loads((folder / "index.json").read_text())
    entries[-1]["sha256"] = hashlib.sha256((folder / entries[-1]["file"]).read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(entries))


# --- writing -------------------------------------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded(tmp_path):
    folder = tmp_path / "made" / "if missing"
    assert load_checkpoint(folder) is None
    state = _state(0.1) | {"nan": float("nan"), "half": torch.tensor([1.5], dtype=torch.bfloat16), "rng": torch.Generator().get_state()}
    path = save_checkpoint(folder, 7, state)
    assert path == folder / "step_000000000007.pt"
    steps, found = load_checkpoint(folder)
    assert steps == 7 and found.keys() == state.keys()
    assert torch.equal(found["weight"], state["weight"]) and torch.equal(found["rng"], state["rng"])
    assert found["half"].dtype == torch.bfloat16 and found["list"] == state["list"] and found["number"] == 0.1 and found["text"] == "ü"


def test_what_is_left_in_the_file_is_the_same(tmp_path):
    save_checkpoint(tmp_path, 7, {"weight": torch.arange(6.0).view(2, 3), "large": torch.arange(100_000)})
    _, found = load_checkpoint(tmp_path, mapped=True)
    save_checkpoint(tmp_path, 8, {})
    save_checkpoint(tmp_path, 9, {})  # the file has gone by now, and what was read of it stays
    assert torch.equal(found["weight"], torch.arange(6.0).view(2, 3)) and torch.equal(found["large"], torch.arange(100_000))


def test_a_checkpoint_is_written_piece_by_piece(tmp_path, monkeypatch):
    pieces: list[int] = []
    write = checkpoint._Hashed.write
    monkeypatch.setattr(checkpoint._Hashed, "write", lambda self, data: (pieces.append(len(data)), write(self, data))[1])
    path = save_checkpoint(tmp_path, 7, {name: torch.zeros(50_000) for name in "abcd"})
    assert sum(pieces) == path.stat().st_size and max(pieces) <= 200_000


def test_the_last_two_are_kept(tmp_path):
    for steps in (10, 20, 30, 1000):
        save_checkpoint(tmp_path, steps, _state(steps))
    assert _names(tmp_path) == ["index.json", "step_000000000030.pt", "step_000000001000.pt"]
    assert _value(tmp_path) == 1000


def test_the_same_step_again_replaces_it(two):
    save_checkpoint(two, 20, _state(21))
    assert _names(two) == ["index.json", "step_000000000010.pt", "step_000000000020.pt"]
    assert _value(two) == 21


def test_leftovers_of_a_kill_are_ignored_and_removed(two):
    (two / "step_000000000030.pt.tmp").write_bytes(b"half")
    (two / "step_000000000030.pt").write_bytes(b"renamed, but the index does not name it yet")
    (two / "index.json.tmp").write_bytes(b"[{")
    assert _value(two) == 20
    save_checkpoint(two, 40, _state(40))
    assert _names(two) == ["index.json", "step_000000000020.pt", "step_000000000040.pt"]
    assert _value(two) == 40


def test_a_reader_that_a_training_overtakes(two, monkeypatch):
    """A finished run keeps its last checkpoint alone; whoever was reading the one before gets that one."""
    real = torch.load

    def overtaken(*args, **kwargs):
        monkeypatch.undo()
        save_checkpoint(two, 40, _state(40), keep=1)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", overtaken)
    assert _value(two) == 40


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with ThreadPoolExecutor(1) as other, files.atomic_file(path) as mine:
        mine.write(b"a" * 100)
        other.submit(files.write_atomically, path, b"b" * 50).result()
        assert path.read_bytes() == b"b" * 50
        mine.write(b"a" * 100)
    assert path.read_bytes() == b"a" * 200 and [found.name for found in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("call", ["replace", "fsync", "open"])
@pytest.mark.parametrize("at", range(6))
def test_a_crash_at_any_moment_leaves_the_one_before(two, monkeypatch, call, at):
    """Each write is open, fsync, rename, fsync of the folder; first the checkpoint's, then the index's."""
    real: Callable = getattr(os, call)
    calls = []

    def crash(*args, **kwargs):
        calls.append(args)
        if len(calls) == at + 1:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(files.os, call, crash)
    crashed = True
    try:
        save_checkpoint(two, 30, _state(30))
        crashed = False
    except RunError as error:
        assert "step_000000000030.pt (No space left on device): make room or mend the disk, then --resume goes on" in str(error)
    monkeypatch.undo()
    assert crashed == (at < {"replace": 2, "fsync": 4, "open": 2}[call])
    # Once the index is renamed the new one counts, even though the folder was not flushed any more.
    assert _value(two) == (30 if not crashed or (call, at) in (("fsync", 3), ("open", 1)) else 20)
    save_checkpoint(two, 40, _state(40))
    assert _value(two) == 40
    assert not list(two.glob("*.tmp"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(two, monkeypatch):
    """Torch then raises an error of its own, which does not say why."""

    @contextlib.contextmanager
    def full(path):
        with open("/dev/full", "wb", buffering=0) as file:
            yield file

    monkeypatch.setattr(checkpoint, "atomic_file", full)
    with pytest.raises(RunError, match=r"cannot write checkpoint .*30\.pt \(No space left on device\): make room or mend the disk"):
        save_checkpoint(two, 30, {"weight": torch.zeros(50_000)})
    monkeypatch.undo()
    assert _value(two) == 20


def test_as_many_are_kept_as_asked_for(two):
    save_checkpoint(two, 30, _state(30), keep=1)
    assert _names(two) == ["index.json", "step_000000000030.pt"] and _value(two) == 30


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def no_rename(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files.os, "replace", no_rename)
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(path, b"newer")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_atomically(path, b"newer")
    assert path.read_bytes() == b"newer" and _names(tmp_path) == ["file"]


# --- reading -------------------------------------------------------------------------------------------------------------------


def test_the_one_before_is_used_when_the_newest_was_deleted(two):
    (two / "step_000000000020.pt").unlink()
    assert load_checkpoint(two)[0] == 10
    # And it stays until there are two others.
    save_checkpoint(two, 30, _state(30))
    assert _names(two) == ["index.json", "step_000000000010.pt", "step_000000000030.pt"]
    (two / "step_000000000030.pt").unlink()
    assert _value(two) == 10


def test_a_run_does_not_silently_begin_anew_when_all_are_gone(two):
    for path in two.glob("*.pt"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"step_000000000020\.pt is gone: restore it, or start over"):
        load_checkpoint(two)


def test_cut_short(two):
    path = two / "step_000000000020.pt"
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(two)
        assert str(caught.value) == (
            f"checkpoint {path} is damaged or cut short ({length} bytes, its checksum differs): "
            "delete it to go on from step_000000000010.pt"
        )


def test_every_flipped_bit_is_noticed(two):
    path = two / "step_000000000020.pt"
    whole = path.read_bytes()
    for _ in range(50):
        data = bytearray(whole)
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="is damaged or cut short"):
            load_checkpoint(two)


def test_damage_that_the_checksum_vouches_for_is_no_crash(two):
    """Someone can write an index to a damaged file: it is refused, or holds a state, and nothing else happens."""
    path = two / "step_000000000020.pt"
    whole = path.read_bytes()
    refused = 0
    for k in range(60):
        data = bytearray(whole)
        if k < 10:
            data = data[: len(data) * k // 10]
        else:
            for _ in range(20):
                data[random.randrange(len(data))] = random.randrange(256)
        path.write_bytes(data)
        _sign(two)
        try:
            steps, state = load_checkpoint(two)
            assert isinstance(steps, int) and isinstance(state, dict)
        except CheckpointError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
    assert refused > 20


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("how", ["pickle", "torch, old format", "torch"])
def test_code_in_a_checkpoint_is_never_run(two, tmp_path, how):
    bomb = tmp_path / "executed"
    content = {"format": checkpoint.FORMAT, "steps": 20, "state": {"weight": _Bomb(bomb)}}
    buffer = io.BytesIO()
    if how == "pickle":
        pickle.dump(content, buffer)
    else:
        torch.save(content, buffer, _use_new_zipfile_serialization=how == "torch")
    (two / "step_000000000020.pt").write_bytes(buffer.getvalue())
    _sign(two)
    with pytest.raises(CheckpointError, match=r"none of it was run\): delete it to go on from step_000000000010\.pt$"):
        load_checkpoint(two)
    assert not bomb.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"format": 99, "steps": 20, "state": {}},
            f"has format 99, this k24 reads format {checkpoint.FORMAT}: use the k24 version that wrote it",
        ),
        ({"steps": 20, "state": {}}, "has format None"),
        ([1, 2], "has format list"),
        ({"format": checkpoint.FORMAT, "state": {}}, "holds no run"),
        ({"format": checkpoint.FORMAT, "steps": 20, "state": 3}, "holds no run"),
    ],
)
def test_another_format(two, content, message):
    path = two / "step_000000000020.pt"
    torch.save(content, path)
    _sign(two)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(two)
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[{",
        b"{}3",
        b"\xff\xfe\x00",
        b"3",
        b"{}",
        b"[]",
        b'{"file": 1}',
        b"[1]",
        b'[{"file": "step_1.pt"}]',
        b'[{"file": 3, "steps": 1, "sha256": ""}]',
        b'[{"file": "a", "steps": Infinity, "sha256": ""}]',
        b"[" * 100_000,
    ],
)
def test_a_damaged_index(two, text):
    (two / "index.json").write_bytes(text)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(two)
    assert str(caught.value) == f"{two / 'index.json'} is damaged: restore it, or start over with another --out"
    with pytest.raises(CheckpointError):
        save_checkpoint(two, 30, _state(30))
    assert (two / "step_000000000020.pt").exists() and (two / "step_000000000010.pt").exists()


def test_an_index_names_files_of_its_own_folder_only(two, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere") / "step_000000000020.pt"
    (two / "step_000000000020.pt").replace(other)
    entries = json.loads((two / "index.json").read_text())
    for name in (str(other), f"../{other.parent.name}/{other.name}", "..", "."):
        entries[-1]["file"] = name
        (two / "index.json").write_text(json.dumps(entries))
        assert load_checkpoint(two)[0] == 10
