"""The network that a strategy makes: an encoder, what is read from it, and a head.

    encoder.requires_grad_(False)                # what does not train is in evaluation mode, too, whatever `train()` says
    network = Network(encoder, PooledHead(encoder.num_features, 14), pyramid=False)
    logits = network(x_u8_BCHW)                  # == network.head(network.embed(x), size): embed can be kept when the encoder is frozen

Legend: B batch, C channels, H W pixels.
"""

import torch
from torch import Tensor, nn

from encoders.build import Encoder
from finetune.heads import pad


class Network(nn.Module):
    """`forward(x) == head(embed(x), x's size)`.

    Which parts of the encoder are frozen is said once, by `requires_grad`: a part none of whose parameters trains is in evaluation mode,
    or its batch-norm statistics would drift while nothing seems to train.
    """

    def __init__(self, encoder: Encoder, head: nn.Module, *, pyramid: bool) -> None:
        super().__init__()
        self.encoder, self.head, self.pyramid = encoder, head, pyramid
        self.stride: int = head.stride if pyramid else 1  # type: ignore[assignment]
        _rest(encoder)

    @property
    def frozen(self) -> bool:
        """Whether no parameter of the encoder trains, so that its features can be kept."""
        return not any(parameter.requires_grad for parameter in self.encoder.parameters())

    def train(self, mode: bool = True) -> "Network":
        super().train(mode)
        _rest(self.encoder)
        return self

    def embed(self, x: Tensor) -> list[Tensor]:
        """x: u8 BCHW -> what the head reads: pooled features, or the maps at the cut points."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.encoder.pyramid(pad(x, self.stride)) if self.pyramid else [self.encoder(x)]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(x), (x.shape[-2], x.shape[-1]))
        return logits


def _rest(module: nn.Module) -> None:
    """Evaluation mode for every part that has parameters of which none trains."""
    held = list(module.parameters())
    if held and not any(parameter.requires_grad for parameter in held):
        module.eval()
        return
    for child in module.children():
        _rest(child)
