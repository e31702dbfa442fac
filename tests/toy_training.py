"""A small training run that other processes can import, be killed in, and continue."""

import sys
from pathlib import Path

import torch

from medmatting.train import Recipe, make_fabric, train

RECIPE = Recipe(steps=60, batch=4, rate=1e-2, warmup=5, seed=1)


class Toy(torch.nn.Module):
    "Regression with dropout: its result depends on every random number."

    def __init__(self, dropout: float = 0.2):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(32, 1))

    def forward(self, batch):
        loss = (self.body(batch["x"]) - batch["y"]).square().mean()
        return {"loss": loss, "squared": loss.detach()}


def samples(count: int = 13) -> list[dict]:
    "Points of a random linear map."
    points = torch.randn(count, 6, generator=torch.Generator().manual_seed(5))
    return [dict(name=f"point {i}", x=x, y=x.sum(0, keepdim=True)) for i, x in enumerate(points)]


def jitter(sample: dict, generator: torch.Generator) -> dict:
    "Augmentation: noise on x."
    return {**sample, "x": sample["x"] + 0.1 * torch.randn(6, generator=generator)}


def run(folder, model=None, recipe: Recipe = RECIPE, fabric=None, **options) -> Toy:
    "Train in a folder and give the network back."
    model = model or Toy()
    train(model, samples(), recipe, folder, jitter, fabric, **{"save_every": 5, "progress": False, **options})
    return model


def shared(fabric, folder, result):
    "The same in each of several processes; the first one writes the weights down."
    model = run(folder, Toy(dropout=0.0), fabric=fabric)
    if fabric.is_global_zero:
        torch.save(model.state_dict(), result)


if __name__ == "__main__":  # python toy_training.py FOLDER PRECISION: says each step, so that it can be killed at any of them
    class Talking(Toy):
        def forward(self, batch):
            print("step", flush=True)
            return super().forward(batch)

    run(Path(sys.argv[1]), Talking(), fabric=make_fabric("cpu", precision=sys.argv[2]))
