"""What stands already in OUT: packed datasets and pretrained encoders, found by their digests and keys.

Everything that runs a study, plans one or goes on with one asks here first.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from base import storage
from base.errors import RequestError
from base.paths import safe_name
from cluster import plan
from cluster.claims import architecture_of
from cluster.plan import Packed, Weights
from cluster.study import PretrainEntry, Study
from pretrain.run import PretrainConfig

if TYPE_CHECKING:
    from shards.pack import ShardJob


def done(url: str) -> bool:
    """True when the work whose folder this is has its result."""
    return storage.exists(storage.join(url, "result.json"))


def finished(url: str) -> set[str]:
    """The names of the folders below `url` whose work has its result; of a store one listing, whatever their number."""
    return set(storage.holding(url, "result.json"))


def encoders(out: str) -> list[tuple[str, str]]:
    """Of every finished pretraining: the folder of its encoder, and its health."""
    runs = [storage.join(out, "pretrain", name) for name in storage.listing(storage.join(out, "pretrain"))]
    return [(storage.join(run, "export"), storage.read_json(storage.join(run, "result.json"))["health"]) for run in runs if done(run)]


def standing_corpora(study: Study) -> dict[str, Packed]:
    """The datasets whose shards are complete already and were packed from the very raw files that the study names.

    Raises:
        RequestError: shards or raw files that the study names are not there, or the raw files are not as their card says.
    """
    found = {name: standing_corpus(study, name, jobs_of(study, name)) for name in study.data}
    return {name: corpus for name, corpus in found.items() if corpus}


def jobs_of(study: Study, name: str) -> "list[ShardJob]":
    """The shards that the raw files of a dataset make; none where it comes packed. Raises RequestError for what is wrong with them."""
    from shards import pack

    entry = study.data[name]
    return pack.plan(study.card(name), entry.raw, split_files=entry.split_files) if entry.raw else []


def standing_corpus(study: Study, name: str, jobs: "Sequence[ShardJob]") -> Packed | None:
    """A dataset that is packed from these raw files, or comes packed; None where it is still to be.

    Raises:
        RequestError: shards that the study names are not there, or are another dataset's.
    """
    from shards import manifest
    from shards.pack import made_of

    entry, url = study.data[name], shards_url(study, name)
    stands = storage.exists(storage.join(url, manifest.MANIFEST))
    if entry.shards and not stands:
        hint = f"allograft pack {entry.card or name} RAW --out {url}"
        raise RequestError("no packed dataset here", where=f"data.{name}.shards = {url}", hint=hint)
    read = manifest.read(url) if stands else None
    if read and read.dataset != name:
        raise RequestError(f"these shards are {read.dataset}, not {name}", where=f"data.{name}.shards = {url}")
    return Packed(url, read) if read and (entry.shards or made_of(jobs, url)) else None


def shards_url(study: Study, dataset: str) -> str:
    """Where a dataset's shards are, or will be."""
    return study.data[dataset].shards or storage.join(study.out, "shards", dataset)


def pretrainings(study: Study, corpora: Mapping[str, Packed]) -> list[tuple[PretrainEntry, int, PretrainConfig | None, Weights | None]]:
    """Every run and seed in the order of the study: its configuration, None while what it starts from is not there, and its encoder,
    None while it is not finished."""
    from cluster.sources import read_weights

    made: dict[str, list[Weights]] = {}
    found: list[tuple[PretrainEntry, int, PretrainConfig | None, Weights | None]] = []
    for entry in study.pretrain:
        for seed in entry.seeds:
            outside = entry.start_from != "random" and not entry.start_from.startswith("pretrain:")
            start = standing_source(entry.start_from, study.out) if outside else start_of(entry.start_from, seed, made, study, "")
            known = start is not None or entry.start_from == "random"
            config = plan.pretrain_config(study, entry, seed, corpora, start) if known else None
            weights = read_weights(storage.join(config.out, "export"), seed) if config and done(config.out) else None
            if weights:
                made.setdefault(entry.name, []).append(weights)
            found.append((entry, seed, config, weights))
    return found


