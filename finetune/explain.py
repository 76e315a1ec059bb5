"""Where a network looks: Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) at any cut, for any family, strategy and head.

    heat_BHW = grad_cam(network, x_u8_BCHW, labels=[0, 2])            # at the last cut; 0..1 per image
    np.savez_compressed("heat.npz", **heat_maps(network, task, test)) # the same images and labels in every cell of a task

Forty lines on torch's hooks and not captum, whose LayerGradCam takes every map as channels first: Swin's maps have their channels last and
a transformer's are tokens, of which it would average the wrong axis.

Legend: B images, K images shown, C channels, H W pixels, h w of a map.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from base.errors import RequestError
from encoders.build import Encoder, channels_first
from encoders.cuts import Cut, find, is_vit
from finetune.data import Arrays
from finetune.heads import canvas_of, pad
from finetune.network import Network
from finetune.task import Task

SHOWN = 8  # images of a task


def grad_cam(network: Network, x: Tensor, labels: Sequence[int] | None = None, cut: str | None = None) -> Tensor:
    """Heat of each image: ReLU of the channels of the map at the cut, weighted by the mean gradient of what is explained.

    That is the logit of the label; without labels the sum of all logits (of grades: how high), and of masks the sum over the pixels that
    are predicted to be inside (Seg-Grad-CAM, Vinogradova et al. 2020, arXiv 2002.11434).
    The network is left as it was: no gradient reaches a parameter, frozen or not.

    Args:
        x: u8 BCHW. labels: an index of a logit for each image.
        cut: a name, a stage's meaning its last block; unless given the last cut, or the last but one of a transformer whose class token is
            read, since there the patches of the last block lead nowhere. At a dense layer: the channels that it adds.

    Returns:
        float BHW, divided by the image's maximum; zero where nothing speaks for it.

    Raises:
        RequestError: no such cut, or volumes.
    """
    if x.ndim != 4:
        raise RequestError(f"heat maps are of images, not of {x.ndim - 2}-dimensional volumes")
    encoder, size = network.encoder, (x.shape[-2], x.shape[-1])
    point = _point(network, cut)
    held: list[Tensor] = []

    def leaf(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        held.append(output.detach().requires_grad_())
        return held[-1].clone()  # what follows may work in place

    training = network.training
    network.eval()
    hook = encoder.net.get_submodule(point.module).register_forward_hook(leaf)
    try:
        with torch.enable_grad():
            maps = encoder.pyramid(pad(x, network.stride)) if network.pyramid else [encoder(x)]
            logits = network.head(maps, size)
            if network.pyramid:
                explained = (logits * (logits > 0)).sum()
            else:
                explained = logits.sum() if labels is None else logits[torch.arange(len(x)), torch.as_tensor(labels)].sum()
            (gradient,) = torch.autograd.grad(explained, held[0])
    finally:
        hook.remove()
        network.train(training)
    canvas = canvas_of(size, network.stride)
    grid = (canvas[0] // point.reduction, canvas[1] // point.reduction)
    activation_BChw, gradient_BChw = (_planes(encoder, h, grid) for h in (held[0].detach(), gradient))
    heat_B1hw = (activation_BChw * gradient_BChw.mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu()
    heat_BHW = F.interpolate(heat_B1hw, canvas, mode="bilinear", align_corners=False)[:, 0, : size[0], : size[1]]
    return heat_BHW / heat_BHW.amax((1, 2), keepdim=True).clamp(min=torch.finfo(heat_BHW.dtype).tiny)


def _point(network: Network, cut: str | None) -> Cut:
    encoder = network.encoder
    if cut is not None:
        at = find(encoder.architecture, cut)
        if at >= len(encoder.cuts):
            listed = ", ".join(point.name for point in encoder.cuts)
            raise RequestError(f"this {encoder.architecture} is truncated before '{cut}'", hint=f"its cuts are {listed}")
        return encoder.cuts[at]
    of_token = is_vit(encoder.architecture) and not network.pyramid and getattr(encoder, "whole", True)
    return encoder.cuts[-2] if of_token and len(encoder.cuts) > 1 else encoder.cuts[-1]


def _planes(encoder: Encoder, h: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map as it comes out of the module -> BChw; the tokens of a transformer without class token."""
    if h.ndim == 3:
        return h[:, -grid[0] * grid[1] :].unflatten(1, grid).permute(0, 3, 1, 2)
    return channels_first(encoder.net, h)


def chosen(task: Task, arrays: Arrays) -> tuple[NDArray[np.int64], list[str]]:
    """Which images are shown and which label of each is explained: a function of task and split, so the same in every cell.

    Images that have a label, in turn over the labels, evenly spaced; the name is "" of masks. Where none has one, any images.
    """
    spaced = np.unique(np.linspace(0, len(arrays) - 1, min(SHOWN, len(arrays))).round().astype(np.int64))
    if task.kind == "segmentation" or not (arrays.target * arrays.known).any():
        return spaced, [task.measured[0] if task.labels else ""] * len(spaced)
    found: dict[int, str] = {}
    having = {label: np.flatnonzero(_positive(arrays, task.labels.index(label))) for label in task.measured}
    for turn in range(SHOWN):
        for label, images in having.items():
            if len(images) and len(found) < SHOWN:
                found.setdefault(int(images[turn * len(images) // SHOWN]), label)
    order = sorted(found)
    return np.asarray(order, np.int64), [found[i] for i in order]


def _positive(arrays: Arrays, column: int) -> NDArray[np.bool_]:
    return np.asarray((arrays.target[:, column] == 1) & (arrays.known[:, column] > 0))


def heat_maps(network: Network, task: Task, arrays: Arrays) -> dict[str, NDArray[Any]]:
    """Heat of chosen images of a split.

    Returns:
        ids K, label K, image K H W [3] u8, heat K H W f16, cut: where.
    """
    at, labels = chosen(task, arrays)
    x = torch.from_numpy(np.ascontiguousarray(arrays.image[at])).to(next(network.parameters()).device)
    # Grades are explained by how high the network puts the image: it has no logit of one grade.
    columns = [task.labels.index(label) for label in labels] if task.kind in ("multilabel", "multiclass") else None
    heat = grad_cam(network, x, columns)
    image = arrays.image[at].transpose(0, 2, 3, 1)
    return {
        "ids": np.array([arrays.ids[i] for i in at]),
        "label": np.array(labels),
        "image": image[..., 0] if image.shape[-1] == 1 else image,
        "heat": heat.cpu().numpy().astype(np.float16),
        "cut": np.array(_point(network, None).name),
    }
