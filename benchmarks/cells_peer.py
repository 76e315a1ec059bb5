"""One cell as its own process, the way that fine-tuning scripts work: a torch DataLoader that decodes the files with PIL in every epoch.

    .venv/bin/python benchmarks/cells_peer.py CELL.json RAW ROW.json        # started by benchmarks/cells.py, once a cell

Network, loss, rates and epochs are the cell's; nothing else of ours is used: images are files listed in labels.csv, views are
torchvision's, and a frozen encoder is run again in every epoch. RAW: the folder of nih_cxr14_256 or of montgomery.
"""

import time

BEGAN = time.perf_counter()

import json  # noqa: E402  the imports are part of what is timed
import math  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torchvision import tv_tensors  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from analysis.metrics import auroc, auroc_within, dice_per_image, mean_defined  # noqa: E402
from base.config import parse  # noqa: E402
from engine.schedules import factor  # noqa: E402
from finetune.cell import CellConfig  # noqa: E402
from finetune.losses import loss_of  # noqa: E402
from finetune.run import plant  # noqa: E402

IMPORT_S = time.perf_counter() - BEGAN
EVAL_BATCH = 64
Item = tuple[torch.Tensor, torch.Tensor]


class Files(Dataset[Item]):
    """Images u8 1HW and targets: labels f32 L, or a mask f32 HW. `decode_s` adds up what reading and views took."""

    def __init__(self, raw: Path, config: CellConfig, split: str) -> None:
        table = pd.read_csv(raw / "labels.csv")
        table = table[table["split"] == split].reset_index(drop=True)
        if config.fraction < 1:
            raise SystemExit("this peer reads whole training sets")
        self.raw, self.table, self.task, self.decode_s = raw, table, config.task, 0.0
        views, side = config.task.recipe.views, config.resolution
        steps: list[Any] = [v2.Resize((side, side), antialias=True)]
        if split == "train":
            steps = [v2.RandomResizedCrop(side, views.crop_scale, views.crop_ratio, antialias=True)]
            steps += [v2.RandomHorizontalFlip()] if views.flip else []
            steps += [v2.ColorJitter(views.brightness, views.contrast)]
        self.views = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> Item:
        started = time.perf_counter()
        row = self.table.iloc[i]
        image = tv_tensors.Image(Image.open(self.raw / row["image"]).convert("L"))
        if self.task.kind == "segmentation":
            inside = tv_tensors.Mask(np.asarray(Image.open(self.raw / row["mask"]).convert("L")) > 0)
            image, mask = self.views(image, inside)
            target = mask.float()
        else:
            image, target = self.views(image), torch.tensor(row[self.task.labels].to_numpy(np.float32))
        self.decode_s += time.perf_counter() - started
        return image, target


@torch.inference_mode()
def outputs(module: Any, files: Files) -> tuple[np.ndarray, np.ndarray]:
    """Logits and targets of a split, in its order."""
    module.eval()
    parts = [(module(image), target) for image, target in DataLoader(files, EVAL_BATCH)]
    return torch.cat([part[0] for part in parts]).numpy(), torch.cat([part[1] for part in parts]).numpy()


def score(config: CellConfig, files: Files, logits: np.ndarray, target: np.ndarray) -> float:
    """The task's metric, or loss that is not there: Dice, or AUROC (within the source on NIH's subset)."""
    if config.task.kind == "segmentation":
        return float(dice_per_image(logits > 0, target > 0.5).mean())
    if "source" in files.table:
        strata = list(files.table["source"])
        return mean_defined([auroc_within(logits[:, i], target[:, i], strata) for i in range(target.shape[1])])[0]
    return mean_defined([auroc(logits[:, i], target[:, i]) for i in range(target.shape[1])])[0]


def main() -> None:
    config = parse(json.loads(Path(sys.argv[1]).read_text()), CellConfig, sys.argv[1])
    raw = Path(sys.argv[2])
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    transplant = plant(config, 1)[0]
    module = transplant.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    files = {split: Files(raw, config, split) for split in ("train", "val", "test")}
    recipe = config.task.linear if transplant.views == "evaluation" else config.task.recipe
    optimizer = torch.optim.AdamW(
        [{"params": group.params, "weight_decay": recipe.weight_decay if group.decay else 0.0} for group in transplant.groups]
    )
    batches = DataLoader(files["train"], recipe.batch, shuffle=True, drop_last=True)
    total, warmup = recipe.epochs * len(batches), round(recipe.warmup * len(batches))
    best, kept, step, began = -math.inf, {}, 0, time.perf_counter()
    for _ in range(recipe.epochs):
        module.train()
        for image, target in batches:
            for group, settings in zip(transplant.groups, optimizer.param_groups, strict=True):
                settings["lr"] = recipe.lr * group.lr_scale * factor(step, total, warmup)
            loss = loss_of(config.task, module(image.contiguous(memory_format=torch.channels_last)), target, torch.ones_like(target))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
        reached = score(config, files["val"], *outputs(module, files["val"]))
        if reached > best:
            best, kept = reached, {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.load_state_dict(kept)
    reached = score(config, files["test"], *outputs(module, files["test"]))
    whole_s = time.perf_counter() - BEGAN
    decode_s = sum(each.decode_s for each in files.values())
    row = {"key": config.key, "score": reached, "whole_s": whole_s, "import_s": IMPORT_S, "decode_s": decode_s}
    Path(sys.argv[3]).write_text(json.dumps(row | {"train_s": time.perf_counter() - began - decode_s}))


if __name__ == "__main__":
    main()
