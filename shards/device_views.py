"""The views of shards.views made in batches on the device that trains: every image its own draw, no loop over images, no call to the host.

    draws_VBP = table(cfg, [(seed, epoch, i) for i in ids], height, width, rgb=False)        # in the workers that read, float32
    views = apply(image_BCHW, draws_VBP)                                                     # in the loop that trains: u8 BCHW of cfg.sizes

Draws are those of the CPU, made by the same function, so both have one distribution by construction, and the same key gives the same view
up to rounding. Cropping, halving, resizing and mirroring are one matrix for the rows and one for the columns of each image, the blur
is another two: matrix products are what such devices do best. Legend: V views, B images, P numbers of a draw, S side of a view.
"""

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
import torch
from torch import Tensor

from base.errors import RequestError
from shards.draws import Draw, Key, ViewsConfig, draw


def table(cfg: ViewsConfig, keys: Sequence[Key], height: int, width: int, rgb: bool) -> np.ndarray:
    """The draws of a batch, float32 (V, B, P) with the fields of Draw; rgb: see shards.draws.draw.

    Raises:
        RequestError: views for which there is no device code.
    """
    if cfg.kind == "eval" or cfg.library != "allograft" or cfg.rand_augment:
        raise RequestError("there is no device code for kind eval, library lightly or rand_augment", where="views")
    return np.array([draw(cfg, key, height, width, rgb) for key in keys], dtype=np.float32).transpose(1, 0, 2)


@torch.no_grad()
def apply(image_BCHW: Tensor, draws_VBP: np.ndarray) -> list[Tensor]:
    """The drawn views of a batch of whole u8 images: u8 (B, C, S, S) each. The draws lie on the host: it skips what none of them asks."""
    with torch.autocast(image_BCHW.device.type, enabled=False):  # bfloat16 cannot tell 200 from 201
        pixels_BCHW = image_BCHW.float()
        return [_view(pixels_BCHW, draws_BP) for draws_BP in draws_VBP]


def crop_masks(seg_BHW: Tensor, drawn: Sequence[Draw]) -> Tensor:
    """The masks of such images, u8, cropped, resized by nearest neighbour at pixel centres and mirrored as the CPU does it."""
    places = [[_nearest(one.height, one.size) + one.y, _nearest(one.width, one.size)[:: -1 if one.flip else 1] + one.x] for one in drawn]
    at_B2S = torch.from_numpy(np.array(places)).to(seg_BHW.device)
    each = torch.arange(len(seg_BHW), device=seg_BHW.device)[:, None, None]
    return seg_BHW[each, at_B2S[:, 0, :, None], at_B2S[:, 1, None, :]]


@lru_cache(maxsize=4096)
def _nearest(length: int, size: int) -> np.ndarray:
    """Which of `length` pixels shards.views.resize_mask takes for each of `size`, int64: OpenCV rounds in a fixed point of its own."""
    pixels = np.arange(length, dtype=np.uint16)[None]
    return cv2.resize(pixels, (size, 1), interpolation=cv2.INTER_NEAREST_EXACT)[0].astype(np.int64)


def _view(pixels_BCHW: Tensor, draws_BP: np.ndarray) -> Tensor:
    host = dict(zip(Draw._fields, draws_BP.T, strict=True))
    columns_PB = torch.from_numpy(np.ascontiguousarray(draws_BP.T)).to(pixels_BCHW.device, non_blocking=True)
    drawn = dict(zip(Draw._fields, columns_PB[:, :, None, None, None], strict=True))
    view_BCSS = _crop(pixels_BCHW, drawn, int(host["side"][0]), int(host["size"][0]))
    if (host["brightness"] != 1).any() or (host["contrast"] != 1).any():
        view_BCSS = _light(view_BCSS, drawn)
    if (host["saturation"] != 1).any():
        view_BCSS = (view_BCSS * drawn["saturation"] + _grey(view_BCSS) * (1 - drawn["saturation"])).clamp(0, 255).round()
    if (host["hue"] != 0).any():
        view_BCSS = _turn_hue(view_BCSS, drawn["hue"])
    if host["grey"].any():
        view_BCSS = torch.where(drawn["grey"] > 0, _grey(view_BCSS), view_BCSS)
    if (host["sigma"] > 0).any():
        blur_B1SS = _blur_matrix(drawn["sigma"][:, :, 0], view_BCSS.shape[-1])[:, None]
        view_BCSS = (blur_B1SS @ view_BCSS @ blur_B1SS.mT).round()
    if host["solarize"].any():
        view_BCSS = view_BCSS + (drawn["solarize"] > 0) * (view_BCSS >= 128) * (255 - 2 * view_BCSS)
    return view_BCSS.to(torch.uint8)


