"""From a trained run to one file that acts, where nothing of the training stack is needed.

    python examples/04_act.py
    python examples/04_act.py --run results/toy/memory/qmix-k24/seed0 --out results/act

Training and export are commands, run in processes of their own: ``k24 train`` and ``k24 export``. What then acts, in this process, is
``k24.load_policy`` with torch, numpy and safetensors alone, as the last line says. Put the file and the loop of ``play`` into your game or
robot. Where ``pip install 'k24[onnx]'`` was done the policy is exported as an ONNX graph too, and ONNX Runtime must say the same.

The game, toy/memory: each of two agents is shown a cue at the first step, and must name it at the last. So the state that ``act`` returns
has to be handed back at the next step.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import tyro

import k24
from k24.envs import make_env


@dataclass(frozen=True)
class Options:
    """Options of the example."""

    run: Path | None = None
    """Run folder of toy/memory; one is trained when not given."""
    steps: int = 6400
    """Environment steps of that training."""
    out: Path | None = None
    """Folder for everything written; a temporary one when not given."""


def command(*words: object) -> None:
    """Runs ``k24 …``, and ends with its message where it fails."""
    done = subprocess.run([sys.executable, "-m", "k24", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr.strip())


def play(policy: k24.Policy, episodes: int) -> float:
    """Plays, and returns the share of right answers: this loop is all that a program needs."""
    env = make_env(policy.spec.task, episodes)
    observation, state, total = env.reset(seed=1), None, 0.0
    for _ in range(env.spec.episode_limit):
        actions, state = policy.act(observation.obs, state)  # [agents, envs, features] -> [agents, envs]; greedy
        step = env.step(actions)
        total, observation = total + float(step.reward.sum(0).mean()), step.current
    return total


def largest_difference(policy: k24.Policy, graph: Path) -> float:
    """Between the action values of ONNX Runtime and the policy's own, over a few steps of random observations."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    spec, random, worst, state = policy.spec, np.random.default_rng(0), 0.0, None
    theirs = np.zeros((spec.n_agents, 8, policy.net.hidden), np.float32)
    for _ in range(4):
        obs = random.standard_normal((spec.n_agents, 8, spec.obs_dim), dtype=np.float32)
        values, state = policy.q_values(obs, state)  # an array in, an array out
        expected, theirs = session.run(["values", "next_state"], {"obs": obs, "state": theirs})
        worst = max(worst, float(np.abs(values - expected).max()))
    return worst


def main(options: Options, folder: Path) -> None:
    """Trains and exports by command, acts here."""
    run, file, graph = options.run or folder / "run", folder / "policy.safetensors", folder / "policy.onnx"
    folder.mkdir(parents=True, exist_ok=True)
    if options.run is None:
        small = "--envs 16 --hidden 16 --lr 5e-3 --batch-size 32 --buffer-size 256 --env-steps-per-update 16 --target-update 20"
        command("train", "toy/memory", "--steps", options.steps, "--epsilon-anneal", 2000, *small.split(), "--out", run)
    with_onnx = find_spec("onnx") is not None and find_spec("onnxruntime") is not None
    command("export", run, "--out", file, *(["--onnx", graph] if with_onnx else []))

    policy = k24.load_policy(file)
    print(f"policy               {policy}")
    print(f"file                 {file}: {file.stat().st_size:,} bytes")
    print(f"right answers        {play(policy, 256):.3f} of all, 0.500 by luck")
    if with_onnx:
        print(f"ONNX Runtime         differs by {largest_difference(policy, graph):.1e} at the most")
    else:
        print("ONNX Runtime         not here: pip install 'k24[onnx]'")
    training = [name for name in ("k24.learners", "k24.sharing", "k24.nets", "k24.train", "tensorboard") if name in sys.modules]
    print(f"training stack       {'imported: ' + ', '.join(training) if training else 'not imported: no k24.learners, no k24.sharing'}")


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    main(chosen, chosen.out or Path(tempfile.mkdtemp(prefix="k24-act-")))
