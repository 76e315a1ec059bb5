"""`allograft pretrain --resume RUN`: a pretraining goes on as it was begun, by its own configuration, from its newest checkpoint."""

import posixpath
from collections.abc import Sequence

from base import storage
from base.config import read
from base.errors import RequestError
from base.paths import absolute
from cluster.outs import study_at
from cluster.plan import pretrain_key
from cluster.standing import done, shards_url
from cluster.study import Study
from pretrain.run import DataRef, PretrainConfig


def resumed(run: str, words: Sequence[str]) -> tuple[Study, PretrainConfig]:
    """The configuration of a run's folder (`OUT/pretrain/<name>-<key>`), and the study around it, which may ask for other runs by now.

    Args:
        words: the other words of the command; a resumed run takes none.

    Raises:
        RequestError: settings, among them start_from; no run there; or one that has not finished and cannot go on: this version would
            compute another, or its shards are not there any more.
    """
    url = absolute(run)
    if words:
        new = any(word.startswith("start_from=") for word in words)
        what = "--resume goes on with a run, start_from begins a new one" if new else "a resumed run goes on as it was begun"
        hint = f"a new run from its weights: start_from={url}/export, without --resume"
        raise RequestError(f"{what}: '{words[0]}' cannot be given", where="--resume", hint=hint)
    if not storage.exists(storage.join(url, "config.yaml")):
        raise RequestError("no pretraining here (no config.yaml)", where=url, hint="the folder OUT/pretrain/NAME-KEY of a run")
    config = read(storage.join(url, "config.yaml"), PretrainConfig)
    study = study_at(posixpath.dirname(posixpath.dirname(url)))
    if done(url):
        return study, config
    if pretrain_key(config) != config.key:
        raise RequestError("another version of pretraining began it: this one would compute another run", where=url)
    # The folder may have been moved or copied, with the shards in it.
    data, earlier = ([_standing(study, ref) for ref in refs] for refs in (config.data, config.earlier))
    return study, config.model_copy(update={"out": url, "data": data, "earlier": earlier})


def _standing(study: Study, ref: DataRef) -> DataRef:
    """Where its shards are by now."""
    from shards import manifest

    places = [ref.shards, *([shards_url(study, ref.dataset)] if ref.dataset in study.data else [])]
    for url in places:
        if storage.exists(storage.join(url, manifest.MANIFEST)) and manifest.read(url).digest == ref.digest:
            return ref.model_copy(update={"shards": url})
    raise RequestError(f"the shards of '{ref.dataset}' that the run was begun with are not here", where=" and ".join(dict.fromkeys(places)))