def _crop(pixels_BCHW: Tensor, drawn: dict[str, Tensor], side: int, size: int) -> Tensor:
    height, width = pixels_BCHW.shape[2:]
    whole = (drawn["width"] == width) & (drawn["height"] == height)
    halved = 2.0 ** drawn["level"]
    never = torch.zeros_like(drawn["flip"])
    rows_B1SH = _resize_matrix(drawn["y"], drawn["height"], drawn["top"], never, halved, whole, side, size, height)
    columns_B1SW = _resize_matrix(drawn["x"], drawn["width"], drawn["left"], drawn["flip"], halved, whole, side, size, width)
    return (rows_B1SH @ pixels_BCHW @ columns_B1SW.mT).round().clamp_(0, 255)


def _resize_matrix(
    start: Tensor, length: Tensor, first: Tensor, flip: Tensor, halved: Tensor, whole: Tensor, side: int, size: int, full: int
) -> Tensor:
    """Weights (B, 1, size, full): an axis of `full` pixels, halved, cut to [start, start + length), resized to `side`, seen from `first`.

    As the CPU does it: linear between pixels of the halved axis; mean over areas where a whole image shrinks. Arguments are (B, 1, 1, 1).
    """
    at = torch.arange(size, device=start.device)[:, None] + first
    at = torch.where(flip > 0, side - 1 - at, at)
    source = torch.arange(full, device=start.device)
    cut = length / halved
    place = ((at + 0.5) * (cut / side) - 0.5).clamp(min=0).minimum(cut - 1) + start / halved
    linear = (1 - (torch.div(source, halved, rounding_mode="floor") - place).abs()).clamp_(min=0) / halved
    if full <= side:
        return linear
    step = full / side
    mean = (((at + 1) * step).minimum(source + 1) - (at * step).maximum(source)).clamp(min=0) / step
    return torch.where(whole, mean, linear)


def _light(pixels_BCSS: Tensor, drawn: dict[str, Tensor]) -> Tensor:
    first = drawn["brightness_first"] > 0
    lit_BCSS = torch.where(first, (pixels_BCSS * drawn["brightness"]).clamp(0, 255), pixels_BCSS)
    seen_BCSS = lit_BCSS.round()
    centre_B111 = (_grey(seen_BCSS, rounded=False) if pixels_BCSS.shape[1] == 3 else seen_BCSS).mean(dim=(1, 2, 3), keepdim=True)
    lit_BCSS = ((lit_BCSS - centre_B111) * drawn["contrast"] + centre_B111).clamp(0, 255)
    return torch.where(first, lit_BCSS, (lit_BCSS * drawn["brightness"]).clamp(0, 255)).round()


def _grey(pixels_B3SS: Tensor, rounded: bool = True) -> Tensor:
    red, green, blue = pixels_B3SS.split(1, dim=1)
    grey_B1SS = 0.299 * red + 0.587 * green + 0.114 * blue
    return grey_B1SS.round() if rounded else grey_B1SS


def _turn_hue(pixels_B3SS: Tensor, turns: Tensor) -> Tensor:
    """The hue of HSV turned by that share of the circle."""
    red, green, blue = pixels_B3SS.split(1, dim=1)
    value = pixels_B3SS.amax(dim=1, keepdim=True)
    chroma = value - pixels_B3SS.amin(dim=1, keepdim=True)
    safe = chroma.clamp(min=1)
    blue_or_green = torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    sixths = torch.where(value == red, (green - blue) / safe, blue_or_green) + 6 * turns
    channel = torch.arange(3, device=turns.device)[:, None, None]
    away = (5 - 2 * channel + sixths) % 6
    return (value - chroma * torch.minimum(away, 4 - away).clamp(0, 1)).round().clamp_(0, 255)


def _blur_matrix(sigma_B11: Tensor, side: int) -> Tensor:
    """Weights (B, side, side) of a Gaussian cut off at 2 to 3 standard deviations, mirrored at the edges without doubling them."""
    at = torch.arange(side, device=sigma_B11.device, dtype=torch.float32)
    to, start, last = at[:, None], at[None] > 0, at[None] < side - 1
    radius_B11 = (2 * sigma_B11).ceil()

    def weight(distance: Tensor) -> Tensor:
        gauss = torch.exp(-0.5 * (distance / sigma_B11.clamp(min=1e-3)) ** 2)
        return gauss * (distance <= radius_B11)

    total = weight((to - at).abs()) + weight(to + at) * start + weight(2 * (side - 1) - to - at) * last
    return total / total.sum(dim=-1, keepdim=True)
