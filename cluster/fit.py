"""Whether pretraining runs fit their data: known from the manifests alone, so said before any worker starts.

fits(study, corpora)        # RequestError naming the run, or nothing
"""

from collections.abc import Mapping

from base.errors import RequestError, at
from cluster.plan import Packed, pretrain_data, pretrain_labels
from cluster.study import PretrainEntry, Study, as_in_study
from pretrain import methods
from pretrain.recipe import load_recipe
from shards.order import Order, Source
from shards.phantoms import parse_raw


def fits(study: Study, corpora: Mapping[str, Packed]) -> None:
    """Check every pretraining of a study whose datasets are packed. Raises RequestError as `fit` does."""
    for entry in study.pretrain:
        fit(study, entry, corpora)


def fit(study: Study, entry: PretrainEntry, corpora: Mapping[str, Packed]) -> None:
    """Check one pretraining.

    Raises:
        RequestError: options of a method that do not fit the number of images (prototypes, queues, negatives), a batch larger than an
            epoch, images smaller than the views.
    """
    with at(f"pretrain {entry.name}"), as_in_study(entry):
        _fit(study, entry, corpora)


def _fit(study: Study, entry: PretrainEntry, corpora: Mapping[str, Packed]) -> None:
    recipe = load_recipe(entry.recipe, entry.settings)
    kind = methods.method_class(recipe.method)
    refs = pretrain_data(study, entry, corpora)
    sizes = [corpora[ref.dataset].manifest.counts[ref.split] - len(ref.without) for ref in refs]
    cards = [corpora[ref.dataset].manifest.card for ref in refs]
    limited = pretrain_labels(entry, recipe.method, cards, "labels")
    labels = limited or list(dict.fromkeys(label for card in cards for label in card.labels))
    facts = methods.Facts(
        seed=entry.seeds[0],
        samples=sum(sizes),
        global_batch=recipe.global_batch,
        sizes=tuple(recipe.views.sizes),
        labels=tuple(labels) if kind.labelled else (),
    )
    methods.check(recipe.method, recipe.options, views=recipe.views, architecture=study.architecture_of(entry), facts=facts)
    sources = [Source(ref.digest, (size,)) for ref, size in zip(refs, sizes, strict=True)]
    Order(sources, seed=facts.seed, global_batch=recipe.global_batch, exact_epoch=kind.exact_epochs)
    wanted = max(recipe.views.sizes)
    for ref in refs:
        largest = _largest_side(study, ref.dataset, corpora[ref.dataset])
        if largest is not None and largest < wanted:
            raise RequestError(
                f"views of {wanted} px from images of '{ref.dataset}' that are at most {largest} px",
                where="recipe: views.size",
                hint=f"views.size={largest}, or larger images",
            )


def _largest_side(study: Study, dataset: str, corpus: Packed) -> int | None:
    """The side in pixels that no image of it exceeds, where that is known without reading one."""
    card, raw = corpus.manifest.card, study.data[dataset].raw
    if card.phantom is not None:
        return (parse_raw(raw).size or card.phantom.size) if raw else None
    return card.max_side
