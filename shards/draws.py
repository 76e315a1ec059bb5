"""What is drawn for a view, before any pixel is touched: one small record of numbers a view, the same for the CPU and for a device.

    cfg = ViewsConfig(kind="two", size=224)
    one, two = draw(cfg, (seed, epoch, sample_id), height=512, width=512, rgb=False)      # two Draws

Every draw comes from (key, view index) alone, so views do not depend on workers, ranks or order, nor on where their pixels are made. The
distribution is that of SimCLR (arXiv 2002.05709, appendix A): random resized crop, colour jitter, grey, blur, flip, and what BYOL, DINO
(solarising, other strengths for other views), PIRL (patches) and InfoMin (RandAugment) add. docs/views.md has each method's values.
"""

import math
import random
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from base.config import Strict, check_range
from base.seeds import seed_of

Share = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=1, le=4096)]  # pixels
Key = tuple[int, ...]
Box = tuple[int, int, int, int]  # x, y, width, height in pixels
GRID = 3  # PIRL's jigsaw: 3 x 3 patches
_CROP_TRIES = 10


class Crop(Strict):
    """One or several alike of the views of an image; what is None is as the configuration around it says."""

    count: int = Field(default=1, ge=1)
    size: Side | None = None
    crop_scale: tuple[float, float] | None = None
    blur_p: Share | None = None
    solarize_p: Share | None = None


class Jigsaw(Strict):
    """Nine patches in random order (PIRL, arXiv 1912.01991): a crop of crop_scale resized to size, cut into a 3 x 3 grid, and from each
    cell a patch at a random place, so that edges do not tell neighbours. Patches are mirrored together and not jittered or blurred."""

    size: Side = 255
    patch: Side = 64
    crop_scale: tuple[float, float] = (0.6, 1.0)


