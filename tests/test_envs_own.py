"""Environments of the user's own, by import path: from the guide's example to what breaks on the way."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from test_cli import refused

from k24.cli import main
from k24.envs import make_env
from k24.errors import RunError, UsageError

GUIDE = Path(__file__).parents[1] / "docs" / "environments.md"
SHORT = ["--envs", "8", "--hidden", "8", "--batch-size", "8", "--buffer-size", "64", "--eval-episodes", "8"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder to write modules into, which is the current one; each is imported anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def guides_example(file: str = "my_env") -> str:
    """The block of the guide that begins with the name of a file."""
    found = re.search(rf"```python\n(# {file}\.py:.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def write(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")


def last_json(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


# --- the guide's example ----------------------------------------------------------------------------------------------------------


def test_the_guides_example_is_twenty_lines_and_trains(folder, capfd):
    write(folder, "my_env", guides_example())
    code = [line for line in guides_example().splitlines() if line.strip() and not line.startswith(("#", "import", "from"))]
    assert len(code) <= 20
    assert main(["check-env", "my_env:make"]) == 0
    assert last_json(capfd.readouterr().out)["ok"] is True
    arguments = ["train", "my_env:make", "--steps", "200", "--workers", "0", "--quiet", "--out", "run", *SHORT]
    assert main(arguments) == 0
    assert main(["eval", "run", "--episodes", "8"]) == 0
    assert -1e-9 <= last_json(capfd.readouterr().out)["return_mean"] <= 5


def test_an_installed_command_finds_a_module_in_the_current_folder(folder):
    write(folder, "my_env", guides_example())
    command = "import sys; sys.path = [p for p in sys.path if p]; from k24.cli import main; sys.exit(main(['check-env', 'my_env:make']))"
    done = subprocess.run([sys.executable, "-P", "-c", command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and last_json(done.stdout)["ok"] is True, done.stderr


def test_the_guides_opponents_and_slot_rule(folder, capfd):
    """A prey against random chasers, then chasers against that prey, in two roles; the run and its file play alike."""
    pytest.importorskip("vmas")
    write(folder, "my_slots", guides_example("my_slots"))
    short = ["--steps", "400", "--quiet", *SHORT]
    assert main(["train", "mpe/simple_tag", "--env-args", "side=good", "opponents=random", "--out", "prey", *short]) == 0
    assert main(["export", "prey", "--out", "prey.safetensors"]) == 0
    sides = ["--env-args", "side=adversary", "opponents=prey.safetensors"]
    assert main(["train", "mpe/simple_tag", *sides, "--out", "chasers", *short]) == 0
    assert main(["train", "mpe/simple_tag", "--slots", "my_slots:by_role", "--out", "roles", *short]) == 0
    capfd.readouterr()
    assert main(["export", "chasers", "--out", "chasers.safetensors"]) == 0
    returns = []
    for what in ("chasers", "chasers.safetensors"):
        assert main(["eval", what, "--episodes", "16"]) == 0
        returns.append(last_json(capfd.readouterr().out)["return_mean"])
    assert returns[0] == pytest.approx(returns[1])


SLOW = """
import time
from my_env import Signals

class Slow(Signals):
    def step(self, actions):
        time.sleep(0.001)
        return super().step(actions)

