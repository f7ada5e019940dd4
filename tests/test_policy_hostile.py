"""Policy files that are cut, damaged, forged, or no policy files: each is refused in one line, or is a sound policy after all.

The forger of these tests knows the format and signs what he changed, so no test of what he does is saved by the digest.
"""

from __future__ import annotations

import builtins
import copy
import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_policy import random_net, spec_of

import k24
from k24 import artifact
from k24.actions import KINDS
from k24.errors import PolicyFileError, UsageError
from k24.policy import load_policy, save_policy

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a policy of 3 masked slots and a GRU, and the smallest of 2 with own biases."""
    path = tmp_path_factory.mktemp("hostile")
    torch.manual_seed(0)
    net = random_net(slots=3, inputs=7, hidden=6, outputs=5)
    save_policy(path / "gru.safetensors", net, spec_of(net))
    net = random_net(slots=2, inputs=6, hidden=2, outputs=2, gru=False, dtype=torch.bfloat16)
    save_policy(path / "small.safetensors", net, spec_of(net, agent_id=True))
    net = random_net(slots=3, inputs=7, hidden=6, outputs=5, kind="one mask")
    save_policy(path / "one.safetensors", net, spec_of(net))
    return path


@pytest.fixture(autouse=True)
def _no_flushing(monkeypatch) -> None:
    """Thousands of files are written here, and none is missed after a power cut."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


class Forged:
    """A policy file taken apart."""

    def __init__(self, data: bytes) -> None:
        length = int.from_bytes(data[:8], "little")
        self.header = json.loads(data[8 : 8 + length])
        self.about = json.loads(self.header.pop("__metadata__")["k24"])
        self.body = bytearray(data[8 + length :])

    def signed(self) -> bytes:
        """The file with a digest that fits, as far as what the header says makes sense."""
        about = {key: value for key, value in self.about.items() if key != "sha256"}
        if "sha256" in self.about:
            try:
                about["sha256"] = self.digest(about) if isinstance(self.about["sha256"], str) else self.about["sha256"]
            except (TypeError, ValueError, KeyError, AttributeError, RecursionError):
                about["sha256"] = "0" * 64
        return self.file({"k24": json.dumps(about)})

    def file(self, metadata: Any) -> bytes:
        return self.raw(json.dumps({"__metadata__": metadata, **self.header}))

    def raw(self, header: str) -> bytes:
        text = header.encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + bytes(self.body)

    def digest(self, about: dict) -> str:
        tensors = sorted((name, entry["dtype"], entry["shape"], *entry["data_offsets"]) for name, entry in self.header.items())
        described = json.dumps([about, [list(t[:3]) for t in tensors]], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(described.encode() + b"".join(bytes(self.body[b:e]) for *_, b, e in tensors)).hexdigest()


def refused(path: Path, data: bytes | None = None) -> str | None:
    """Why a file is refused; None if it is a sound policy."""
    if data is not None:
        path.write_bytes(data)
    try:
        policy = load_policy(path, backend="reference")
    except PolicyFileError as error:
        message = str(error)
        assert isinstance(error, UsageError) and error.exit_status == 2
        assert repr(str(path)) in message and len(message) < 700 and message.isprintable(), message
        return message.replace(str(path), "")
    artifact.check_shapes(policy.net, policy.spec)
    artifact.check_values(policy.net)
    agents, slots = policy.spec.n_agents, policy.net.n_slots
    if agents == slots and policy.net.n_slots < 10:
        actions, _ = policy.act(torch.zeros(agents, 2, policy.spec.obs_dim))
        if KINDS[policy.spec.action].continuous:
            assert actions.shape == (agents, 2, policy.spec.n_actions) and float(actions.abs().max()) <= 1
        else:
            assert actions.shape == (agents, 2) and int(actions.min()) >= 0 and int(actions.max()) < policy.spec.n_actions
    return None


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path to each value inside lists and objects."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*path, key)
        yield from places(item, (*path, key))


def changed(value: Any, path: tuple, change: Callable[[Any, Any], None]) -> Any:
    """A copy in which ``change(parent, key)`` was done at a place."""
    value = parent = copy.deepcopy(value)
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return value


def test_the_forger_writes_what_we_write(folder) -> None:
    for name in ("gru", "small", "one"):
        data = (folder / f"{name}.safetensors").read_bytes()
        forged = Forged(data)
        assert Forged(forged.signed()).about == forged.about
        assert refused(folder / "x.safetensors", forged.signed()) is None
        forged.about["sha256"] = "0" * 64
        assert "its digest is not" in refused(folder / "x.safetensors", forged.file({"k24": json.dumps(forged.about)}))


# --- damage ------------------------------------------------------------------------------------------------------------------------


def test_any_flipped_bit_is_found(folder) -> None:
    data = bytearray((folder / "small.safetensors").read_bytes())
    path = folder / "flipped.safetensors"
    path.write_bytes(data)
    with open(path, "r+b", buffering=0) as file:
        for place in range(len(data)):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([data[place] ^ (1 << bit)]), place)
                with pytest.raises(PolicyFileError):
                    load_policy(path, backend="reference")
            os.pwrite(file.fileno(), data[place : place + 1], place)
    assert refused(path) is None