class ViewsConfig(Strict):
    """What is done to an image.

    kind: `two` random views (contrastive), `one` random view (supervised, masked autoencoders; the mask moves along), `multi` as many as
        `crops` says (DINO, SwAV), `jigsaw` one whole view or those of `crops`, then nine patches, `eval` (resized, nothing random).
    size: side of the square output, pixels. The image is never cropped for evaluation; an oblong one is squeezed.
    crops: the views one by one where they differ; of `two` they are two, of `jigsaw` one or two.
    crop_scale: smallest and largest share of the image's area in the crop.
    crop_ratio: smallest and largest aspect of the crop, relative to the image's own aspect (for square images: width / height).
    flip: mirror left and right with probability 1/2. There is no vertical flip: nobody hangs a chest film upside down.
    jitter_p: probability that brightness, contrast, saturation and hue are changed at all.
    brightness, contrast, saturation: b draws a factor from [1 - b, 1 + b]. hue: h draws a shift from [-h, h] turns of the colour circle.
    grey_p: probability that a colour image is turned grey.
    blur_p: probability of a Gaussian blur; blur_sigma: smallest and largest standard deviation, pixels of the output.
    solarize_p: probability that values from 128 on are inverted, after the blur.
    rand_augment: number of operations and magnitude of timm's RandAugment (arXiv 1909.13719), or None.
    jigsaw: the patches of kind `jigsaw`.
    device_side: None: the workers make the views. A side in pixels: they hand over whole images of that side, and the views are made in
        batches on the device that trains.
    library: `lightly` makes the views by lightly's own transforms, with the ranges given here.
    """

    kind: Literal["two", "one", "multi", "jigsaw", "eval"]
    size: Side
    crops: tuple[Crop, ...] = ()
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    jitter_p: Share = 0.8
    brightness: Share = 0.4
    contrast: Share = 0.4
    saturation: Share = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    grey_p: Share = 0.0
    blur_p: Share = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: Share = 0.0
    rand_augment: tuple[Annotated[int, Field(ge=1, le=15)], Annotated[float, Field(ge=0, le=10)]] | None = None
    jigsaw: Jigsaw = Jigsaw()
    device_side: Side | None = None
    library: Literal["allograft", "lightly"] = "allograft"

    @model_validator(mode="before")
    @classmethod
    def _lightly_needs_ranges(cls, given: object) -> object:
        if given == "lightly":
            raise ValueError("lightly's transforms take the ranges given here: say views.library: lightly beside kind and size")
        return given

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> "ViewsConfig":
        scales = {f"crops.{n}.crop_scale": crop.crop_scale for n, crop in enumerate(self.crops) if crop.crop_scale is not None}
        ranges = {"crop_scale": self.crop_scale, "jigsaw.crop_scale": self.jigsaw.crop_scale, **scales}
        tops = dict.fromkeys(ranges, 1.0) | {"crop_ratio": 10.0, "blur_sigma": 100.0}
        ranges |= {"crop_ratio": self.crop_ratio, "blur_sigma": self.blur_sigma}
        for name, low_high in ranges.items():
            check_range(name, low_high, tops[name])
        return self

    @model_validator(mode="after")
    def _kind_has_its_crops(self) -> "ViewsConfig":
        count = sum(crop.count for crop in self.crops)
        fits = {"two": count in (0, 2), "multi": count >= 1, "jigsaw": count <= 2}.get(self.kind, count == 0)
        if not fits:
            wanted = {"two": "none or two", "multi": "one at least", "jigsaw": "two at most"}.get(self.kind, "none")
            raise ValueError(f"kind {self.kind} takes {wanted} of crops, got {count}")
        if self.jigsaw.patch > self.jigsaw.size // GRID:
            raise ValueError(f"jigsaw.patch must be at most a third of jigsaw.size, {self.jigsaw.size // GRID}, got {self.jigsaw.patch}")
        return self

    @model_validator(mode="after")
    def _maker_can(self) -> "ViewsConfig":
        if self.device_side and (self.kind == "eval" or self.library == "lightly" or self.rand_augment):
            raise ValueError("device_side: there is no device code for kind eval, library lightly or rand_augment")
        if self.library == "lightly" and (self.kind in ("eval", "jigsaw") or self.rand_augment or self.crop_ratio != (3 / 4, 4 / 3)):
            raise ValueError("library lightly makes kinds one, two and multi, with its own crop_ratio of 3/4 to 4/3 and no rand_augment")
        return self

    @property
    def wholes(self) -> list["View"]:
        """The views but the patches, with everything that `crops` left open filled in."""
        if not self.crops:
            return [View(self.size, self.crop_scale, self.blur_p, self.solarize_p)] * (2 if self.kind == "two" else 1)
        return [self._filled(crop) for crop in self.crops for _ in range(crop.count)]

    def _filled(self, crop: Crop) -> "View":
        return View(
            crop.size or self.size,
            crop.crop_scale or self.crop_scale,
            self.blur_p if crop.blur_p is None else crop.blur_p,
            self.solarize_p if crop.solarize_p is None else crop.solarize_p,
        )

    @property
    def sizes(self) -> list[int]:
        """Side of each view that an image gives, pixels."""
        return [view.size for view in self.wholes] + ([self.jigsaw.patch] * GRID**2 if self.kind == "jigsaw" else [])

    @property
    def handed_sizes(self) -> list[int]:
        """Sides of what the workers hand over: the views, or the whole image that a device makes them of."""
        return [self.device_side] if self.device_side else self.sizes

    @property
    def moves_masks(self) -> bool:
        """Whether the mask is moved along: with one view that is made where the image is read."""
        return self.kind in ("one", "eval") and self.device_side is None and self.library == "allograft"


class View(NamedTuple):
    """What may differ between the views of an image; see ViewsConfig."""

    size: int
    crop_scale: tuple[float, float]
    blur_p: float
    solarize_p: float


class Draw(NamedTuple):
    """One view of one image, drawn. All of it is numbers, so that a batch of them is one array.

    x, y, width, height: the crop, pixels of the image; level: how often the image is halved before it is cut.
    side: the crop is resized to side x side; the view shows size x size of that from (left, top) on: all of it, or a patch.
    flip: mirrored, before a patch is cut. sigma: of the blur, 0 = none. rand_augment: seed of its own, 0 = none.
    """

    x: int
    y: int
    width: int
    height: int
    level: int
    side: int
    left: int
    top: int
    size: int
    flip: bool
    brightness: float = 1.0
    contrast: float = 1.0
    brightness_first: bool = False
    saturation: float = 1.0
    hue: float = 0.0
    grey: bool = False
    sigma: float = 0.0
    solarize: bool = False
    rand_augment: int = 0