def make():
    return Slow()
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds processes in /proc")
def test_a_run_whose_worker_is_killed_is_the_run_that_it_would_have_been(folder):
    write(folder, "my_env", guides_example())
    write(folder, "slow_env", SLOW)
    arguments = [sys.executable, "-m", "k24", "train", "slow_env:make", "--steps", "3000", "--log-every", "200", "--quiet", *SHORT]

    def start(out: str, workers: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*arguments, "--workers", workers, "--out", out], cwd=folder, text=True, stderr=subprocess.PIPE, stdout=-3)

    disturbed, calm = start("disturbed", "2"), start("calm", "0")
    deadline = time.monotonic() + 60
    metrics = folder / "disturbed" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert disturbed.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    children = [int(pid) for pid in Path(f"/proc/{disturbed.pid}/task/{disturbed.pid}/children").read_text().split()]
    workers = [pid for pid in children if b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    errors = [process.communicate(timeout=120)[1] for process in (disturbed, calm)]
    assert disturbed.returncode == calm.returncode == 0, errors
    assert "SIGKILL" in errors[0] and errors[0].count("\n") == 1 and errors[1] == ""
    texts = [(folder / name / "metrics.jsonl").read_text() for name in ("disturbed", "calm")]
    one, other = ([json.loads(line) for line in text.splitlines()] for text in texts)
    assert one[-1].pop("env_restarts") == 1
    for line in one:
        line.pop("env_restarts", None)
    assert one == other
    assert (folder / "disturbed" / "eval.json").read_bytes() == (folder / "calm" / "eval.json").read_bytes()


# --- the other kinds ----------------------------------------------------------------------------------------------------------------


def test_a_pettingzoo_environment_and_a_batch_of_ones_own(folder):
    pytest.importorskip("mpe2")
    write(
        folder,
        "others",
        """
        from k24.envs.toy import MemoryGame

        def zoo(N=3):
            from mpe2 import simple_spread_v3
            return simple_spread_v3.parallel_env(N=N, max_cycles=7)

        def batch(n_envs, device, n_agents=2):
            return MemoryGame(n_envs, device, n_agents=n_agents)
        """,
    )
    env = make_env("others:zoo", 2, workers=0, N=2)
    assert (env.spec.n_agents, env.spec.episode_limit, env.n_envs) == (2, 7, 2)
    env.close()
    assert make_env("others:batch", 3, n_agents=4).spec.n_agents == 4
    assert main(["check-env", "others:batch", "--env-args", "n_agents=3"]) == 0


# --- what breaks --------------------------------------------------------------------------------------------------------------------

BROKEN = """
import numpy as np
from k24.envs import EnvSpec, Outcome, SingleEnv, TeamEnv, View
from k24.envs.toy import MemoryGame

class Env(SingleEnv):
    spec = EnvSpec(n_agents=2, obs_dim=2, state_dim=4, n_actions=2, episode_limit=5)
    def __init__(self, kind):
        self.kind = kind
    def reset(self, seed):
        self.clock = 0
        return View(np.random.default_rng(seed).random((2, 2), dtype=np.float32))
    def step(self, actions):
        self.clock += 1
        obs = np.zeros((2, 2), dtype=np.float32)
        reward = [0.0, 1.0]
        if self.clock == 2:
            if self.kind == "nan":
                obs[1, 0] = np.nan
            if self.kind == "shape":
                obs = np.zeros((2, 3), dtype=np.float32)
            if self.kind == "reward":
                reward = [1.0]
            if self.kind == "raise":
                raise KeyError("left")
        return Outcome(View(obs), reward, False)

def make(kind="nan"):
    return Env(kind)

def nothing():
    return 3

def wrong_batch(n_envs, device):
    return Env("nan")

def fails():
    raise ValueError("no level 7")

class Batch(MemoryGame):
    def step(self, actions):
        raise ZeroDivisionError("no friction")

def batch(n_envs, device):
    return Batch(n_envs, device)

def no_batch(n_envs, device):
    raise IndexError("no map")
"""


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nan", "NaN or infinite|not finite|finite"),
        ("shape", "expected 2.*got 3|got .*3"),
        ("reward", "reward"),
        ("raise", r"KeyError: 'left'.*broken\.py:\d+"),
    ],
)
def test_a_broken_environment_stops_the_run_with_the_reason(folder, capfd, kind, said):
    write(folder, "broken", BROKEN)
    message = refused(
        capfd, "train", "broken:make", "--env-args", f"kind={kind}", "--steps", "200", "--workers", "0", "--out", "run", *SHORT, status=1
    )
    assert "broken:make" in message and re.search(said, message), message


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("broken:mke", "broken: unknown function 'mke': did you mean 'make'?"),
        ("brokn:make", "the module 'brokn' does not import"),
        ("broken:nothing", "must return a k24.envs.SingleEnv or a PettingZoo parallel environment, got int"),
        ("broken:wrong_batch", "takes n_envs, so it must return a k24.envs.TeamEnv, got Env"),
        ("syntax:make", r"the module 'syntax' does not import \(SyntaxError"),
    ],
)
def test_what_is_no_environment_is_said_before_anything_starts(folder, task, said):
    write(folder, "broken", BROKEN)
    write(folder, "syntax", "def make(:\n")
    with pytest.raises(UsageError, match=said):
        make_env(task, 2, workers=0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("batch", r"broken:batch: step raised ZeroDivisionError: no friction.*broken\.py:\d+"),
        ("no_batch", r"broken:no_batch raised IndexError: no map"),
    ],
)
def test_a_batch_of_ones_own_that_raises_is_one_line(folder, capfd, name, said):
    write(folder, "broken", BROKEN)
    message = refused(capfd, "train", f"broken:{name}", "--steps", "200", "--out", "run", *SHORT, status=1)
    assert re.search(said, message), message


