"""What stands already in OUT: packed datasets and pretrained encoders, found by their digests and keys.

Everything that runs a study, plans one or goes on with one asks here first.
"""

from base import storage
from base.errors import RequestError
from cluster import plan
from cluster.plan import Corpus, Weights
from cluster.study import Study


def done(url: str) -> bool:
    """True when the work whose folder this is has its result."""
    return storage.exists(storage.join(url, "result.json"))


def encoders(out: str) -> list[tuple[str, str]]:
    """Of every finished pretraining: the folder of its encoder, and its health."""
    runs = [storage.join(out, "pretrain", name) for name in storage.listing(storage.join(out, "pretrain"))]
    return [(storage.join(run, "export"), storage.read_json(storage.join(run, "result.json"))["health"]) for run in runs if done(run)]


def standing_corpora(study: Study) -> dict[str, Corpus]:
    """The datasets whose shards are complete already and were packed from the very raw files that the study names.

    Raises:
        RequestError: shards or raw files that the study names are not there, or the raw files are not as their card says.
    """
    from shards import manifest, pack
    from shards.card import load_card

    found = {}
    for name, entry in study.data.items():
        url = shards_url(study, name)
        if entry.shards and not storage.exists(storage.join(url, manifest.MANIFEST)):
            hint = f"allograft pack {name} RAW --out {url}"
            raise RequestError("no packed dataset here", where=f"data.{name}.shards = {url}", hint=hint)
        jobs = pack.plan(load_card(name), entry.raw, split_files=entry.split_files) if entry.raw else []
        if storage.exists(storage.join(url, manifest.MANIFEST)):
            read = manifest.read(url)
            if entry.shards or read.raw_digest == jobs[0].origin.raw_digest:
                found[name] = Corpus(url, read)
    return found


def shards_url(study: Study, dataset: str) -> str:
    """Where a dataset's shards are, or will be."""
    return study.data[dataset].shards or storage.join(study.out, "shards", dataset)


def standing_weights(study: Study, corpora: dict[str, Corpus], uri: str) -> tuple[dict[str, list[Weights]], list[str]]:
    """The encoders that stand already, and the names of the runs that are missing."""
    from cluster.sources import read_weights

    made: dict[str, list[Weights]] = {}
    missing: list[str] = []
    for entry in study.pretrain:
        for seed in entry.seeds:
            start = start_of(entry.start_from, seed, made, study, uri)
            if start is None and entry.start_from != "random":
                missing.append(entry.name)
                continue
            config = plan.pretrain_config(study, entry, seed, corpora, start)
            if not done(config.out):
                missing.append(entry.name)
                continue
            made.setdefault(entry.name, []).append(read_weights(storage.join(config.out, "export"), seed))
    return by_source(study, made, uri, missing), missing


def start_of(source: str, seed: int, made: dict[str, list[Weights]], study: Study, uri: str) -> Weights | None:
    """The weights that a pretraining starts from; None for random ones, and while an earlier run that it needs is not made."""
    from cluster.sources import external

    if source == "random":
        return None
    if not source.startswith("pretrain:"):
        return external(source, study.out, uri)
    group = made.get(source.removeprefix("pretrain:"), [])
    # A chain follows its seed; a single earlier run serves all seeds.
    same = [found for found in group if found.seed == seed] or group[:1]
    return same[0] if same else None


def by_source(study: Study, made: dict[str, list[Weights]], uri: str, missing: list[str]) -> dict[str, list[Weights]]:
    """Weights by the names that the cells give their sources; those from outside are fetched once nothing is missing."""
    from cluster.sources import external

    found: dict[str, list[Weights]] = {}
    for source in study.cells.sources if study.cells else []:
        if source.source.startswith("pretrain:"):
            found[source.name] = made.get(source.source.removeprefix("pretrain:"), [])
        elif source.source != "random" and not missing:
            found[source.name] = [external(source.source, study.out, uri)]
    return found
