"""Speed, always beside its baselines in the same process and never on a wrong result.

``train`` times gradient steps and whole training loops, ``inference`` runs of a net, ``env`` steps of environments; ``timing`` is how, and
``rivals`` what inference is compared with; ``learning`` and ``critics`` are parts of ``train``.
"""

from k24.bench.env import BenchEnv, bench_env
from k24.bench.inference import BenchInference, Case, measure, plan, summary
from k24.bench.learning import BenchTrain, stepwise_forward
from k24.bench.timing import header, machine
from k24.bench.train import bench_train, train_options

__all__ = [
    "BenchEnv",
    "BenchInference",
    "BenchTrain",
    "Case",
    "bench_env",
    "bench_train",
    "header",
    "machine",
    "measure",
    "plan",
    "stepwise_forward",
    "summary",
    "train_options",
]