def test_a_function_that_fails_is_quoted_with_its_place(folder):
    write(folder, "broken", BROKEN)
    with pytest.raises((UsageError, RunError), match=r"no level 7"):
        make_env("broken:fails", 2, workers=0)


# --- what a batch of one's own says --------------------------------------------------------------------------------------------------

FAULTY = """
import sys
from dataclasses import replace
import torch
from k24.envs.toy import MemoryGame

class Mine(MemoryGame):
    def __init__(self, n_envs, device, fault):
        super().__init__(n_envs + (fault == "n_envs"), device)
        self.fault, self.clock = fault, 0
        if fault == "sides":
            self.sides = ("one",)
        if fault == "no spec":
            del self.spec
        if fault == "device":
            self.device = "cpu"

    def reset(self, seed):
        first = super().reset(seed)
        return {"reset": None, "numpy": replace(first, obs=first.obs.numpy())}.get(self.fault, first)

    def step(self, actions):
        step, self.clock = super().step(actions), self.clock + 1
        self.restarts = self.clock
        if self.clock < 2:
            return step
        seen = step.after
        if self.fault == "exit":
            sys.exit(0)
        if self.fault == "tuple":
            return tuple(vars(step).values())
        if self.fault == "reward":
            return replace(step, reward=step.reward * float("nan"))
        if self.fault == "won":
            return replace(step, won=torch.zeros_like(step.terminated))
        changed = {
            "double": {"obs": seen.obs.double()},
            "one": {"obs": seen.obs[:, :1]},
            "nan": {"obs": seen.obs * float("nan")},
            "stuck": {"avail": torch.zeros(2, self.n_envs, 2, dtype=torch.bool)},
            "avail": {"avail": torch.ones(2, self.n_envs, 2, dtype=torch.bool)},
        }
        return replace(step, after=replace(seen, **changed[self.fault])) if self.fault in changed else step

    def close(self):
        raise OSError("already gone")

def make(n_envs, device, fault=""):
    if fault == "exit in make":
        sys.exit()
    return Mine(n_envs, device, fault)
"""


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("n_envs", "Mine.n_envs: expected the 4 that were asked for, got 5"),
        ("sides", r"Mine.sides: expected one for each of 2 agents, got \('one',\)"),
        ("no spec", "Mine.spec: expected an EnvSpec, got NoneType"),
        ("device", "Mine.device: expected a torch.device, got 'cpu'"),
        ("reset", "Mine.reset: expected the result to be an Observation, got NoneType"),
        ("numpy", r"Mine.reset: expected the result.obs to be float32 \[2, 4, 3\] on cpu, got ndarray"),
        ("tuple", "Mine.step: expected a Step, got tuple"),
        ("double", r"Mine.step: expected after.obs to be float32 \[2, 4, 3\] on cpu, got float64 \[2, 4, 3\] on cpu"),
        ("one", r"Mine.step: expected after.obs to be float32 \[2, 4, 3\] on cpu, got float32 \[2, 1, 3\] on cpu"),
        ("nan", "Mine.step: expected after.obs to be finite, got nan"),
        ("reward", "Mine.step: expected reward to be finite, got nan"),
        ("stuck", "Mine.step: expected after.avail with at least one action for each agent, got none for agent 0 in environment 0"),
        ("avail", "Mine.step: expected avail given always or never, got both"),
        ("won", "Mine.step: expected won given always or never, got both"),
        ("exit", r"step raised SystemExit: 0 \(.*faulty\.py:\d+\)"),
    ],
)
def test_a_batch_of_ones_own_is_looked_at_as_it_goes(folder, fault, said):
    write(folder, "faulty", FAULTY)
    with pytest.raises(RunError, match=f"^faulty:make: {said}$"):
        env = make_env("faulty:make", 4, fault=fault)
        env.reset(0)
        for _ in range(2):
            env.step(torch.zeros(2, 4, dtype=torch.int64))


