"""Near-duplicates on real chest radiographs: recall for each transformation, false pairs of different patients, and what it costs.

    python benchmarks/leakage.py ../shared/data/nih_cxr14_256                  # every second image, about 5 minutes on one core
    python benchmarks/leakage.py FOLDER --step 1 --pairs 10000x100000          # all of them, and products of hashes at that size

FOLDER holds labels.csv with `image` and `patient_id`. Both roles are measured: the copy in the corpus, and the copy among the test images.
The last line is pairs of different patients called duplicates, per million.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from analysis.near_duplicates import BITS, WINDOWS, Looks, Pixels, Reference, duplicates, hashes, look, mean_image, proposals
from base.seeds import rng

Draw = np.random.Generator
Copy = Callable[[Pixels, Draw], Pixels]


def jpeg(image: Pixels, quality: int) -> Pixels:
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE), np.uint8)


def resize(image: Pixels, width: int, height: int) -> Pixels:
    method = cv2.INTER_AREA if width < image.shape[1] else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (width, height), interpolation=method), np.uint8)


def gamma(image: Pixels, power: float) -> Pixels:
    return np.rint(255 * (image / 255) ** power).astype(np.uint8)


def crop(image: Pixels, sides: Sequence[float] | np.ndarray) -> Pixels:
    """`sides`: shares cut from left, top, right, bottom."""
    height, width = image.shape
    left, top, right, bottom = sides
    return image[round(top * height) : height - round(bottom * height), round(left * width) : width - round(right * width)]


def one_side(draw: Draw) -> list[float]:
    side = int(draw.integers(4))
    return [0.05 if at == side else 0.0 for at in range(4)]


def corner(draw: Draw) -> list[float]:
    left, top = (0.05 * int(at) for at in draw.integers(0, 2, 2))
    return [left, top, 0.05 - left, 0.05 - top]


def everything(image: Pixels, draw: Draw) -> Pixels:
    """A crop of up to 5 % a side, a gamma of 0.5 to 2, half of them inverted, 128 to 400 px, JPEG of quality 50 to 95."""
    copy = gamma(crop(image, draw.uniform(0, 0.05, 4)), float(2 ** draw.uniform(-1, 1)))
    side = int(draw.integers(128, 401))
    return jpeg(resize(255 - copy if draw.integers(2) else copy, side, side), int(draw.integers(50, 96)))


def always(copy: Callable[[Pixels], Pixels]) -> Copy:
    """Nothing of it is drawn."""
    return lambda image, _: copy(image)


COPIES: dict[str, Copy] = {
    **{f"JPEG quality {quality}": always(partial(jpeg, quality=quality)) for quality in (90, 50, 30, 20)},
    **{f"{side} px": always(partial(resize, width=side, height=side)) for side in (64, 96, 192, 512)},
    "224 x 300 px": lambda image, _: resize(image, 224, 300),
    **{f"gamma {power}": always(partial(gamma, power=power)) for power in (0.4, 0.5, 0.7, 1.5, 2.0, 2.5)},
    "inverted": lambda image, _: 255 - image,
    "5 % off one side": lambda image, draw: crop(image, one_side(draw)),
    "5 % off two sides": lambda image, draw: crop(image, corner(draw)),
    "up to 5 % off every side": lambda image, draw: crop(image, draw.uniform(0, 0.05, 4)),
    "5 % off every side": lambda image, _: crop(image, [0.05] * 4),
    "all at once": everything,
}


def recall(images: list[Pixels], test: Reference, at: list[int], copy: Copy, name: str) -> tuple[float, float]:
    """Share of copies found in a corpus, and of originals found for copies among the test images."""
    copies = look(copy(images[i], rng("copy", name, i)) for i in at)
    forward = {(pair.test, pair.corpus) for pair in duplicates(test, copies)}
    turned = Reference.of(copies, test.mean_HW)
    originals = Looks(test.looks.small_NHW[at], [test.looks.content[i] for i in at])
    back = {(pair.test, pair.corpus) for pair in duplicates(turned, originals)}
    count = len(at)
    return sum((i, k) in forward for k, i in enumerate(at)) / count, sum((k, k) in back for k in range(count)) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--step", type=int, default=2, help="every how many-th image is copied")
    parser.add_argument("--pairs", help="TESTxCORPUS: products of that many random hashes are timed")
    args = parser.parse_args()
    table = pd.read_csv(args.folder / "labels.csv", dtype=str)
    images = [np.asarray(cv2.imread(str(args.folder / name), cv2.IMREAD_GRAYSCALE), np.uint8) for name in table["image"]]
    patients = table["patient_id"].tolist()
    began = time.process_time()
    looks = look(images)
    looked = time.process_time()
    test = Reference.of(looks, mean_image(looks.small_NHW))
    hashed = time.process_time()
    at = list(range(0, len(images), args.step))
    print(f"{len(images)} images of {len(set(patients))} patients; recall over {len(at)} copies, in the corpus / among the test images")
    for name, copy in COPIES.items():
        found, back = recall(images, test, at, copy, name)
        print(f"  {name:26s} {found:.4f} / {back:.4f}")
    start = time.process_time()
    proposed = list(proposals(test.hash_NWD, hashes(looks.small_NHW, test.mean_HW)))
    multiplied = time.process_time()
    # Either may be the test image: the alignment of one over the other can succeed where the other way fails.
    pairs = {tuple(sorted((pair.test, pair.corpus))) for pair in duplicates(test, looks) if pair.test != pair.corpus}
    decided = time.process_time()
    same = [pair for pair in pairs if patients[pair[0]] == patients[pair[1]]]
    count = len(images) * (len(images) - 1) // 2
    alike = sum(1 for i, name in enumerate(patients) for other in patients[:i] if name == other)
    rest = [(i, j) for i, j in proposed if i < j and patients[i] != patients[j]]
    print(f"{count - alike:,} pairs of different patients: {len(rest)} proposed, {len(pairs) - len(same)} found")
    print(f"{alike} pairs of one patient: {len(same)} found")
    costs = {
        "look, ms an image": 1e3 * (looked - began) / len(images),
        "hashes, ms an image": 1e3 * (hashed - looked) / len(images),
        "products, s per 1e9 pairs": 1e9 * (multiplied - start) / len(images) ** 2,
        "decision, ms a proposal": 1e3 * (decided - 2 * multiplied + start) / len(proposed),
    }
    print("processor time: " + "; ".join(f"{name} {value:.2f}" for name, value in costs.items()))
    if args.pairs:
        sizes = [int(size) for size in args.pairs.split("x")]
        one, other = (
            np.where(rng("hash", size).random((size, len(WINDOWS), BITS), np.float32) < 0.5, -1, 1).astype(np.int8) for size in sizes
        )
        began = time.monotonic()
        found = sum(sum(1 for _ in proposals(one, other[row : row + 2000])) for row in range(0, len(other), 2000))
        print(f"{args.pairs} random hashes: {found} proposed, {time.monotonic() - began:.0f} s")
    print(f"false pairs per million: {1e6 * (len(pairs) - len(same)) / (count - alike):.2f}")


if __name__ == "__main__":
    main()