def draw(cfg: ViewsConfig, key: Key, height: int, width: int, rgb: bool) -> list[Draw]:
    """The views of one image of that height and width, pixels, in the order of cfg.sizes.

    Args:
        key: names the draws: (seed, epoch, sample id).
        rgb: whether the image has three channels that are colours; others have no saturation, hue or grey.
    """
    drawn = []
    for v, view in enumerate(cfg.wholes):
        stream = random.Random(seed_of("views", *key, v))
        (x, y, w, h), level = to_level(crop_box(height, width, view.crop_scale, cfg.crop_ratio, stream), height, width, view.size)
        brightness = contrast = saturation = 1.0
        hue = sigma = 0.0
        first = grey = False
        # The order of these calls is the order of the stream: pixels hang on it.
        if stream.random() < cfg.jitter_p:
            brightness, contrast = _factor(cfg.brightness, stream), _factor(cfg.contrast, stream)
            first = stream.random() < 0.5
            if rgb:
                saturation, hue = _factor(cfg.saturation, stream), stream.uniform(-cfg.hue, cfg.hue)
        if rgb:
            grey = stream.random() < cfg.grey_p
        if stream.random() < view.blur_p:
            sigma = round(stream.uniform(*cfg.blur_sigma), 2)
        solarize = view.solarize_p > 0 and stream.random() < view.solarize_p
        operations = stream.getrandbits(31) + 1 if cfg.rand_augment else 0
        flip = cfg.flip and stream.random() < 0.5
        size, appearance = view.size, (brightness, contrast, first, saturation, hue, grey, sigma, solarize, operations)
        drawn.append(Draw(x, y, w, h, level, size, 0, 0, size, flip, *appearance))
    if cfg.kind == "jigsaw":
        drawn += _patches(cfg, random.Random(seed_of("views", *key, len(drawn))), height, width)
    return drawn


def _patches(cfg: ViewsConfig, stream: random.Random, height: int, width: int) -> list[Draw]:
    jigsaw, cell = cfg.jigsaw, cfg.jigsaw.size // GRID
    box, level = to_level(crop_box(height, width, jigsaw.crop_scale, cfg.crop_ratio, stream), height, width, jigsaw.size)
    flip, free = cfg.flip and stream.random() < 0.5, cell - jigsaw.patch + 1
    places = [
        (column * cell + stream.randrange(free), row * cell + stream.randrange(free)) for row in range(GRID) for column in range(GRID)
    ]
    stream.shuffle(places)
    return [Draw(*box, level, jigsaw.size, left, top, jigsaw.patch, flip) for left, top in places]


def crop_box(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], stream: random.Random) -> Box:
    """x, y, width, height: area uniform and aspect log-uniform, drawn again while it does not fit; the whole image at last."""
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_TRIES):
        area = stream.uniform(*scale)
        root = math.exp(0.5 * stream.uniform(log_low, log_high))
        share_w, share_h = math.sqrt(area) * root, math.sqrt(area) / root
        if share_w <= 1 and share_h <= 1:
            w, h = max(round(share_w * width), 1), max(round(share_h * height), 1)
            return int(stream.random() * (width - w + 1)), int(stream.random() * (height - h + 1)), w, h
    return 0, 0, width, height


def to_level(box: Box, height: int, width: int, size: int) -> tuple[Box, int]:
    """How often to halve before the crop, and the box moved (by less than an output pixel) onto whole pixels of that level.

    The mask is cut by the moved box too, so image and mask stay aligned.
    """
    level = 0
    # A half of an odd side would not stand for whole pixel pairs, so the pyramid ends there and bilinear does the rest.
    while min(box[2:]) >> level >= 2 * size and not ((height >> level) % 2 or (width >> level) % 2):
        level += 1
    x, y, w, h = (part >> level << level for part in box)
    return (x, y, w, h), level


def _factor(strength: float, stream: random.Random) -> float:
    return stream.uniform(1 - strength, 1 + strength)
