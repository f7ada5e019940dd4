"""Published settings, as changes to the defaults: ``k24 train --preset NAME``."""

from __future__ import annotations

from typing import Any

from k24.config import TrainConfig, from_dict
from k24.errors import unknown_name

# What MATD3 in multi-agent MuJoCo has in common (Kaleidoscope, arXiv 2410.08540, appendix). One update per round of 20 environments.
_MATD3_MAMUJOCO: dict[str, Any] = {
    "algo": "matd3",
    "steps": 10_000_000,
    "hidden": 256,
    "envs": 20,
    "checkpoint_every": 500_000,  # with the replay in it, one holds up to a gigabyte
    "learner": {
        "n_step": 10,
        "batch_size": 1000,
        "buffer_size": 1_000_000,
        "env_steps_per_update": 20,
        "policy_delay": 2,
        "target_tau": 0.005,
        "exploration_noise": 0.1,
        "target_noise": 0.2,
        "target_noise_clip": 0.5,
    },
}

# Published settings, as changes to the defaults: of a learner, and where a preset is named after a baseline, of its sharing scheme too.
# See docs/user-guide.md for what they set.
PRESETS: dict[str, dict[str, Any]] = {
    "epymarl": {
        "hidden": 128,
        "envs": 1,
        "agent_id": "yes",
        "learner": {
            "lr": 5e-4,
            "lr_decay_start": 1.0,
            "env_steps_per_update": 25,
            "batch_size": 32,
            "buffer_size": 5000,
            "target_update": 200,
            "epsilon_anneal": 50_000,
        },
    },
    "kaleidoscope_mpe": {
        "steps": 3_050_000,
        "hidden": 64,
        "envs": 1,
        "sharing": "kaleidoscope",
        "learner": {"lr": 5e-4, "lr_decay_start": 1.0, "env_steps_per_update": 25, "target_update": 200, "epsilon_anneal": 50_000},
        "kaleidoscope": {"div_coef": 0.5, "reset_interval": 200_000, "reset_ratio": 0.1},
    },
    "smacv2": {
        "steps": 10_050_000,
        "hidden": 64,
        "envs": 8,
        "slots": "unit_type",
        "learner": {
            "lr": 1e-3,
            "lr_decay_start": 1.0,
            "batch_size": 128,
            "td_lambda": 0.6,
            "env_steps_per_update": 400,
            "target_update": 200,
            "epsilon_anneal": 100_000,
            "standardise_rewards": False,
        },
    },
    "kaleidoscope_smacv2": {
        "steps": 10_050_000,
        "hidden": 64,
        "envs": 8,
        "slots": "unit_type",
        "sharing": "kaleidoscope",
        "learner": {
            "lr": 1e-3,
            "lr_decay_start": 1.0,
            "batch_size": 128,
            "td_lambda": 0.6,
            "target_update": 200,
            "epsilon_anneal": 100_000,
            "standardise_rewards": False,
        },
        "kaleidoscope": {"div_coef": 5.0, "reset_interval": 1_000_000, "reset_ratio": 0.2},
    },
    # Yu et al. 2022 (arXiv 2103.01955), appendix.
    "mappo_mpe": {
        "algo": "mappo",
        "steps": 20_000_000,
        "hidden": 64,
        "envs": 128,
        "learner": {"lr": 7e-4, "critic_lr": 7e-4, "lr_decay_start": 1.0, "gamma": 0.99, "epochs": 10, "minibatches": 1},
    },
    "mappo_smac": {
        "algo": "mappo",
        "steps": 10_000_000,
        "hidden": 64,
        "envs": 8,
        "slots": "unit_type",
        "learner": {"lr": 5e-4, "critic_lr": 5e-4, "lr_decay_start": 1.0, "gamma": 0.99, "epochs": 5, "minibatches": 1, "clip": 0.2},
    },
    "matd3_mamujoco": _MATD3_MAMUJOCO,
    "kaleidoscope_mamujoco": {
        **_MATD3_MAMUJOCO,
        "sharing": "kaleidoscope",
        "learner": {**_MATD3_MAMUJOCO["learner"], "critics": 5, "critic_reset_interval": 800_000},
        "kaleidoscope": {"div_coef": 0.1, "reset_interval": 1_000_000, "reset_ratio": 0.5},
    },
}


def preset(name: str) -> TrainConfig:
    """The configuration of a preset.

    Raises:
        UsageError: There is no such preset.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return from_dict(TrainConfig, PRESETS[name], name)