def test_check_env_calls_a_batch_of_ones_own_by_its_class(folder, capfd):
    write(folder, "faulty", FAULTY)
    message = refused(capfd, "check-env", "faulty:make", "--env-args", "fault=nan", status=1)
    assert "faulty:make: Mine.step: expected after.obs to be finite, got nan" in message


def test_a_good_batch_of_ones_own_may_restart_and_fail_at_its_end(folder, caplog):
    write(folder, "faulty", FAULTY)
    env = make_env("faulty:make", 4)
    env.reset(0)
    for _ in range(3):
        env.step(torch.zeros(2, 4, dtype=torch.int64))
    assert env.restarts == 3
    env.close()
    assert "faulty:make: close: OSError: already gone (" in caplog.text


# --- what a user's function does ---------------------------------------------------------------------------------------------------

WILD = """
import sys

def exits():
    sys.exit(0)

def lacks():
    import no_such_simulator

def batch(n_envs, device, size=3):
    pass

def single(size=3):
    pass
"""


@pytest.mark.parametrize(
    ("task", "options", "kind", "said"),
    [
        ("leaves:make", {}, UsageError, r"leaves:make: the module 'leaves' does not import \(SystemExit: 0 \(.*leaves\.py:2\)\)"),
        ("wild:exits", {}, RunError, r"wild:exits can't be made: SystemExit: 0 \(.*wild\.py:5\)"),
        ("faulty:make", {"fault": "exit in make"}, RunError, r"faulty:make raised SystemExit \(.*faulty\.py:\d+\)"),
        ("wild:lacks", {}, UsageError, "wild:lacks can't be made: ModuleNotFoundError: No module named 'no_such_simulator' .*"),
        ("wild:batch", {"sise": 1}, UsageError, "unknown option of wild:batch 'sise': did you mean 'size'?"),
        ("wild:single", {"sise": 1}, UsageError, "unknown option of wild:single 'sise': did you mean 'size'?"),
        ("wild:exits", {"size": 1}, UsageError, "unknown option of wild:exits 'size': there are none"),
        ("builtins:int", {}, UsageError, "expected a function whose parameters can be looked up, got <class 'int'>: write one in Python"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_function_that_can_not_be_used_is_one_line(folder, task, options, kind, said, workers):
    write(folder, "wild", WILD)
    write(folder, "faulty", FAULTY)
    write(folder, "leaves", "import sys\nsys.exit(0)\n")
    with pytest.raises(kind, match=f"^{said.replace('?', '[?]')}$"):
        make_env(task, 2, workers=workers, **options)


def test_the_current_folder_hides_no_installed_module(folder, monkeypatch):
    write(folder, "wave", "raise ImportError")
    write(folder, "my_env", guides_example())
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(folder))])
    make_env("my_env:make", 2, workers=0).close()
    assert sys.path[-1] == "" and sys.path.count("") == 1
    found = importlib.util.find_spec("wave")
    assert found is not None and not found.origin.startswith(str(folder))
