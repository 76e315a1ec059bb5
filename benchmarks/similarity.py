"""How fast is SVCCA, and in how much memory, beside plain NumPy; and 16 layers of a ResNet-50 in one pass.

    OPENBLAS_NUM_THREADS=1 nice .venv/bin/python benchmarks/similarity.py        # a minute or two; --layers IMAGES takes longer

Rows: SVCCA of 50,000 x 512 against 50,000 x 512, in single precision as of networks, computed in double (99 % of the energy),
by analysis.similarity, and by NumPy as the published tutorial describes it: singular vectors of each side, then the covariance of both,
eigenvectors and pseudo-inverses. Processor seconds of one thread, which other work on the machine does not stretch much; rounds are
interleaved; medians. Memory is the process's peak after ours and before NumPy's, with everything that is loaded.
"""

import argparse
import resource
import statistics
import tempfile
import time

import numpy as np
import torch

from analysis.similarity import svcca
from base.seeds import rng


def numpy_svcca(x: np.ndarray, y: np.ndarray) -> float:
    """SVCCA of neurons x images as the tutorial goes: truncate by SVD, then CCA by the joint covariance."""
    sides = []
    for side in (x, y):
        _, s, vt = np.linalg.svd(side - side.mean(1, keepdims=True), full_matrices=False)
        kept = int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.99)) + 1
        sides.append(s[:kept, None] * vt[:kept])
    p = len(sides[0])
    joint = np.cov(sides[0], sides[1])

    def root_of_inverse(block: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(np.linalg.pinv(block))
        return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T

    return float(np.linalg.svd(root_of_inverse(joint[:p, :p]) @ joint[:p, p:] @ root_of_inverse(joint[p:, p:]), compute_uv=False).mean())


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def layers(images: int) -> None:
    """All cuts of two ResNet-50 but the stem's, of generated images at 224 px, in one pass."""
    from analysis.activations import Probe
    from analysis.layers import across
    from encoders.build import build
    from shards.card import load_card
    from shards.pack import pack

    with tempfile.TemporaryDirectory() as folder:
        pack(load_card("phantom-chest"), f"phantom:{images * 2}", folder)
        probe = Probe(folder, split="train", images=images, size=224)
        encoders = {str(seed): build("resnet50", 1, seed=seed) for seed in (0, 1)}
        began = time.perf_counter()
        found = across(encoders, [("0", "1")], probe, [cut.name for cut in encoders["0"].cuts[1:]])
        print(f"{len(found.cuts)} layers, {found.images} images: {time.perf_counter() - began:.0f} s, peak of the process {peak():.2f} GB")


def against_numpy(rows: int, channels: int, rounds: int) -> None:
    draw = rng("similarity benchmark")
    imported = peak()
    shape = (rows, channels)
    x, y = draw.standard_normal(shape, np.float32), draw.standard_normal(shape, np.float32)
    x *= np.geomspace(1, 0.1, channels, dtype=np.float32)
    y *= 0.3
    for start in range(0, rows, 1000):  # in place and in parts: the peak is to be that of the work
        y[start : start + 1000] += 0.7 * x[start : start + 1000, ::-1]
    svcca(x, y)
    memory = peak()
    seconds: dict[str, list[float]] = {"ours": [], "NumPy": []}
    values = {}
    for _ in range(rounds):
        for name in seconds:
            began = time.process_time()
            values[name] = svcca(x, y) if name == "ours" else numpy_svcca(x.T.astype(np.float64), y.T.astype(np.float64))
            seconds[name].append(time.process_time() - began)
    ours, peer = (statistics.median(held) for held in seconds.values())
    print(f"SVCCA of {shape[0]:,} x {shape[1]} twice, one thread: ours {ours:.2f} s, NumPy {peer:.2f} s")
    held = 2 * x.nbytes / 1e9
    print(f"values differ by {abs(values['ours'] - values['NumPy']):.1e}")
    print(f"peak of the process {memory:.2f} GB (goal 1): {imported:.2f} after the imports, {held:.2f} the arrays")
    print(f"ratio {peer / ours:.1f} (goal 5)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--layers", type=int, default=0, metavar="IMAGES", help="instead: all cuts of a ResNet-50 at 224 px on so many images"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.layers:
        layers(options.layers)
    else:
        against_numpy(options.rows, options.channels, options.rounds)


if __name__ == "__main__":
    main()
