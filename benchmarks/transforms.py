"""How fast are views made in one thread, against lightly's transforms? Decoding included, nothing else.

    nice .venv/bin/python benchmarks/transforms.py                   # about 2 minutes; --rounds 2 for a quick look

Data: grey JPEGs of 512 and 1024 px, x-ray-like noise, in memory. Rows per set of views (SimCLR two of 224 px; DINO two of 224, six of 96;
MAE one of 224):

    allograft        decoded to one channel, shards.views.make: uint8
    lightly default  decoded to RGB by PIL, the transform as it comes: float32, normalised
    lightly grey     decoded to one channel, without saturation, hue, greyscale

Ours have lightly's ranges and probabilities, solarising included, without what does nothing to a grey image; MAE's and DINO's crops are
bilinear instead of bicubic. Rounds are interleaved, times are processor time, which a busy machine stretches less; medians over rounds.
The last line is DINO's ratio to lightly's default.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import cv2
import torch
import xrays
from lightly.transforms import DINOTransform, MAETransform, SimCLRTransform
from PIL import Image

from shards.decode import image as decode
from shards.views import ViewsConfig, make

GREY = {"mean": [0.5], "std": [0.25]}
COLOURLESS: dict[str, Any] = {"cj_sat": 0.0, "cj_hue": 0.0, "random_gray_scale": 0.0, "normalize": GREY}
DINO_CROPS = [{"blur_p": 1.0}, {"blur_p": 0.1, "solarize_p": 0.2}, {"count": 6, "size": 96, "crop_scale": (0.05, 0.4)}]
SETS: dict[str, tuple[dict[str, Any], Callable[[], Any], Callable[[], Any]]] = {
    "SimCLR": (
        {"kind": "two", "crop_scale": (0.08, 1.0), "brightness": 0.8, "contrast": 0.8},
        SimCLRTransform,
        lambda: SimCLRTransform(**COLOURLESS),
    ),
    "DINO 2+6": (
        {"kind": "multi", "crop_scale": (0.4, 1.0), "brightness": 0.4, "contrast": 0.4, "crops": DINO_CROPS},
        DINOTransform,
        lambda: DINOTransform(**COLOURLESS),
    ),
    "MAE": ({"kind": "one", "crop_scale": (0.2, 1.0), "jitter_p": 0.0, "blur_p": 0.0}, MAETransform, lambda: MAETransform(normalize=GREY)),
}


def ours(files: list[bytes], settings: dict[str, Any]) -> Callable[[int], object]:
    cfg = ViewsConfig.model_validate({"size": 224} | settings)
    return lambda i: make(decode(files[i], 1), None, cfg, (0, 0, i))


def decoding(files: list[bytes]) -> Callable[[int], object]:
    return lambda i: decode(files[i], 1)


def lightly(files: list[bytes], transform: Any, mode: str) -> Callable[[int], object]:
    return lambda i: transform(Image.open(io.BytesIO(files[i])).convert(mode))


def img_per_s(view: Callable[[int], object], count: int) -> float:
    started = time.thread_time()
    for i in range(count):
        view(i)
    return count / (time.thread_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    median: dict[tuple[int, str, str], float] = {}
    for side in (512, 1024):
        files = [xrays.xray(i, side) for i in range(options.images)]
        rows: dict[tuple[int, str, str], Callable[[int], object]] = {(side, "decoding", "allograft"): decoding(files)}
        for name, (settings, default, grey) in SETS.items():
            rows[side, name, "allograft"] = ours(files, settings)
            rows[side, name, "lightly default"] = lightly(files, default(), "RGB")
            rows[side, name, "lightly grey"] = lightly(files, grey(), "L")
        speeds: dict[tuple[int, str, str], list[float]] = {row: [] for row in rows}
        for _ in range(options.rounds):
            for row, view in rows.items():
                speeds[row].append(img_per_s(view, options.images))
        median |= {row: statistics.median(speed) for row, speed in speeds.items()}
    print(f"{'px':>5s}  {'views':10s}{'by':18s}{'images/s':>10s}")
    for (side, name, by), speed in median.items():
        print(f"{side:5d}  {name:10s}{by:18s}{speed:10.0f}")
    for name in ("SimCLR", "MAE", "DINO 2+6"):
        for peer in ("lightly grey", "lightly default"):
            ratios = ", ".join(f"{median[side, name, 'allograft'] / median[side, name, peer]:.1f}x at {side} px" for side in (1024, 512))
            print(f"{name}, allograft over {peer}: {ratios}")


if __name__ == "__main__":
    main()