def test_every_cut_and_every_tail_is_found(folder) -> None:
    data = (folder / "small.safetensors").read_bytes()
    path = folder / "cut.safetensors"
    path.write_bytes(data)
    messages = {}
    for length in reversed(range(len(data))):
        os.truncate(path, length)
        messages[length] = refused(path)
    assert all(messages.values())
    assert "is empty" in messages[0] and "or cut short" in messages[7]
    assert "is cut short: its header takes" in messages[200] and "is cut short or too long" in messages[len(data) - 1]
    for tail in (b"\0", b"PK\x03\x04", bytes(4096)):
        assert "cut short or too long" in refused(path, data + tail)


# --- forgery -----------------------------------------------------------------------------------------------------------------------

NASTY = [
    -1, 0, 1, 2, 3, 7, 4097, 2**31, 2**32 + 3, 10**12, 2**63 - 1, 2**63, 10**30, 10**400, 1.0, 1.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "3", "\n", "\0", "\ud800", "x" * 300, "fc1", "gru_input", "fc1.weight", "F16", "BF16", "U8", "I64", "2:4",
    "4:8", "1:99", "500000:1000000", " 2:4", "٢:٤", None, True, False, [], [1], [1, 2], [0, 8], [-8, 0], [10**12] * 3, {}, {"slots": 3},
    {"slots": 1, "pattern": "2:4"}, {"slots": 1, "pattern": "2:4", "inputs": 7}, {"slots": 3, "pattern": "2:4", "inputs": 6},
    [[[[]]]], ["x"] * 50, "gaussian", "deterministic",
]  # fmt: skip


