"""K-2:4 inside BenchMARL: their experiment, their MAPPO, a policy of k24's masked layers with one mask per agent.

    pip install -c constraints.txt 'k24[benchmarl]'   # holds torch: BenchMARL asks for torchvision, whose newest asks for a newer torch
    python examples/06_benchmarl.py
    python examples/06_benchmarl.py --iterations 100 --out results/benchmarl

Four pieces, all of them BenchMARL's own ways in:

* ``MaskedMlp`` is a Model: three ``k24.MaskedLinear``, whose slots are the agents of the group. They share the weights, and nobody is told
  which agent it is. It is for policies; the critic stays BenchMARL's, since it is gone after training.
* ``model_config_registry`` gets its name, which is what BenchMARL asks of a new model.
* ``Masks`` is a Callback. It tells the model how far training is, which sets the temperature, and freezes the masks at 60% of the frames.
* The same callback gives masked weights and alphas their own learning rates. BenchMARL builds one Adam of one group per loss; at
  ``on_setup`` nothing has been trained, so they can still move to groups of their own there. Gradients are clipped over all groups
  together, by BenchMARL.

Progress is a buffer of the model, as codes and freeze are of the layers: that is what checkpoints and copies of a policy (target networks,
collectors on another device) take along. What k24's own learners do besides, drawing alphas together, is left out.
A diversity loss would be added to ``loss_objective`` in an Algorithm's ``process_loss_vals``.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import tyro
from torch import Tensor, nn

import k24

try:
    from benchmarl.algorithms import MappoConfig
    from benchmarl.environments import VmasTask
    from benchmarl.experiment import Callback, Experiment, ExperimentConfig
    from benchmarl.models import MlpConfig, model_config_registry
    from benchmarl.models.common import Model, ModelConfig
except ImportError as error:
    sys.exit(f"this example needs BenchMARL ({error}): pip install 'k24[benchmarl]'")

FREEZE_AT = 0.6
LR_SCALES = {"weight": 2.0, "alpha": 60.0}


@dataclass(frozen=True)
class Options:
    """Options of the example."""

    iterations: int = 10
    """Rounds of collecting and learning."""
    envs: int = 30
    """Parallel environments; each plays one episode per round."""
    hidden: int = 64
    """Hidden units of the policy."""
    lr: float = 1e-3
    """Learning rate; that of masked weights is twice, that of alphas 60 times as high."""
    seed: int = 0
    """Seed of everything random."""
    out: Path | None = None
    """Folder for BenchMARL's files; a temporary one when not given."""


class MaskedMlp(Model):
    """Three masked layers with tanh between them; observations of all agents in, logits of all agents out."""

    def __init__(self, hidden: int, pattern: str, **of_benchmarl: Any) -> None:
        super().__init__(**of_benchmarl)
        if not (self.share_params and self.input_has_agent_dim) or self.centralised:
            raise ValueError("MaskedMlp is for policies that share parameters: set share_policy_params, and give critics another model")
        inputs = sum(spec.shape[-1] for spec in self.input_spec.values(True, True))
        sizes = [inputs, hidden, hidden, self.output_leaf_spec.shape[-1]]
        self.layers = nn.ModuleList(k24.MaskedLinear(i, o, n_slots=self.n_agents, pattern=pattern) for i, o in pairwise(sizes)).to(
            self.device
        )
        self.progress: Tensor
        self.register_buffer("progress", torch.zeros((), device=self.device))

    def _forward(self, tensordict: Any) -> Any:
        x = torch.cat([tensordict.get(key) for key in self.in_keys], dim=-1)  # [*batch, agents, features]
        batch = x.shape[:-2]
        x = x.reshape(-1, *x.shape[-2:]).transpose(0, 1)  # [agents, rows, features], as slots are taken
        progress = float(self.progress)
        for k, layer in enumerate(self.layers):
            layer.resample(progress)  # draws nothing with the expected masks that are the default: it sets the temperature
            x = layer(x if k == 0 else torch.tanh(x))
        return tensordict.set(self.out_key, x.transpose(0, 1).reshape(*batch, self.n_agents, -1))


@dataclass
class MaskedMlpConfig(ModelConfig):
    """What BenchMARL's files and command line may set of it."""

    hidden: int = 64
    pattern: str = "2:4"

    @staticmethod
    def associated_class() -> type[Model]:
        """The model."""
        return MaskedMlp


model_config_registry["maskedmlp"] = MaskedMlpConfig


