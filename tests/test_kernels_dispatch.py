"""The automatic choice: the fastest is taken, remembered, and nothing else notices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_kernels import assert_equals_reference, operands, recurrent

from k24.errors import UsageError
from k24.kernels import Net, Prepared, dispatch, prepare, reference


class Clock:
    """Time that passes only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Timed(Prepared):
    """The reference, taking a made-up time."""

    def __init__(self, net: Net, clock: Clock, seconds: Callable[[int], float], fails: bool = False) -> None:
        self.net, self.nbytes, self._clock, self._seconds, self._fails, self.calls = net, 7, clock, seconds, fails, 0

    def run(self, x, h, slots):
        self.calls += 1
        if self._fails:
            raise RuntimeError("no memory")
        self._clock.now += self._seconds(x.shape[-2])
        return reference.run(self.net, x, h, slots)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    clock = Clock()
    monkeypatch.setattr(dispatch, "time", clock)
    monkeypatch.setenv("K24_CACHE_DIR", str(tmp_path / "cache"))
    return clock


SECONDS = {"slow": lambda rows: 5e-3, "wide": lambda rows: 1e-3, "narrow": lambda rows: 1e-4 * rows}


def auto(clock: Clock, seconds=SECONDS, net: Net | None = None, fails: tuple[str, ...] = (), threads: int | None = None):
    made: dict[str, Timed] = {}

    def make(net: Net, name: str) -> Timed:
        made[name] = Timed(net, clock, seconds[name], name in fails)
        return made[name]

    return dispatch.Auto(net or recurrent(10, 24, 5), make, tuple(seconds), threads, "test"), made


def test_the_fastest_for_the_rows_at_hand_is_taken(clock: Clock) -> None:
    form, _ = auto(clock)
    assert form.name == "auto"
    for rows, wanted in ((1, "narrow"), (5, "narrow"), (40, "wide"), (2, "narrow"), (33, "wide")):
        x, h, _slots = operands(form.net, rows)
        assert_equals_reference(form, form.net, x, h)
        assert form.name == wanted, f"{rows} rows"
    assert form.nbytes == 14  # of both that are in use


def test_a_choice_is_remembered_for_other_processes(clock: Clock) -> None:
    x, h, _ = operands(recurrent(10, 24, 5), 40)
    first, _ = auto(clock)
    first(x, h)
    again, made = auto(clock)
    again(x, h)
    assert again.name == "wide" and set(made) == {"wide"} and made["wide"].calls == 1
    entries = json.loads(dispatch.cache_path().read_text())
    ((key, entry),) = entries.items()
    assert entry["backend"] == "wide" and entry["us"]["wide"] == pytest.approx(1000)
    assert "64 rows, blocks" in key and "10-24 2:4" in key and "gru(" in key and "slow wide narrow" in key


@pytest.mark.parametrize("other", ["rows", "mixed", "net", "threads", "own threads", "candidates"])
def test_what_a_choice_depends_on_is_measured_anew(clock: Clock, other: str) -> None:
    net = recurrent(10, 24, 5)
    x, h, slots = operands(net, 4)
    auto(clock, net=net)[0](x, h)
    before = torch.get_num_threads()
    kinds = {"seconds": SECONDS, "net": net}
    if other == "rows":
        x, h, slots = operands(net, 5)
    elif other == "mixed":
        x, h, slots = operands(net, 4, mixed=True)
    elif other == "net":
        kinds["net"] = recurrent(10, 25, 5)
        x, h, slots = operands(kinds["net"], 4)
    elif other == "candidates":
        kinds["seconds"] = SECONDS | {"new": lambda rows: 1e-6}
    try:
        if other == "threads":
            torch.set_num_threads(before + 1)
        form, made = auto(clock, threads=3 if other == "own threads" else None, **kinds)
        form(x, h, slots)
    finally:
        torch.set_num_threads(before)
    assert len(made) == len(kinds["seconds"])
    assert len(json.loads(dispatch.cache_path().read_text())) == 2


def test_candidates_that_fail_or_have_no_chance_drop_out(clock: Clock) -> None:
    seconds = {"good": lambda rows: 1e-3, "hopeless": lambda rows: 1.0, "broken": lambda rows: 1e-9}
    form, made = auto(clock, seconds, fails=("broken",))
    form(*operands(form.net, 4))
    assert form.name == "good"
    assert made["hopeless"].calls == 4  # once to see whether it runs, once to warm up, twice to see how long it takes
    none, _ = auto(clock, {"broken": seconds["broken"]}, fails=("broken",))
    with pytest.raises(UsageError, match="none of the backends broken can run 4 rows of this net: name one to see why"):
        none(*operands(none.net, 4))


def test_measuring_ends_in_time(clock: Clock) -> None:
    form, made = auto(clock, {"a": lambda rows: 0.3, "b": lambda rows: 0.2})
    form(*operands(form.net, 4))
    assert form.name == "b" and made["a"].calls + made["b"].calls <= 2 * (4 + 2) + 1  # of 2 * (4 + 7)


def test_no_rows_decide_nothing(clock: Clock) -> None:
    form, made = auto(clock)
    y, h = form(*operands(form.net, 0))
    assert y.shape == (3, 0, 5) and h.shape == (3, 0, 24)
    assert not dispatch.cache_path().exists() and len(made) == 1


def test_random_numbers_do_not_depend_on_what_is_remembered(clock: Clock) -> None:
    net = recurrent(10, 24, 5)
    x, h, _ = operands(net, 4)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        auto(clock, net=net)[0](x, h)
        found.append(torch.rand(3))
    assert torch.equal(*found)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"a": 1}'])
def test_a_damaged_memory_is_done_without_and_mended(clock: Clock, content: bytes) -> None:
    dispatch.cache_path().parent.mkdir(parents=True)
    dispatch.cache_path().write_bytes(content)
    form, _ = auto(clock)
    x, h, _slots = operands(form.net, 40)
    form(x, h)
    assert form.name == "wide"
    again, made = auto(clock)
    again(x, h)
    assert set(made) == {"wide"}


def test_an_entry_that_makes_no_sense_is_measured_anew(clock: Clock) -> None:
    form, _ = auto(clock)
    x, h, _slots = operands(form.net, 40)
    form(x, h)
    entries = json.loads(dispatch.cache_path().read_text())
    for wrong in ({"backend": "gone"}, {"backend": None}, 7, {}):
        dispatch.cache_path().write_text(json.dumps(dict.fromkeys(entries, wrong)))
        again, made = auto(clock)
        again(x, h)
        assert again.name == "wide" and len(made) == 3


def test_nowhere_to_write_is_no_error(clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("K24_CACHE_DIR", str(tmp_path / "file" / "below"))
    form, _ = auto(clock)
    form(*operands(form.net, 40))
    assert form.name == "wide"


def test_a_user_without_a_home_is_no_error(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("K24_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    form, _ = auto(clock)
    form(*operands(form.net, 40))
    assert form.name == "wide"


def test_auto_is_right_for_real() -> None:
    net = recurrent(18, 48, 5)
    form = prepare(net, "auto")
    for rows in (1, 3, 20):
        assert_equals_reference(form, net, *operands(net, rows))
        assert_equals_reference(form, net, *operands(net, rows, mixed=True))
    assert form.name in dispatch.CANDIDATES["cpu"]
