"""The masked layer alone, in a plain PyTorch loop: one network, four slots, and every slot learns a function of its own.

    python examples/01_layer.py
    python examples/01_layer.py --slots 8 --hidden 128 --out results/layer

All slots see the same inputs and share every weight and bias; only their 2:4 masks differ. One network without masks could learn no
more than the mean of the four functions. Five things make the masks learn, and each is one line in ``train``:

* ``resample(progress)`` once per gradient step, which sets the temperature (and draws the masks, if they are drawn ones);
* a learning rate of alpha's own, some 60 times that of the weights (k24's learners: 30 times, and twice a dense net's for the weights);
* ``k24.pattern_orthogonality``, which keeps the slots' masks apart;
* ``freeze()`` at 60% of the steps, where the temperature is at its end: from there every mask is exactly 2:4;
* the steps that remain, in which the weights get used to the masks as they will be deployed.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn

import k24

INPUTS, OUTPUTS, ROWS = 16, 4, 128
FREEZE_AT = 0.6


@dataclass(frozen=True)
class Options:
    """Options of the example."""

    slots: int = 4
    """Slots, each with a function of its own."""
    hidden: int = 64
    """Hidden units; here a multiple of 4, so that no group is cut short."""
    steps: int = 1500
    """Gradient steps."""
    lr: float = 3e-3
    """Learning rate of the weights, some twice that of a dense net's; alpha's is 60 times higher."""
    diversity: float = 0.01
    """Factor on the diversity loss."""
    seed: int = 0
    """Seed of everything random."""
    out: Path | None = None
    """Folder for the weights and masks; a temporary one when not given."""


class Net(nn.Module):
    """Two masked layers; inputs and outputs are ``[slots, rows, features]``."""

    def __init__(self, slots: int, hidden: int) -> None:
        super().__init__()
        self.first = k24.MaskedLinear(INPUTS, hidden, n_slots=slots)
        self.second = k24.MaskedLinear(hidden, OUTPUTS, n_slots=slots)
        self.layers = [self.first, self.second]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


def batch(functions: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The same inputs for every slot, and what each slot should answer."""
    x = torch.randn(1, rows, INPUTS).expand(len(functions), -1, -1)
    return x, torch.tanh(x @ functions)


@torch.no_grad()
def error(net: Net, functions: Tensor) -> float:
    """Squared error over the variance of the answers, with the masks that would be deployed: 1 for a net that knows nothing."""
    x, y = batch(functions, 4096)
    net.eval()  # the most likely masks, instead of those of a training step
    found = float(F.mse_loss(net(x), y) / y.var())
    net.train()
    return found


def train(net: Net, functions: Tensor, options: Options) -> None:
    """The loop."""
    alphas = [layer.alpha for layer in net.layers]
    shared = [p for p in net.parameters() if not any(p is alpha for alpha in alphas)]
    optimiser = torch.optim.Adam([{"params": shared}, {"params": alphas, "lr": 60 * options.lr}], lr=options.lr)
    for step in range(options.steps):
        progress = step / options.steps
        if progress >= FREEZE_AT and not net.first.frozen:
            for layer in net.layers:
                layer.freeze()
        for layer in net.layers:
            layer.resample(progress)
        x, y = batch(functions, ROWS)
        loss = F.mse_loss(net(x), y)
        if not net.first.frozen:
            loss = loss + options.diversity * k24.pattern_orthogonality([layer.probabilities() for layer in net.layers])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def main(options: Options, folder: Path) -> None:
    """Trains, and says what came of it."""
    torch.manual_seed(options.seed)
    functions = torch.randn(options.slots, INPUTS, OUTPUTS) / INPUTS**0.5
    net = Net(options.slots, options.hidden)
    before = error(net, functions)
    train(net, functions, options)
    after = error(net, functions)

    _, y = batch(functions, 4096)
    one_for_all = float((y - y.mean(0)).square().mean() / y.var())
    masks = [layer.mask() for layer in net.layers]
    kept = torch.cat([mask.unflatten(-1, (-1, 4)).sum(-1).flatten() for mask in masks])
    first, second = masks[0][0], masks[0][1]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), folder / "layers.safetensors")

    print(f"error before            {before:.3f} of the variance")
    print(f"error after             {after:.3f}, with {options.slots} slots that share every weight")
    print(f"best without masks      {one_for_all:.3f}, the error of the mean of the {options.slots} functions")
    print(f"kept of every four      {int(kept.min())} to {int(kept.max())} weights, in {len(kept):,} groups")
    print(f"masks of slots 0 and 1  differ in {float((first != second).float().mean()):.2f} of the first layer's weights")
    print("masks of one group      " + "  ".join("".join(str(int(m)) for m in mask[0, :4]) for mask in masks[0]))
    print(f"weights and masks       {folder / 'layers.safetensors'}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = tyro.cli(Options, description=__doc__)
    main(chosen, chosen.out or Path(tempfile.mkdtemp(prefix="k24-layer-")))
