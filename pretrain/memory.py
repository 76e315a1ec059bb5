"""What contrastive methods remember: queues of keys and banks with a row an image, in the checkpoint and equal on all ranks.

    queue = Queue(length=4096, width=128)
    loss, top1 = info_nce((q_Bd * k_Bd).sum(1), q_Bd @ queue.keys_Kd.T, temperature=0.2)
    queue.push(k_Bd)                                    # after the update: the loss still needs the old keys for its gradient

lightly's memory bank is in no checkpoint (its buffers are not persistent), so a resumed run would meet a random queue; and it drops keys
that pass its end. Every vector here is float32 of length 1. What is pushed or moved is gathered from the ranks in their order, which is
that of the global batch: the number of ranks changes nothing.

Legend: B images of this rank, G of the global batch, N of the corpus, K negatives, d projections.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base.errors import RequestError
from engine import ranks
from engine.ahead import to_device
from pretrain.methods import Facts


def info_nce(positive_B: Tensor, negative_BK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean of -log softmax of the positive among itself and the negatives, and the share of rows where it beats all of them.

    A tie counts against: equal embeddings find nothing. A negative of -inf is none.
    """
    logits = torch.cat([positive_B[:, None], negative_BK], dim=1) / temperature
    loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
    return loss, (positive_B > negative_BK.amax(dim=1)).float().mean().detach()


class Queue(nn.Module):
    """The newest K keys, the oldest overwritten first; random at first. K is a multiple of the global batch."""

    keys_Kd: Tensor
    place: Tensor

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("keys_Kd", F.normalize(torch.randn(length, width), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))  # row of the oldest; a tensor, or a step would wait for the GPU

    @torch.no_grad()
    def push(self, k_Bd: Tensor) -> None:
        """Keys of this step. All ranks call."""
        k_Gd = ranks.all_gather(k_Bd)
        rows_G = (self.place + torch.arange(len(k_Gd), device=k_Gd.device)) % len(self.keys_Kd)
        self.keys_Kd.index_copy_(0, rows_G, k_Gd)
        self.place.add_(len(k_Gd)).remainder_(len(self.keys_Kd))


def queue_length(official: int, facts: Facts) -> int:
    """The length of a queue that was left open: the largest multiple of the global batch up to the official length, and up to a quarter of
    the samples (one batch at least), so that few of the keys are of the image that asks."""
    most = min(official, facts.samples // 4)
    return max(1, most // facts.global_batch) * facts.global_batch


def check_queue(length: int | None, facts: Facts) -> None:
    """Raises RequestError for a length that is not a multiple of the global batch, with the nearest right one."""
    if length is not None and length % facts.global_batch:
        near = max(1, round(length / facts.global_batch)) * facts.global_batch
        raise RequestError(
            f"a queue of {length} keys is not a multiple of the global batch of {facts.global_batch}",
            where="recipe: options.queue",
            hint=f"options.queue={near}",
        )


class Bank(nn.Module):
    """One row an image, random at first."""

    rows_Nd: Tensor

    def __init__(self, samples: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows_Nd", F.normalize(torch.randn(samples, width), dim=1))

    def negatives(self, count: int, seed: int) -> Tensor:
        """Ids of `count` images, drawn with replacement; every image once when that is all but one."""
        samples, device = len(self.rows_Nd), self.rows_Nd.device
        if count >= samples - 1:
            return torch.arange(samples, device=device)
        return to_device(torch.randint(samples, (count,), generator=torch.Generator().manual_seed(seed)), device)

    def contrast(self, v_Bd: Tensor, index_B: Tensor, negative_K: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """`info_nce` of vectors against their images' rows; an image's own row is no negative of it."""
        positive_B = (v_Bd * self.rows_Nd[index_B]).sum(dim=1)
        own_BK = index_B[:, None] == negative_K
        return info_nce(positive_B, (v_Bd @ self.rows_Nd[negative_K].T).masked_fill(own_BK, -math.inf), temperature)

    @torch.no_grad()
    def update(self, v_Bd: Tensor, index_B: Tensor, momentum: float) -> None:
        """row = unit(momentum * row + (1 - momentum) * v) for the global batch's images. All ranks call."""
        index_G, v_Gd = ranks.all_gather(index_B), ranks.all_gather(v_Bd)
        moved_Gd = F.normalize(momentum * self.rows_Nd[index_G] + (1 - momentum) * v_Gd, dim=1)
        # A mixture's batch may hold an image twice: both write what the first does, so that the order of writing does not matter.
        first_G = (index_G[:, None] == index_G).int().argmax(dim=1)
        self.rows_Nd.index_copy_(0, index_G, moved_Gd[first_G])
