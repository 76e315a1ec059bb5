"""What trades time for memory, as a run and its explanation both have it."""

from typing import Any

import torch

from base.errors import RequestError
from encoders.build import Encoder, build
from engine import norm
from pretrain.recipe import Recipe


def affordable(recipe: Recipe, architecture: str) -> None:
    """What `economise` would refuse of the architecture, by a network without values: before anything starts. Raises as that."""
    if recipe.virtual_batch or recipe.activation_checkpointing:
        with torch.device("meta"):
            encoder = build(architecture, 3, image_size=recipe.views.size)
        economise(recipe, encoder)


def economise(recipe: Recipe, encoder: Encoder) -> None:
    """Sets the encoder up for activation checkpointing where the recipe wants it.

    Raises:
        RequestError: activations are to be computed twice, and batch norm would then count its statistics twice.
    """
    for name in ("virtual_batch", "activation_checkpointing"):
        if getattr(recipe, name) and norm.batch_norms(encoder):
            raise RequestError(
                f"{name} is exact only without batch norm, and {encoder.architecture} has it",
                where=f"recipe: {name}",
                hint=f"{name}=null, or layer norm, for instance vit_small_patch16_224",
            )
    if recipe.activation_checkpointing:
        net: Any = encoder.net
        net.set_grad_checkpointing(True)
