"""Pieces of work of a study: pack a dataset, pretrain a run. Each skips what stands, says what it does, leaves an event.

They are put together in cluster.nodes, with that of cluster.cells. All run on Ray, and several at a time, each in a thread of the driver.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from base import storage
from base.errors import WorkError, in_a_line
from cluster import quarantine
from cluster.events import Events
from cluster.plan import Packed, Weights
from cluster.progress import Progress, minutes
from cluster.standing import done, shards_url
from cluster.study import PretrainEntry, Study
from pretrain.run import PretrainConfig

if TYPE_CHECKING:
    from cluster.pack import Packing

Processors = Callable[[], float]  # that a stage may use at a time
StillOn = Callable[[], None]  # raises where the study has ended meanwhile


def refuse_other_secrets(study: Study) -> None:
    """Raises RequestError where shards of another secret stand for any dataset: before one of them is packed."""
    from shards.pack import refuse_another_secret

    for name, entry in study.data.items():
        if entry.raw is not None:
            refuse_another_secret(study.card(name), shards_url(study, name))


def pack(study: Study, name: str, progress: Progress, events: Events, room: Processors, check: StillOn) -> Packed:
    """A dataset packed, or kept where its shards are those of the raw files.

    Raises:
        RequestError: the raw files are not as the card says, shards of another secret stand, or a patient has images in two splits.
        WorkError: no usable image in a split, or storage failed.
    """
    from cluster.leakage import refuse_shared_patients
    from cluster.pack import pack_on_ray
    from shards import manifest

    entry, url = study.data[name], shards_url(study, name)
    if entry.raw is None:
        corpus = Packed(url, manifest.read(url))
    else:

        def show(so_far: "Packing") -> None:
            check()
            progress.line(f"pack {name}: {so_far.line()}", of=f"pack {name}")

        made, packing = pack_on_ray(study.card(name), entry.raw, url, show, entry.split_files, room)
        corpus = Packed(url, made)
        counts = ", ".join(f"{split} {count:,}" for split, count in made.counts.items())
        quarantined = f", {made.quarantined} quarantined (see {url}/quarantine.jsonl)" if made.quarantined else ""
        progress.say(f"pack {name}: {counts}{quarantined}; {packing.summary()}")
        events.add("packed", dataset=name, digest=made.digest, quarantined=made.quarantined)
    refuse_shared_patients({name: corpus})
    return corpus


def pretrain_label(entry: PretrainEntry, seed: int) -> str:
    """What a run is called on the screen, and as a node."""
    return f"pretrain {entry.name}" + (f" seed {seed}" if len(entry.seeds) > 1 else "")


def pretrain(study: Study, config: PretrainConfig, label: str, progress: Progress, events: Events) -> tuple[Weights, int]:
    """A run to its end, or as far as it stands; returns its encoder, and how often its workers were restarted.

    Raises:
        WorkError: it failed for good.
    """
    from cluster.pretraining import pretrain_on_ray
    from cluster.sources import read_weights
    from engine.checkpoint import find_newest, newest_step

    restarts = 0
    if done(config.out):
        progress.say(f"{label}: stands already")
    else:
        began = time.monotonic()
        checkpoints = storage.join(config.out, "checkpoints")
        if newest_step(checkpoints):
            found = find_newest(checkpoints)
            for why in found.refused if found else ():
                progress.say(f"{label}: passes over the checkpoint {why}")
            progress.say(f"{label}: " + (f"goes on from step {found.step}" if found else "begins again, none of its checkpoints is whole"))
        told = {"name": config.name, "seed": config.seed, "key": config.key}
        events.add("pretraining", **told)
        try:
            with progress.follow(storage.join(config.out, "metrics.jsonl"), label):
                result = pretrain_on_ray(config, study.resources)
        except (WorkError, OSError) as error:
            events.add("pretraining failed", **told, reason=error.what if isinstance(error, WorkError) else in_a_line(error))
            raise
        finally:  # a run that fails for too many damaged samples says most here
            unread = [row for row in quarantine.merge(study.out) if config.out.endswith(f"/{row['pretraining']}")]
            if unread:
                progress.say(f"{label}: {len(unread)} samples could not be read (see {study.out}/{quarantine.FILE})")
        restarts = result["restarts"]
        died = f", finished after {restarts} restart(s) of its workers" if restarts else ""
        took = minutes(time.monotonic() - began)
        progress.say(f"{label}: {result['steps']} steps, {result['img_per_s']:.0f} img/s, {result['health']}, {took}{died}")
        for slow in result["stragglers"]:
            progress.say(f"{label}: {slow}")
        events.add("pretrained", **told, restarts=restarts)
    return read_weights(storage.join(config.out, "export"), config.seed), restarts
