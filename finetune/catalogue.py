"""The strategies by name: what each does, and what a planner must know of it without torch. Their code is in `finetune.strategies`.

STRATEGIES["linear"].text, STRATEGIES["linear"].trains_by
"""

from typing import Literal, NamedTuple

EVERYTHING = 3.0


class About(NamedTuple):
    """One strategy; a test holds each field against what its transplant does.

    trains_by: which of the task's recipes, whose rate is tuned; None where nothing trains.
    passes: of a training image in an epoch of `recipe`, in forward passes through the encoder: one forward, and one backward each for the
        gradients of activations and of weights.
    probe: before that its head is trained alone, by `linear`.
    ends: the network ends at its cut, which can be `auto`.
    """

    text: str
    trains_by: Literal["recipe", "linear"] | None = "recipe"
    passes: float = EVERYTHING
    probe: bool = False
    ends: bool = False


STRATEGIES: dict[str, About] = {
    "full": About("all weights from the source, all trained"),
    "linear": About("frozen encoder, a head linear in its features", "linear"),
    "linear-aug": About("frozen encoder, a linear head trained on augmented views by the task's recipe", passes=1.0),
    "transfusion": About("weights up to a cut, the rest random, all trained"),
    "mean-var": About("weights drawn from mean and variance of the source's tensors, all trained"),
    "slim": About("weights up to a cut, a narrower random network after it, all trained"),
    "gabor": About("synthetic Gabor filters first, the rest random, all trained"),
    "lwft": About("all weights, frozen up to a cut, the rest at a divided rate", passes=2.0),  # on average half of the backward pass
    "truncated": About("weights up to a cut, the rest discarded, all trained", ends=True),
    "fat": About("weights up to a cut, the rest discarded, frozen, a linear head", "linear", ends=True),
    "lp-ft": About("the head on the frozen encoder first, then all trained", probe=True),
    "gradual": About("all weights, trained part by part from the top", passes=2.0),
    "layer-decay": About("all weights, at rates that fall towards the stem"),
    "l2-sp": About("all weights, all trained and held near the source"),
    "lora": About("frozen vision transformer with trained matrices of low rank in its attention", passes=2.0),  # of activations alone
    "knn": About("frozen encoder, labels of the nearest training images", None),
}
