"""knn: the labels of the k training images whose features are nearest; nothing trains (Wu et al. 2018, arXiv 1805.01978, section 3.4).

Neighbours vote by exp(cosine similarity / temperature). The head has no parameters: `fit` gives it the training images.

Legend: B images, N training images, D features, L labels.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from base.config import Strict
from base.errors import RequestError, WorkError
from finetune.network import Network
from finetune.task import Kind, Task
from finetune.transplant import EncoderSpec, Transplant, receive, shaped

LEAST = 1e-6  # share of the votes that a label gets at the least, and at the most lacks: logits stay finite


class Config(Strict):
    """k: neighbours, all training images where there are fewer; the authors take 200, of ImageNet. temperature: of the votes, theirs."""

    k: int = Field(20, gt=0)
    temperature: float = Field(0.07, gt=0)


class KnnHead(nn.Module):
    """[z_BD] -> logits of the votes' shares: sigmoid or softmax, as the task's kind has it, gives the shares back.

    multilabel and multiclass: logits_BL; ordinal: of the grades above each but the last, so one fewer.
    """

    z_ND: Tensor
    target_NL: Tensor
    known_NL: Tensor

    def __init__(self, kind: Kind, k: int, temperature: float) -> None:
        super().__init__()
        self.kind, self.k, self.temperature = kind, k, temperature
        for name in ("z_ND", "target_NL", "known_NL"):
            self.register_buffer(name, torch.zeros(0, 1), persistent=False)

    def fit(self, z_ND: Tensor, target_NL: Tensor, known_NL: Tensor) -> None:
        """Keep the training images: features, labels in 0..1, and 1 where a label is known; others do not vote on it.

        Raises:
            WorkError: no image knows some label.
        """
        nowhere = (known_NL.sum(0) == 0).nonzero().flatten().tolist()
        if nowhere:
            raise WorkError(f"no training image knows label number {nowhere[0]}", where="strategy knn")
        self.z_ND, self.target_NL, self.known_NL = F.normalize(z_ND.float(), dim=1), target_NL.float(), known_NL.float()

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        # In bf16 neighbours are ties, and a share of nearly 1 is 1, whose logit is infinite.
        with torch.autocast(self.z_ND.device.type, enabled=False):
            return self._answer(maps)

    def _answer(self, maps: Sequence[Tensor]) -> Tensor:
        similarity_BN = F.normalize(maps[0].float(), dim=1) @ self.z_ND.T
        if bool((self.known_NL > 0).all()):
            share_BL = self._vote(similarity_BN, self.target_NL)
        else:
            of_labels = zip(self.known_NL.T > 0, self.target_NL.T, strict=True)
            share_BL = torch.cat([self._vote(similarity_BN[:, known], target[known, None]) for known, target in of_labels], dim=1)
        if self.kind == "ordinal":
            share_BL = share_BL.flip(1).cumsum(1).flip(1)[:, 1:]
        share_BL = share_BL.clamp(LEAST, 1 - LEAST)
        return share_BL.log() if self.kind == "multiclass" else share_BL.logit()

    def _vote(self, similarity_BN: Tensor, target_NL: Tensor) -> Tensor:
        nearest_BK, index_BK = similarity_BN.topk(min(self.k, similarity_BN.shape[1]), dim=1)
        return torch.einsum("bk,bkl->bl", (nearest_BK / self.temperature).softmax(1), target_NL[index_BK])


def check(architecture: str, task: Task, options: Config) -> None:
    """Raises RequestError: a segmentation task."""
    if task.kind == "segmentation":
        raise RequestError("knn finds images, not pixels: it is for labels", hint="strategy linear or full for masks")


def transplant(spec: EncoderSpec, weights: Mapping[str, Tensor] | None, task: Task, options: Config, seed: int) -> Transplant:
    """A frozen encoder and a head to be fitted, no groups.

    Raises:
        RequestError: a segmentation task.
    """
    check(spec.architecture, task, options)
    encoder, loaded, sha256 = receive(spec, weights, seed)
    module = Network(shaped(encoder, task).requires_grad_(False), KnnHead(task.kind, options.k, options.temperature), pyramid=False)
    return Transplant(module, [], loaded, sha256, views="evaluation")
