"""From raw labels (1, 0, -1 uncertain, None unknown) to float targets and the mask of what is known. Nothing of this is in the shards.

    target_NL, mask_NL = targets([record.labels for record in records], card, ["Edema", "Mass"])
    resolve = Targets(card, names, training=True, seed=3); resolve([labels], keys=["<dataset>-<20 hex>"])

Names are labels of the card or those that its `views` make of them; a name that the card does not know is masked, as in mixtures of
datasets. Loss and metric take both arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from base.seeds import rng
from shards.card import Card, Policy, Smoothed, Uncertain

Labels = Mapping[str, int | None]


def policy_of(uncertain: Uncertain, label: str) -> Policy:
    """What an uncertain label counts as, by a policy for all or one for each."""
    if isinstance(uncertain, dict):
        return uncertain.get(label, uncertain.get("default", "ignore"))
    return uncertain


class Targets:
    """The rule for one dataset.

    Args:
        card: its labels, views and defaults.
        names: the targets' names, in order.
        uncertain: instead of the card's policy for labels that are -1.
        training: uncertain labels count as the policy says; else they are masked, since nobody knows them and a metric would.
        seed: of the draws of smoothed labels, which depend on it, the sample's key and the label alone.
    """

    def __init__(self, card: Card, names: Sequence[str], uncertain: Uncertain | None = None, *, training: bool = False, seed: int = 0):
        self.exclusive = card.kind == "multiclass"
        self.silent: float | None = 0.0 if card.unmentioned == "zeros" else None
        self.policies = {label: policy_of(card.uncertain if uncertain is None else uncertain, label) for label in card.labels}
        self.training, self.seed, self.width = training, seed, len(names)
        known = {label: [label] for label in card.labels} | card.derived
        self.sources = [(column, known[name]) for column, name in enumerate(names) if name in known]
        self.columns = np.array([column for column, _ in self.sources], np.int64)
        self.columns_of: dict[str, list[int]] = {}
        for column, labels in self.sources:
            for label in labels:
                self.columns_of.setdefault(label, []).append(column)

    def __call__(self, labels: Sequence[Labels], keys: Sequence[str | int]) -> tuple[np.ndarray, np.ndarray]:
        """Raw labels of N samples and their keys as targets (N, L) in [0, 1] and the mask (N, L), 1 where known, both float32."""
        target_NL, mask_NL = np.zeros((2, len(labels), self.width), np.float32)
        for sample, key, target_L, mask_L in zip(labels, keys, target_NL, mask_NL, strict=True):
            self.fill(sample, key, target_L, mask_L)
        return target_NL, mask_NL

    def fill(self, sample: Labels, key: str | int, target_L: np.ndarray, mask_L: np.ndarray) -> None:
        """Write one sample's targets and mask over zeros."""
        if self.exclusive:
            if 1 in sample.values():  # a class: all others are 0, though the sample does not say so
                mask_L[self.columns] = 1
                for label, value in sample.items():
                    if value == 1:
                        target_L[self.columns_of.get(label, [])] = 1
            return
        for column, labels in self.sources:
            values = [self._value(sample.get(label), key, label) for label in labels]
            known = [value for value in values if value is not None]
            # Any of several: one that is there decides, an unknown one leaves open what the others deny.
            if known and (len(known) == len(values) or max(known) == 1):
                target_L[column], mask_L[column] = max(known), 1

    def _value(self, raw: int | None, key: str | int, label: str) -> float | None:
        if raw is None:
            return self.silent
        if raw != -1:
            return float(raw)
        policy = self.policies[label] if self.training else "ignore"
        if isinstance(policy, Smoothed):
            return float(rng("uncertain", self.seed, key, label).uniform(*policy.smoothed))
        return {"ones": 1.0, "zeros": 0.0, "ignore": None}[policy]


def targets(labels: Sequence[Labels], card: Card, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Targets (N, L) and the mask of what is known, as a metric takes them: see Targets."""
    return Targets(card, names)(labels, range(len(labels)))
