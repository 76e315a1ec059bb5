"""What encoders make of images, at any cut: a probe set, and maps chunk by chunk.

    probe = Probe("OUT/shards/nih-cxr14", images=2000, size=224)      # the same images in the same order whoever asks; probe.sha256
    for maps in walk([before, after], probe, ["stem", "layer1.0"]):   # maps[encoder][cut]: f32 B,C,h,w
        ...

Maps are taken on the way through the chain of the network's own modules (encoders.build.steps), so no hook is set and none has to go.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analysis.evaluating import evaluating
from base.config import digest
from base.errors import RequestError
from base.seeds import seed_of
from encoders.build import Encoder, channels_first, end, steps, token_maps
from encoders.cuts import find
from shards.corpus import Corpus
from shards.views import VIEWS_VERSION, resize

BATCH = 32


class Probe:
    """The same images of a packed dataset, in the same order, at one size: those whose keys hash lowest.

    Iterating gives u8 batches B,C,H,W, decoded anew each time.

    Attributes:
        ids: the samples' keys.
        sha256: of all that decides the pixels: manifest, split, keys, size, how images are resized.

    Raises:
        RequestError: nothing packed there, no such split.
    """

    def __init__(self, url: str, *, split: str = "val", images: int = 1000, size: int = 224, seed: int = 0, batch: int = BATCH) -> None:
        self.corpus = Corpus(url, (split,))
        self.size, self.batch = size, batch
        keys = self.corpus.keys()
        order = sorted(range(len(keys)), key=lambda i: seed_of("probe", seed, keys[i]))
        self.chosen = order[:images]
        if len(self.chosen) < 2:
            raise RequestError(f"split {split} has {len(keys)} images", where=url, hint="another --split")
        self.ids = [keys[i] for i in self.chosen]
        self.sha256 = digest([self.corpus.manifest.digest, split, self.ids, size, VIEWS_VERSION])

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def channels(self) -> int:
        return self.corpus.channels

    def __iter__(self) -> Iterator[Tensor]:
        starts = list(range(0, len(self.chosen), self.batch))
        if len(starts) > 1 and len(self.chosen) - starts[-1] == 1:
            starts.pop()  # a batch of one joins the one before
        for at, start in enumerate(starts):
            stop = starts[at + 1] if at + 1 < len(starts) else len(self.chosen)
            images = [resize(self.corpus.read(i, seg=False).image, self.size) for i in self.chosen[start:stop]]
            yield torch.from_numpy(np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)))


def maps_at(encoder: Encoder, x: Tensor, names: Sequence[str]) -> list[Tensor]:
    """x: u8 or float BCHW -> the map at each of those cuts, B,C,h,w: what a block gives after its residual sum and activation.

    Raises:
        RequestError: no such cut.
    """
    cuts = [encoder.cuts[find(encoder.architecture, name)] for name in names]
    if encoder.image_size:
        every = token_maps(encoder.net, encoder.prepare(x))
        return [every[encoder.cuts.index(cut)] for cut in cuts]
    chain = steps(encoder.net)
    ends = [end(chain, cut) for cut in cuts]
    found: dict[int, Tensor] = {}
    h = encoder.prepare(x)
    for i, (_, module) in enumerate(chain[: max(ends) + 1]):
        h = module(h)
        if i in ends:
            # A copy: an activation that works in place would change it.
            found[i] = channels_first(encoder.net, h).clone()
    return [found[i][:, : _channels(chain[i], cut.module)] for i, cut in zip(ends, cuts, strict=True)]


def _channels(step: tuple[str, nn.Module], module: str) -> int | None:
    """How many of the step's channels stand at a cut inside it: a dense block gathers, so those of its first layers come first."""
    name, block = step
    layers = [f"{name}.{layer}" for layer, _ in block.named_children()]
    if not module.startswith(f"{name}.") or module == layers[-1]:
        return None
    following: Any = block.get_submodule(layers[layers.index(module) + 1].removeprefix(f"{name}."))
    return int(following.norm1.num_features)


def walk(encoders: Sequence[Encoder], batches: Iterable[Tensor], names: Sequence[str]) -> Iterator[list[list[Tensor]]]:
    """Maps of every encoder at every cut, a batch at a time, in evaluation mode on the encoder's own device: [encoder][cut]."""
    for batch in batches:
        taken = []
        for encoder in encoders:
            with evaluating(encoder):
                device = next(encoder.parameters()).device
                taken.append(maps_at(encoder, batch.to(device), names))
        yield taken
