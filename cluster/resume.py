"""`allograft pretrain --resume RUN`: a pretraining goes on as it was begun, from its newest checkpoint, with the study around it."""

import posixpath
from collections.abc import Sequence

from base import storage
from base.config import read
from base.errors import RequestError
from base.paths import absolute
from cluster import leakage, plan
from cluster.outs import FILE, study_at
from cluster.plan import Weights
from cluster.standing import standing_corpora
from cluster.study import Study
from pretrain.run import PretrainConfig, differing


def resumed(run: str, words: Sequence[str]) -> Study:
    """The study of a run's folder (`OUT/pretrain/<name>-<key>`), once it is sure that running it continues that run.

    Args:
        words: the other words of the command; a resumed run takes none.

    Raises:
        RequestError: settings, among them start_from; no run there; or the study or this version would begin another run.
    """
    url = absolute(run)
    if words:
        new = any(word.startswith("start_from=") for word in words)
        what = "--resume goes on with a run, start_from begins a new one" if new else "a resumed run goes on as it was begun"
        hint = f"a new run from its weights: start_from={url}/export, without --resume"
        raise RequestError(f"{what}: '{words[0]}' cannot be given", where="--resume", hint=hint)
    if not storage.exists(storage.join(url, "config.yaml")):
        raise RequestError("no pretraining here (no config.yaml)", where=url, hint="the folder OUT/pretrain/NAME-KEY of a run")
    held = read(storage.join(url, "config.yaml"), PretrainConfig)
    out = posixpath.dirname(posixpath.dirname(url))
    study, where = study_at(out), storage.join(out, FILE)
    entries = [entry for entry in study.pretrain if entry.name == held.name and held.seed in entry.seeds]
    corpora = standing_corpora(study)
    checked = leakage.standing(study, corpora) if set(corpora) == set(study.data) else None
    if not entries or checked is None:
        raise RequestError(f"the study does not ask for '{held.name}' seed {held.seed} of these data any more", where=where)
    start = None
    if held.start_from and held.start_from_sha256:
        start = Weights(url=held.start_from, sha256=held.start_from_sha256, architecture=held.architecture)
    now = plan.pretrain_config(study, entries[0], held.seed, checked, start)
    if now.key != held.key:
        keys = ", ".join(differing(held.model_dump(mode="json"), now.model_dump(mode="json"))) or "the version of pretraining"
        raise RequestError(f"it would be another run: {keys} changed", where=url, hint=f"allograft run {where} begins that one")
    return study
