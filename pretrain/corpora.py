"""The data side of a run: its corpora opened and checked, and what a method may know of them.

corpora = opened(config)
labels = all_labels(corpora)
facts = facts_of(corpora, labels, config, labelled=True)
"""

from collections.abc import Sequence

import numpy as np

from base.errors import RequestError
from pretrain.methods import Facts
from pretrain.run import PretrainConfig
from shards.corpus import Corpus
from shards.labels import Targets


def opened(config: PretrainConfig) -> list[Corpus]:
    """The corpora of the configuration, in its order.

    Raises:
        RequestError: shards that are not those of the configuration, or with other channels than the encoder takes.
    """
    corpora = [Corpus(ref.shards, (ref.split,), config.cache_dir, ref.without) for ref in config.data]
    for ref, corpus in zip(config.data, corpora, strict=True):
        if corpus.manifest.digest != ref.digest:
            raise RequestError(
                f"these shards of '{ref.dataset}' have the digest {corpus.manifest.digest[:12]}, the run asks for {ref.digest[:12]}",
                where=ref.shards,
                hint="run the study again: it plans with the shards that are there",
            )
        if corpus.channels != config.in_chans:
            raise RequestError(
                f"'{ref.dataset}' has {corpus.channels} channels, the encoder takes {config.in_chans}",
                where=ref.shards,
                hint=f"in_chans={corpus.channels}",
            )
    return corpora


def all_labels(corpora: Sequence[Corpus]) -> list[str]:
    """The union of their labels, in order of first appearance."""
    return list(dict.fromkeys(label for corpus in corpora for label in corpus.labels))


def facts_of(corpora: Sequence[Corpus], labels: Sequence[str], config: PretrainConfig, *, labelled: bool) -> Facts:
    """Sizes, and for labelled methods the labels and their frequencies."""
    recipe = config.recipe
    facts = Facts(config.seed, sum(len(corpus) for corpus in corpora), recipe.global_batch, tuple(recipe.views.sizes))
    if not labelled:
        return facts
    rates, known = _frequencies(corpora, labels, config.seed)
    return facts._replace(labels=tuple(labels), rates=rates, known=known, exclusive=exclusive(corpora, labels))


def exclusive(corpora: Sequence[Corpus], labels: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Sets of classes of which exactly one holds: those of multi-class datasets, unless another dataset has one of them by itself, or
    not all of them are among the labels."""
    whole = [corpus for corpus in corpora if corpus.card.kind == "multiclass" and set(corpus.labels) <= set(labels)]
    found = {tuple(labels.index(name) for name in corpus.labels) for corpus in whole}
    others = [{labels.index(name) for name in corpus.labels if name in labels} for corpus in corpora]
    return tuple(sorted(group for group in found if all(not other & set(group) or other == set(group) for other in others)))


def _frequencies(corpora: Sequence[Corpus], labels: Sequence[str], seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    parts = []
    for corpus in corpora:
        resolve = Targets(corpus.card, labels, training=True, seed=seed)
        parts.append(resolve([record.labels for record in corpus.records()], corpus.keys()))
    target_NL, mask_NL = (np.concatenate(of_corpora) for of_corpora in zip(*parts, strict=True))
    rates = (target_NL * mask_NL).sum(axis=0) / np.maximum(mask_NL.sum(axis=0), 1)
    return tuple(rates.tolist()), tuple(mask_NL.mean(axis=0).tolist())