def forgeries(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """Files with one or several things changed, signed again."""

    def put(value: Any) -> Callable[[Any, Any], None]:
        return lambda parent, key: parent.__setitem__(key, value)

    def double(parent: Any, key: Any) -> None:
        if isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            parent[f"{key}2"] = copy.deepcopy(parent[key])

    def swap(parent: Any, key: Any) -> None:
        other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[key], parent[other] = parent[other], parent[key]

    def nudge(parent: Any, key: Any) -> None:
        if type(parent[key]) is int:
            parent[key] += rng.choice([-8, -4, -2, -1, 1, 2, 4, 8])

    edits = [lambda parent, key: parent.pop(key), double, swap, nudge]
    fresh = Forged(data)
    for part in ("about", "header"):
        spots = list(places(getattr(fresh, part)))
        for path in spots:
            for edit in [*(put(value) for value in rng.sample(NASTY, 6)), *edits]:
                forged = Forged(data)
                setattr(forged, part, changed(getattr(forged, part), path, edit))
                yield forged.signed()
        for _ in range(150):  # several at once
            forged = Forged(data)
            for path in rng.sample(spots, 3):
                try:
                    value = changed(getattr(forged, part), path, rng.choice([put(rng.choice(NASTY)), *edits]))
                except (KeyError, IndexError, TypeError, AttributeError):
                    continue  # the place is gone
                setattr(forged, part, value)
            yield forged.signed()
    for _ in range(250):  # contents: runs of bytes anywhere
        forged = Forged(data)
        start, length = rng.randrange(len(forged.body)), rng.choice([1, 2, 4, 16, 100])
        run = rng.choice([b"\xff", b"\0", b"\x7f", b"\x80", rng.randbytes(1)]) * length
        forged.body[start : start + length] = run[: len(forged.body) - start]
        yield forged.signed()


def test_thousands_of_forged_and_damaged_files(folder) -> None:
    rng = random.Random(0)
    seen: dict[str | None, int] = {}
    path = folder / "forged.safetensors"
    opened = os.open(path, os.O_WRONLY | os.O_CREAT)
    for name in ("gru", "small", "one"):
        data = (folder / f"{name}.safetensors").read_bytes()
        files = list(forgeries(data, rng))
        for _ in range(400):  # not signed
            spoilt = bytearray(data)
            start, length = rng.randrange(len(data)), rng.choice([1, 2, 5, 20, 200])
            spoilt[start : start + length] = rng.choice([rng.randbytes(length), bytes(length), b"[" * length, b"9" * length])
            files.append(bytes(spoilt))
        for file in files:
            # Over the file before, because a file system takes longest to empty one.
            os.pwrite(opened, file, 0)
            os.truncate(opened, len(file))
            message = refused(path)
            kind = None if message is None else message.partition("; it was damaged")[0][:40]
            seen[kind] = seen.get(kind, 0) + 1
    os.close(opened)
    assert sum(seen.values()) >= 3000
    # Some forgeries are policies, such as one with another number of steps; and the many faults are told apart.
    assert 200 < seen.pop(None) < 1500
    assert len(seen) > 60


def test_faults_have_names(folder) -> None:
    data = (folder / "gru.safetensors").read_bytes()
    nan, inf = float("nan"), float("inf")

    def about(edit: Callable[[dict], Any]) -> bytes:
        forged = Forged(data)
        edit(forged.about)
        return forged.signed()

    def header(edit: Callable[[dict], Any]) -> bytes:
        forged = Forged(data)
        edit(forged.header)
        return forged.signed()

    def number(tensor: str, value: float, at: int = 0) -> bytes:
        forged = Forged(data)
        begin = forged.header[tensor]["data_offsets"][0] + 4 * at
        forged.body[begin : begin + 4] = torch.tensor([value]).numpy().tobytes()
        return forged.signed()

    def codes(value: int) -> bytes:
        forged = Forged(data)
        begin, end = forged.header["fc1.codes"]["data_offsets"]
        forged.body[begin:end] = bytes([value]) * (end - begin)
        return forged.signed()

    def layer(n: int, **changes: Any) -> bytes:
        return about(lambda a: a["net"]["layers"][n].update(changes))

    for file, fault in [
        (number("fc2.weight", nan, 5), "the weight of layer fc2 holds NaN or infinity"),
        (number("gru_recurrent.bias", -inf, 17), "the bias of layer gru_recurrent holds NaN or infinity"),
        (codes(0xFF), "hold 7, which is no pattern of 2:4"),
        (codes(0b10010010), "the code 2 in a group whose padding"),
        (about(lambda a: a.update(version=3)), "has version 3 of the format and needs a newer k24: this one reads up to version 2"),
        (about(lambda a: a.update(version=10**12, more={})), "needs a newer k24"),
        (about(lambda a: a.update(version="1")), "version must be a whole number"),
        (about(lambda a: a.update(version=True)), "version must be a whole number"),
        (about(lambda a: a.update(format="other")), "without k24's metadata"),
        (about(lambda a: a.update(extra=1)), "the metadata must have the keys"),
        (about(lambda a: a["net"].update(slots=10**12)), "slots of the net must be a whole number in 1..4096, got 1000000000000"),
        (about(lambda a: a["net"].update(slots=4)), "each must have 1 or all 4"),
        (about(lambda a: a["policy"].update(steps=-1)), "steps must be a whole number"),
        (about(lambda a: a["policy"].update(obs_dim=8)), "the policy's spec has 8"),
        (about(lambda a: a["policy"].update(action="continuous")), "action must be one of discrete, categorical, gaussian, deterministic"),
        (about(lambda a: a["policy"].update(action=["discrete"])), "action must be one of discrete"),
        (about(lambda a: a["policy"].update(action="gaussian")), "5 actions, which take 10 outputs where action is gaussian"),
        (about(lambda a: a["policy"].update(action="gaussian", n_actions=2**62)), "which take 9223372036854775808 outputs"),
        (about(lambda a: a["policy"].pop("task")), "the policy's spec must have the keys"),
        (layer(0, masks={"slots": 10**12, "pattern": "2:4"}), "slots of layer fc1 must be"),
        (layer(0, masks={"slots": 2, "pattern": "2:4"}), "codes of layer fc1 take 9 bytes of U8, got 14"),
        (layer(0, masks={"slots": 3, "pattern": "9999999:99999999"}), "a pattern must be such as '2:4'"),
        (layer(0, masks={"slots": 3, "pattern": "4:2"}), "keeps nothing or everything"),
        (layer(0, masks=None), "has tensors that no layer needs: ['fc1.codes']"),
        (layer(0, relu=1), "relu of layer fc1 must be true or false"),
        (layer(0, name="fc2"), "has tensors that no layer needs: ['fc1.bias', 'fc1.codes', 'fc1.weight']"),
        (about(lambda a: a["net"]["layers"].insert(3, a["net"]["layers"][3])), "layers must be called"),
        (about(lambda a: a["net"]["layers"].insert(3, a["net"]["layers"].pop())), "takes 6 inputs where the one before it has 5 outputs"),
        (about(lambda a: a["net"]["layers"].insert(0, a["net"]["layers"].pop(1))), "a GRU needs"),
        (layer(2, name="fc9"), "layer fc9 needs a tensor fc9.weight"),
        (layer(2, relu=True), "without ReLU"),
        (about(lambda a: a["net"]["layers"].clear()), "has tensors that no layer needs"),
        (about(lambda a: a["net"].update(layers=[a["net"]["layers"][0]] * 1000)), "has tensors that no layer needs"),
        (header(lambda h: h["fc1.weight"].update(dtype="F64")), "dtype of tensor 'fc1.weight' must be one of F32"),
        (header(lambda h: h["fc1.weight"].update(dtype=["F32"])), "dtype of tensor 'fc1.weight' must be one of F32"),
        (header(lambda h: h["fc1.weight"].update(shape=[10**12, 10**12])), "has 168 bytes, which is not what"),
        (header(lambda h: h["fc1.weight"].update(shape=[7, 6])), "codes of layer fc1 take 16 bytes"),
        (header(lambda h: h["fc1.weight"].update(shape=[42])), "layer fc1 needs a tensor fc1.weight of 2 or 3 dimensions, got [42]"),
        (header(lambda h: h["fc1.weight"].update(shape=[])), "shape of tensor 'fc1.weight' must be a list of 1 or 2 or 3"),
        (header(lambda h: h["fc1.weight"].update(more=1)), "tensor 'fc1.weight' must have the keys"),
        (header(lambda h: h["fc2.weight"].update(data_offsets=h["gru_recurrent.weight"]["data_offsets"], shape=[18, 6])), "begins at byte"),
        (header(lambda h: h.pop("fc3.bias")), "begins at byte"),
        (header(lambda h: h.update(new={"dtype": "U8", "shape": [1], "data_offsets": [0, 1]})), "begins at byte"),
    ]:
        message = refused(folder / "fault.safetensors", file)
        assert message is not None and fault in message, (fault, message)


def test_faults_of_kept_weights_have_names(folder) -> None:
    data = (folder / "one.safetensors").read_bytes()

    def masks(**changes: Any) -> bytes:
        forged = Forged(data)
        forged.about["net"]["layers"][0]["masks"].update(changes)
        return forged.signed()

    def last_code(value: int) -> bytes:  # of fc1: 7 inputs, whose second group has three
        forged = Forged(data)
        begin, _ = forged.header["fc1.codes"]["data_offsets"]
        forged.body[begin] = forged.body[begin] & 0b11000111 | value << 3
        return forged.signed()

    assert Forged(data).about["net"]["layers"][0]["masks"] == {"slots": 1, "pattern": "2:4", "inputs": 7}
    assert Forged(data).header["fc1.weight"]["shape"] == [6, 4]
    for file, fault in [
        (masks(inputs=8), "the policy's spec has 7"),
        (masks(inputs=9), "layer fc1 of 9 inputs under 2:4 keeps 5 weights of a row, got weights [6, 4]"),
        (masks(inputs=10**12), "inputs of layer fc1 must be a whole number in 1..16"),
        (masks(inputs=0), "inputs of layer fc1 must be a whole number in 1..16"),
        (masks(inputs="7"), "inputs of layer fc1 must be a whole number"),
        (masks(inputs=None), "inputs of layer fc1 must be a whole number"),
        (masks(slots=3), "slots of layer fc1 must be a whole number in 1..1"),
        (masks(pattern="1:99"), "layer fc1 has kept weights alone, which 1:99 never has"),
        (masks(pattern="1:4"), "keeps 2 weights of a row, got weights [6, 4]"),
        (last_code(2), "keep 23 weights, and 24 are there"),
    ]:
        message = refused(folder / "fault.safetensors", file)
        assert message is not None and fault in message, (fault, message)


def test_holes_and_overlaps(folder) -> None:
    data = (folder / "small.safetensors").read_bytes()
    path = folder / "holes.safetensors"

    def moved(by: int, at: int, fill: bytes) -> bytes:
        forged = Forged(data)
        for entry in forged.header.values():
            if entry["data_offsets"][0] >= at:
                entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]
        forged.body[at : at + max(0, -by)] = fill
        return forged.signed()

    starts = sorted(entry["data_offsets"][0] for entry in Forged(data).header.values())
    for at in starts:
        assert "begins at byte" in refused(path, moved(8, at, b"hidden!!"))
        if at:
            assert "begins at byte" in refused(path, moved(-4, at, b""))
    assert "cut short or too long" in refused(path, moved(0, len(Forged(data).body), b"hidden!!"))