def standing_weights(study: Study, corpora: Mapping[str, Packed]) -> tuple[dict[str, list[Weights]], list[str]]:
    """Weights by the names that cells give their sources, see `foreseen`, and the names of the runs that are missing, each as often as
    seeds of it are. Fetches nothing."""
    made: dict[str, list[Weights]] = {}
    missing: list[str] = []
    for entry, _, _, weights in pretrainings(study, corpora):
        if weights:
            made.setdefault(entry.name, []).append(weights)
        else:
            missing.append(entry.name)
    return foreseen(study, made, standing_sources(study)), missing


def outside_sources(study: Study) -> list[str]:
    """Where pretrainings and cells take weights from outside of the study, each once."""
    used = [entry.start_from for entry in study.pretrain] + [source.source for source in (study.cells.sources if study.cells else [])]
    return [source for source in dict.fromkeys(used) if source != "random" and not source.startswith("pretrain:")]


def standing_sources(study: Study) -> dict[str, Weights]:
    """Those of them that are here already."""
    found = {source: standing_source(source, study.out) for source in outside_sources(study)}
    return {source: weights for source, weights in found.items() if weights}


def standing_source(source: str, out: str) -> Weights | None:
    """Weights from outside that are here: kept by the study, converted on this machine, or an export at a path or URL.

    Raises:
        RequestError: no export at that path or URL.
    """
    from cluster.published import place_of
    from cluster.sources import external, read_weights

    kind = source.partition(":")[0]
    places = [storage.join(out, "sources", safe_name(source))] + ([place_of(source)] if kind in {"timm", "zoo"} else [])
    if kind not in {"timm", "zoo", "models", "run"}:
        return external(source, out, "")
    return next((read_weights(place) for place in places if storage.exists(storage.join(place, "allograft.json"))), None)


def start_of(source: str, seed: int, made: dict[str, list[Weights]], study: Study, uri: str) -> Weights | None:
    """The weights that a pretraining starts from; None for random ones, and while an earlier run that it needs is not made."""
    from cluster.sources import external

    if source == "random":
        return None
    if not source.startswith("pretrain:"):
        return external(source, study.out, uri)
    group = made.get(source.removeprefix("pretrain:"), [])
    before = next(entry for entry in study.pretrain if source == f"pretrain:{entry.name}")
    return next((found for found in group if found.seed == start_seed(before, seed)), None)


def start_seed(before: PretrainEntry, seed: int) -> int:
    """The seed of the earlier run that a run of this seed starts from: a chain follows its seed, a single earlier run serves all seeds."""
    return seed if seed in before.seeds else before.seeds[0]


def foreseen(study: Study, made: Mapping[str, Sequence[Weights]], outside: Mapping[str, Weights]) -> dict[str, list[Weights]]:
    """Weights by the names that the cells give their sources; those that are not there yet with what is known of them.

    Args:
        made: by the name of the pretraining.
        outside: by source, those from outside of the study.
    """
    found: dict[str, list[Weights]] = {}
    for source in study.cells.sources if study.cells else []:
        entry = next((entry for entry in study.pretrain if source.source == f"pretrain:{entry.name}"), None)
        if entry is not None:
            held = {one.seed: one for one in made.get(entry.name, ())}
            found[source.name] = [
                held.get(seed) or Weights("", "", architecture_of_run(study, entry, outside), seed) for seed in entry.seeds
            ]
        elif source.source != "random":
            found[source.name] = [outside.get(source.source) or Weights("", "", architecture_of(study, source.source) or "")]
    return found


def architecture_of_run(study: Study, entry: PretrainEntry, outside: Mapping[str, Weights]) -> str:
    """Of a pretraining, by the study or by the weights that its chain begins with; empty while neither says it."""
    start = outside.get(study.first(entry).start_from)
    return architecture_of(study, f"pretrain:{entry.name}") or (start.architecture if start else "")