class Masks(Callback):
    """Drives the masks of all MaskedMlp policies of an experiment."""

    def on_setup(self) -> None:
        """Moves masked weights and alphas to groups of their own, before anything is trained."""
        self.returns: list[float] = []
        self.frozen_after: int | None = None
        for losses in self.experiment.optimizers.values():
            optimiser = losses["loss_objective"]
            group = optimiser.param_groups[0]
            for name, scale in LR_SCALES.items():
                apart = [p for p in group["params"] if any(p is getattr(layer, name) for layer in self.layers)]
                if len(apart) != len(self.layers):
                    raise RuntimeError(f"the policy's optimiser holds the {name} of {len(apart)} of {len(self.layers)} masked layers")
                group["params"] = [p for p in group["params"] if not any(p is other for other in apart)]
                optimiser.add_param_group({"params": apart, "lr": group["lr"] * scale})

    @property
    def models(self) -> list[MaskedMlp]:
        """The policies."""
        return [module for module in self.experiment.policy.modules() if isinstance(module, MaskedMlp)]

    @property
    def layers(self) -> list[k24.MaskedLinear]:
        """Their layers."""
        return [layer for model in self.models for layer in model.layers]

    def on_batch_collected(self, batch: Any) -> None:
        """Says how far training is, and freezes once."""
        self.returns.append(float(self.experiment.mean_return))
        frames = self.experiment.config.get_max_n_frames(self.experiment.on_policy)
        progress = self.experiment.total_frames / frames
        for model in self.models:
            model.progress.fill_(progress)
        if progress >= FREEZE_AT and self.frozen_after is None:
            self.frozen_after = self.experiment.total_frames
            for layer in self.layers:
                layer.freeze()


def settings(options: Options, folder: Path) -> ExperimentConfig:
    """BenchMARL's own defaults, made small."""
    config = ExperimentConfig.get_from_yaml()
    config.max_n_iters, config.max_n_frames = options.iterations, None
    config.on_policy_n_envs_per_worker = options.envs
    config.on_policy_collected_frames_per_batch = options.envs * 100
    config.on_policy_minibatch_size, config.on_policy_n_minibatch_iters = 1000, 4
    config.lr = options.lr
    config.evaluation, config.loggers, config.create_json = False, [], False
    config.save_folder = str(folder)
    return config


def main(options: Options, folder: Path) -> None:
    """Trains, and says what came of it."""
    folder.mkdir(parents=True, exist_ok=True)
    driver = Masks()
    experiment = Experiment(
        task=VmasTask.NAVIGATION.get_from_yaml(),
        algorithm_config=MappoConfig.get_from_yaml(),
        model_config=MaskedMlpConfig(hidden=options.hidden),
        critic_model_config=MlpConfig(num_cells=[options.hidden] * 2, layer_class=nn.Linear, activation_class=nn.Tanh),
        seed=options.seed,
        config=settings(options, folder),
        callbacks=[driver],
    )
    (model,) = driver.models
    before = model.layers[1].alpha.detach().clone()
    experiment.run()

    masks = [layer.mask() for layer in model.layers]
    middle, kept = masks[1], torch.cat([mask.flatten() for mask in masks])
    # The 18 observations leave a group of two at the end, which keeps both.
    whole = [mask[..., : mask.shape[-1] // 4 * 4].unflatten(-1, (-1, 4)).sum(-1) for mask in masks]
    exact = all(bool((group == 2).all()) for group in whole)
    apart = (middle[:, None] != middle[None]).float().mean((-2, -1))
    pairs = apart[~torch.eye(model.n_agents, dtype=torch.bool)]
    moved = float((model.layers[1].alpha.detach() - before).abs().mean())
    print(f"task                 VMAS navigation, {model.n_agents} agents, MAPPO of BenchMARL, policy {type(model).__name__}")
    first, last = fmean(driver.returns[:3]), fmean(driver.returns[-3:])
    print(f"return               {first:.3f} in the first three rounds, {last:.3f} in the last three")
    print(f"alpha                moved by {moved:.2f} on average (it begins with a standard deviation of 0.3)")
    print(f"masks                frozen after {driver.frozen_after:,} of {experiment.total_frames:,} frames; exactly 2:4: {exact}")
    print(f"share of weights     {float(kept.mean()):.3f} kept by each agent")
    print(f"distance of masks    {float(pairs.mean()):.3f} between agents (0 same, 0.5 independent)")
    print(f"files                {experiment.folder_name}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = tyro.cli(Options, description=__doc__)
    main(chosen, chosen.out or Path(tempfile.mkdtemp(prefix="k24-benchmarl-")))