def test_json_made_to_hurt(folder) -> None:
    data = (folder / "gru.safetensors").read_bytes()
    forged, path = Forged(data), folder / "json.safetensors"
    good = json.dumps(forged.about)
    tensors = json.dumps(forged.header)[1:]
    for deep in ("[" * 120_000, '{"a":' * 20_000, "[" * 60_000 + "]" * 60_000):
        assert "nested too deep" in refused(path, forged.raw(deep))
        assert "JSON" in refused(path, forged.file({"k24": deep}))
        assert refused(path, forged.raw(f'{{"__metadata__":{deep}'))
    for header, fault in [
        (f'{{"__metadata__": {json.dumps({"k24": good})}, "__metadata__": {json.dumps({"k24": good})}, {tensors}', "a key stands twice"),
        (f'{{"__metadata__": {{"k24": {json.dumps(good)}, "k24": {json.dumps(good)}}}, {tensors}', "a key stands twice"),
        (f'{{"__metadata__": {json.dumps({"k24": good[:-1] + ", " + good[1:]})}, {tensors}', "a key stands twice"),
        (f'{{"__metadata__": {json.dumps({"k24": good, "format": "pt"})}, {tensors}', "__metadata__ must have the keys k24"),
        (f'{{"__metadata__": {json.dumps({"k24": 3})}, {tensors}', "without k24's metadata"),
        (f'{{"__metadata__": {json.dumps({"k24": "[]"})}, {tensors}', "the metadata must be a JSON object"),
        (f'{{"__metadata__": {json.dumps({"k24": "{}"})}, {tensors}', "without k24's metadata"),
        (f'{{"__metadata__": null, {tensors}', "without k24's metadata"),
        ("[]", "the header must be a JSON object"),
        ("9" * 5000, "JSON"),
        ('{"a": ' + "9" * 5000 + "}", "JSON"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": 1} {}', "Extra data"),
        ("", "JSON"),
    ]:
        message = refused(path, forged.raw(header))
        assert message is not None and fault in message, (fault, message)
    utf16 = json.dumps({"__metadata__": {"k24": good}, **forged.header}).encode("utf-16")
    assert "JSON" in refused(path, len(utf16).to_bytes(8, "little") + utf16 + bytes(forged.body))


# --- other kinds of files ------------------------------------------------------------------------------------------------------------


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.filterwarnings("ignore:.*protocol.*")
def test_what_executes_elsewhere_is_named_and_not_run(tmp_path) -> None:
    sprung = tmp_path / "sprung"
    path = tmp_path / "policy.safetensors"
    torch.save({"trap": Trap(sprung), "w": torch.ones(300)}, path)
    sprung.unlink(missing_ok=True)
    assert "is a zip archive, perhaps of torch.save (nothing in it was run)" in refused(path)
    torch.save({"trap": Trap(sprung)}, path, _use_new_zipfile_serialization=False)
    assert "is a pickle (nothing in it was run)" in refused(path)
    for protocol in range(6):
        message = refused(path, pickle.dumps([Trap(sprung)] * 30, protocol))
        assert "is a pickle" in message if protocol >= 2 else "of another kind" in message or "a text file" in message
    assert not sprung.exists()


def test_other_kinds_of_files(tmp_path) -> None:
    path = tmp_path / "policy.safetensors"
    for data, kind in [
        (b"", "is empty"),
        (b"hello", "is a text file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "of another kind"),
        (b'{"format": "k24-policy", "version": 1, "note": "this is only the metadata"}', "is a text file"),
        (bytes(7), "of another kind, or cut short"),
        (bytes(64), "cannot be read as JSON"),
        (b"\x80", "of another kind"),
        (b"\xff" * 64, "of another kind"),
        ((2**62).to_bytes(8, "little") + b"{}", "of another kind"),
        (safetensors.torch.save({"w": torch.ones(3)}), "is a safetensors file without k24's metadata: give a policy file"),
        (safetensors.torch.save({"w": torch.ones(3)}, {"format": "pt"}), "is a safetensors file without k24's metadata"),
    ]:
        assert kind in refused(path, data), kind


def test_no_file_to_read(tmp_path, monkeypatch) -> None:
    assert "No such file or directory" in refused(tmp_path / "none.safetensors")
    assert "is a folder" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is a device or a pipe" in refused(tmp_path / "pipe")
    assert "is a device or a pipe" in refused(Path("/dev/zero"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "symbolic links" in refused(tmp_path / "loop")
    assert "Not a directory" in refused(tmp_path / "loop" / "x") or "symbolic links" in refused(tmp_path / "loop" / "x")
    assert "File name too long" in refused(tmp_path / ("x" * 300))
    for odd in ("nul\0.safetensors", "two\nlines.safetensors"):
        with pytest.raises(PolicyFileError, match="cannot be read") as caught:
            load_policy(odd)
        assert str(caught.value).isprintable()

    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(builtins, "open", forbidden)
    (tmp_path / "secret").touch()
    assert "cannot be read (Permission denied)" in refused(tmp_path / "secret")


def test_a_file_that_shrinks_while_it_is_read(folder, monkeypatch) -> None:
    path = folder / "shrinks.safetensors"
    save_policy(path, net := random_net(hidden=64), spec_of(net))
    checked = artifact.check_shapes

    def cut(*args):
        checked(*args)
        os.truncate(path, 30_000)

    monkeypatch.setattr(artifact, "check_shapes", cut)
    assert "was cut short while it was read" in refused(path)


# --- memory ------------------------------------------------------------------------------------------------------------------------

PROGRAM = """
import json, re, resource, sys
import k24
from k24.artifact import read_policy

small, big, *forged = sys.argv[1:]
read_policy(small)  # everything that is loaded on first use

def limit(extra):
    used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.RLIM_INFINITY))

results = []
for path in forged:
    limit(12 << 20)
    try:
        read_policy(path)
    except k24.PolicyFileError as error:
        results.append(str(error))
import os
limit(4 * os.path.getsize(big) + (8 << 20))
net, spec, digest = read_policy(big)
results.append(sum(layer.codes.numel() for layer in net.linears if layer.codes is not None))
limit(os.path.getsize(big) // 2)
try:
    read_policy(big)
except k24.PolicyFileError as error:
    results.append(str(error))
print(json.dumps(results))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads this process's size from /proc")
def test_memory_stays_within_a_few_times_the_file(folder, tmp_path) -> None:
    """In a process that gets no more: absurd files are refused, and a file that is nearly all codes takes four times its size."""
    data = (folder / "gru.safetensors").read_bytes()
    files = []

    def forge(edit: Callable[[Forged], Any]) -> None:
        forged = Forged(data)
        made = edit(forged)
        files.append(tmp_path / f"{len(files)}.safetensors")
        files[-1].write_bytes(made if isinstance(made, bytes) else forged.signed())

    forge(lambda f: f.about["net"].update(slots=10**12))
    forge(lambda f: f.about["policy"].update(n_agents=10**12))
    forge(lambda f: f.about["policy"].update(n_agents=10**12, agent_id=True))
    forge(lambda f: f.about["net"]["layers"][0]["masks"].update(slots=4096))
    forge(lambda f: f.header["fc1.weight"].update(shape=[10**9, 10**9]))
    forge(lambda f: f.header["fc1.weight"].update(shape=[10**9, 10**9], data_offsets=[0, 4 * 10**18]))
    forge(lambda f: f.about["net"]["layers"][0]["masks"].update(pattern="49:99"))
    forge(lambda f: f.file({"k24": "[" * 120_000 + "]" * 120_000}))
    forge(lambda f: f.raw("[" + "[],{}," * 40_000 + "0]"))
    forge(lambda f: (2**40).to_bytes(8, "little") + b"{}")
    forge(lambda f: (200_000).to_bytes(8, "little") + b"{}")
    # Sparse on disk, so a terabyte is at hand.
    files.append(tmp_path / "terabyte.safetensors")
    files[-1].write_bytes(data)
    os.truncate(files[-1], 1 << 40)

    net = random_net(slots=1600, inputs=8, hidden=128, outputs=8, gru=False)
    big = tmp_path / "big.safetensors"
    save_policy(big, net, spec_of(net))
    codes = sum(layer.codes.numel() for layer in net.linears if layer.codes is not None)
    assert codes * 3 / 8 > 0.9 * big.stat().st_size > 2_000_000
    arguments = [sys.executable, "-c", PROGRAM, folder / "small.safetensors", big, *files]
    done = subprocess.run(arguments, cwd=Path(k24.__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *refusals, read, last = json.loads(done.stdout)
    assert len(refusals) == len(files) and read == codes
    assert "for one tensor, and there are not as many: free some" in last
