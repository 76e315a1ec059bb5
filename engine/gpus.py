"""What GPUs can do, by the makers' data sheets, so that speeds can be said as shares of what is possible.

    gpu = get("h100-sxm"); gpu = find(torch.cuda.get_device_name())     # None: not in the table
    seconds = least_seconds(gpu, "bf16", flops, moved)

Figures are dense ones, without sparsity, of 2023 to 2024: NVIDIA H100 Tensor Core GPU data sheet (SXM, PCIe), H200 data sheet, A100 data
sheet (SXM4), L40S data sheet, Ada GPU architecture white paper (RTX 4090, bf16 with fp32 accumulation), V100 data sheet (SXM2; it has no
bf16, so its fp16 figure stands there). fp32 is without tensor cores; convolutions may pass it, because cuDNN computes them in TF32.
"""

import re
from typing import Literal, NamedTuple

from base.errors import RequestError, unknown

Precision = Literal["fp32", "bf16"]


class Gpu(NamedTuple):
    """device: what its name in torch matches. Speeds in 10^12 operations or bytes a second, memory in GiB."""

    device: str
    bf16: float
    fp32: float
    bandwidth: float
    memory: int


GPUS: dict[str, Gpu] = {
    "h100-sxm": Gpu(r"H100 80GB HBM3", 989.4, 66.9, 3.35, 80),
    "h100-pcie": Gpu(r"H100 PCIe", 756.0, 51.2, 2.0, 80),
    "h200": Gpu(r"H200$", 989.4, 66.9, 4.8, 141),
    "a100-80": Gpu(r"A100-SXM4-80GB", 311.9, 19.5, 2.039, 80),
    "a100-40": Gpu(r"A100.*40GB", 311.9, 19.5, 1.555, 40),
    "l40s": Gpu(r"L40S", 362.0, 91.6, 0.864, 48),
    "rtx4090": Gpu(r"RTX 4090$", 165.2, 82.6, 1.008, 24),
    "v100": Gpu(r"V100-SXM2", 125.0, 15.7, 0.9, 32),
}


def get(name: str) -> Gpu:
    """By its name in the table.

    Raises:
        RequestError: not in the table, with the nearest name that is.
    """
    if name not in GPUS:
        kinds = [known for known in GPUS if known.startswith(name)]
        if len(kinds) > 1:
            raise RequestError(f"there are several kinds of GPU '{name}'", where="--gpu", hint=", ".join(kinds))
        raise unknown("GPU", name, GPUS, "--gpu")
    return GPUS[name]


def find(device: str) -> Gpu | None:
    """By the name that torch gives a device; None when the table does not have it."""
    return next((gpu for gpu in GPUS.values() if re.search(gpu.device, device)), None)


def least_seconds(gpu: Gpu, precision: Precision, flops: float, moved: float) -> float:
    """The roofline: how long so many operations and so many bytes take at best, the one while the other."""
    return max(flops / (getattr(gpu, precision) * 1e12), moved / (gpu.bandwidth * 1e12))
