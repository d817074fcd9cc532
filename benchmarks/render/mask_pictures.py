"""The README's pictures of masks: plot_mask and plot_schedule on a small untrained model. Needs matplotlib."""

import argparse
from pathlib import Path

import torch

from graddrop_kernels import (
    FusedGradDropAdamW,
    GradDropEpoch,
    LayerGradDrop,
    LinearAnneal,
    find_blocks,
    param_groups,
    plot_mask,
    plot_schedule,
)


def small_transformer() -> torch.nn.Module:
    layer = torch.nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    return torch.nn.ModuleDict({
        "embeddings": torch.nn.Embedding(1000, 64),
        "encoder": torch.nn.TransformerEncoder(layer, 6),
        "head": torch.nn.Linear(64, 7),
    })  # fmt: skip


def draw(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    model = small_transformer()
    optimizer = FusedGradDropAdamW(param_groups(model), mask=GradDropEpoch(epochs=4))
    optimizer.set_epoch(1)
    masks, schedule = folder / "masks.png", folder / "schedule.png"
    plot_mask(optimizer, masks)
    names = [name for name, _ in find_blocks(model)]
    plot_schedule(LayerGradDrop(p=LinearAnneal(epochs=10)), 10, schedule, blocks=names, steps_per_epoch=20)
    return [masks, schedule]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[1] / "masks")
    for path in draw(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
