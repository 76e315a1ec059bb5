"""`allograft analyze similarity` and `filters`: encoders opened, compared, tables and figures written, the main of it printed."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from analysis import filters as kernels
from analysis import layers, plots
from analysis.activations import Probe
from analysis.layers import Across, Names
from analysis.moments import Spatial
from analysis.similarity import MEASURES, Similarity
from base import storage
from base.errors import RequestError, unknown
from base.paths import absolute
from base.seeds import seed_of
from cluster.leaf import Leaf
from cluster.sources import no_export
from encoders.build import Encoder, build
from encoders.export import ExportInfo, read_export
from encoders.local import local_encoder
from encoders.truncate import truncate
from encoders.weights import load_into, load_local
from shards.manifest import read as read_manifest


def located(source: str) -> str:
    """The local folder of an exported encoder.

    Raises:
        RequestError: nothing there.
    """
    from cluster.published import obtain

    if source.partition(":")[0] in ("timm", "zoo"):
        return obtain(source)
    place = absolute(source)
    for folder in (place, storage.join(place, "encoder"), storage.join(place, "export")):
        if storage.exists(storage.join(folder, "allograft.json")):
            return local_encoder(folder)
    raise no_export(place)


def described(sources: Sequence[str]) -> list[ExportInfo | None]:
    """What each source says of itself; None of random weights."""
    infos = [None if _is_random(source) else read_export(located(source), verify=False) for source in sources]
    if all(info is None for info in infos):
        raise RequestError(
            "random weights of which architecture?", where=sources[0], hint="one of the two as an exported encoder or timm:TAG"
        )
    return infos


def _is_random(source: str) -> bool:
    return source == "random" or source.startswith("random:")


def opened(source: str, info: ExportInfo | None, like: ExportInfo, channels: int | None = None) -> Encoder:
    """The encoder, for images of that many channels (its own by default). Random weights get the architecture of `like`."""
    if info is None:
        seed = source.partition(":")[2] or "0"
        if not seed.isdigit():
            raise RequestError(f"'{seed}' is no seed", where=source, hint="random:0")
        drawn = seed_of("source", "random", int(seed))
        return placed(build(like.architecture, channels or like.in_chans, seed=drawn, image_size=like.image_size, widths=like.widths))
    folder = located(source)
    read_export(folder)  # hashes the tensors
    channels = channels or info.in_chans
    encoder = build(info.architecture, channels, *info.normalisation(channels), image_size=info.image_size, widths=info.widths)
    if info.cut is not None:
        encoder = truncate(encoder, info.cut, info.flat)
    load_into(encoder.net, load_local(folder))
    return placed(encoder)


def placed(encoder: Encoder) -> Encoder:
    """On the GPU where there is one: what follows is computed where the activations are."""
    return encoder.to("cuda" if torch.cuda.is_available() else "cpu")


def _named(sources: Sequence[str]) -> list[str]:
    """Short names, each once: the last part of a path that tells them apart."""
    parts = [source.rstrip("/").split("/") for source in sources]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({i})" for i, name in enumerate(names, 1)]


# -- similarity


def similarity(
    sources: Sequence[str],
    data: str,
    trained: Sequence[str],
    split: str,
    images: int,
    size: int | None,
    cuts: Sequence[str] | None,
    measure: str,
    spatial: str,
    energy: str,
    out: str,
) -> None:
    """`allograft analyze similarity`. Raises RequestError where what is asked does not fit together."""
    if measure not in MEASURES:
        raise unknown("measure", measure, MEASURES, "--measure")
    if spatial not in get_args(Spatial):
        raise unknown("treatment of maps", spatial, get_args(Spatial), "--spatial")
    if energy not in ("s", "s2"):
        raise unknown("energy", energy, ("s", "s2"), "--energy")
    how: dict[str, Any] = {"spatial": cast(Spatial, spatial), "energy": energy}
    folder, shards = absolute(out), absolute(data)
    if len(sources) == 1:
        from cluster.kept import of_study

        of_study(absolute(sources[0]), shards, split, images, size, measure, how, Leaf(folder))
        print(folder)
        return
    if len(sources) != 2 or len(trained) not in (0, 2):
        raise RequestError("two encoders, and none or both of them after training", hint="similarity A B --trained A2 --trained B2")
    every = [*sources, *trained]
    infos = described(every)
    like = next(info for info in infos if info is not None)
    channels = read_manifest(shards).card.channels
    names = _named(every)
    encoders = {name: opened(source, info, like, channels) for name, source, info in zip(names, every, infos, strict=True)}
    wanted: list[Names] = [(names[0], names[1])] if not trained else [(names[0], names[2]), (names[1], names[3])]
    probe = Probe(shards, split=split, images=images, size=size or like.image_size)
    found = layers.across(encoders, wanted, probe, cuts, **how)
    write(found, probe, measure, Leaf(folder), "")
    print(f"{found.images} images, probe {probe.sha256[:16]}: {folder}")


def write(found: Across, probe: Probe, measure: str, leaf: Leaf, setting: str) -> None:
    """Table and figures of a comparison, and its main numbers to the screen. setting: in words, for the figures' titles."""
    lines = {f"{a} to {b}": held for (a, b), held in found.pairs.items()}
    wide = max(5.0, 1.5 + 0.36 * len(found.cuts))
    shown = f"{found.images} images of {probe.corpus.manifest.dataset}"
    title = f"{setting}: {shown}" if setting else shown
    bodies = {label: [[cut, *_words(one, measure)] for cut, one in zip(found.cuts, held, strict=True)] for label, held in lines.items()}
    heads = ("cut", measure, "permuted", "gaussian", "area", "directions kept")
    rows = [[label, *row] for label, body in bodies.items() for row in body]
    leaf.table("similarity.csv", title, rows_of(found, probe), rows, ("pair", *heads))
    text = "; ".join(f"{label}: " + ", ".join(f"{row[0]} {row[1]} (permuted {row[2]})" for row in body) for label, body in bodies.items())
    leaf.draw("layers", title, f"{measure} by layer. {text}", partial(plots.layers, found.cuts, lines, measure, title), wide, 3.6)
    text = "; ".join(f"{label}: " + ", ".join(f"{row[0]} {row[4]}" for row in body) for label, body in bodies.items())
    text = f"Canonical correlations by layer beside those of permuted images; area between the two. {text}"
    leaf.draw("coefficients", title, text, partial(plots.coefficients, found.cuts, lines, title), wide, 0.8 + 1.9 * len(lines))
    for label, body in bodies.items():
        leaf.say(label)
        leaf.show(body, heads)
        leaf.say()
    few = [(cut, held[i].few) for held in lines.values() for i, cut in enumerate(found.cuts) if held[i].few]
    if few:
        note = f"{len(few)} without CCA ({', '.join(dict.fromkeys(cut for cut, _ in few))}): {few[0][1]}"
        leaf.notes.append(f"{setting}: {note}" if setting else note)
        leaf.say(note)
        leaf.say("more --images, or --measure cka_debiased, which needs fewer\n")


def _words(one: Similarity, measure: str) -> list[str]:
    dead = f", {one.dead[0]} and {one.dead[1]} dead" if any(one.dead) else ""
    kept = f"{one.kept[0]} and {one.kept[1]} of {one.channels[0]}{dead}"
    return [_number(one.values[measure]), _number(one.permuted[measure]), _number(one.gaussian[measure]), _number(one.area), kept]


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def rows_of(found: Across, probe: Probe) -> list[dict[str, Any]]:
    """A row a pair and cut: everything of a Similarity but its coefficients."""
    rows = []
    for (a, b), held in found.pairs.items():
        for cut, one in zip(found.cuts, held, strict=True):
            row: dict[str, Any] = {"a": a, "b": b, "cut": cut, "images": one.images, "rows": one.n}
            for name in ("channels", "dead", "duplicates", "rank", "kept"):
                row[f"{name}_a"], row[f"{name}_b"] = getattr(one, name)
            row |= one.values | {f"gaussian_{name}": value for name, value in one.gaussian.items()}
            row |= {f"permuted_{name}": value for name, value in one.permuted.items()}
            row |= {"area": one.area, "too_few": one.few or "", "threshold": one.threshold, "energy": one.energy}
            rows.append(row | {"probe_sha256": probe.sha256, "pixels_sha256": found.sha256})
    return rows


# -- filters


def filters(source: str, after: str | None, out: str) -> None:
    """`allograft analyze filters`."""
    every = [source] if after is None else [source, after]
    infos = described(every)
    like = next(info for info in infos if info is not None)
    last = infos[-1] or like  # a colour encoder is seen as the grey one that it became
    found = [kernels.first_filters(opened(name, info, like, last.in_chans).net) for name, info in zip(every, infos, strict=True)]
    folder = absolute(out)
    draw_filters(found, _named(every), Leaf(folder))
    print(f"\n{folder}")


def draw_filters(found: Sequence[NDArray[np.float64]], names: Sequence[str], leaf: Leaf) -> list[str]:
    """Table and figures of one encoder's first filters, or of two encoders', before and after. Returns its main numbers as words."""
    one, two = found[0], found[1] if len(found) > 1 else None
    rows = kernels.table(one, two)
    noise = kernels.gabor_noise(one.shape)
    frame = pd.DataFrame(rows)
    h, w = one.shape[2:]
    listed = [("filters", f"{len(rows)} of {one.shape[1]} x {h} x {w}")]
    if frame["gabor"].notna().any():
        listed.append((f"Gabor score, {names[0]}", _spread(frame["gabor"]) + f"; Gaussian noise under {noise:.2f}"))
    else:
        listed.append(("Gabor score", f"none: kernels of {h} x {w} have no room for a wave"))
    if two is not None:
        if frame["gabor_after"].notna().any():
            listed.append((f"Gabor score, {names[1]}", _spread(frame["gabor_after"])))
        listed.append(("movement, share of a filter's length", _spread(frame["movement"])))
        listed.append(("cosine between before and after", _spread(frame["cosine"])))
    said = "; ".join(f"{what}: {numbers}" for what, numbers in listed)
    notes = [f"{row['gabor']:.2f}" if math.isfinite(row["gabor"]) else "" for row in rows]
    if two is not None:
        notes = [f"{row['movement']:.2f}" for row in rows]
    shown, later = kernels.pictures(one, two)
    under = ": Gabor score under each" if any(notes) else ""
    what = f"{names[0]}{under}" if two is None else f"{names[0]} above {names[1]}: movement under each"
    leaf.table("filters.csv", what, [row | {"gabor_noise": noise} for row in rows])
    leaf.draw("filters", what, f"First-layer filters. {said}", *plots.gallery(shown, later, notes, what))
    if two is not None:
        title = f"{names[0]} to {names[1]}"
        drawn = partial(plots.movement, frame["movement"].to_numpy(), frame["gabor"].to_numpy(), noise, title)
        leaf.draw("movement", title, f"How far each first-layer filter moved. {said}", drawn, 6.4, 2.8)
    leaf.show(listed)
    return [numbers for _, numbers in listed]


def _spread(values: "pd.Series[float]") -> str:
    held = values.dropna()
    return f"median {held.median():.2f}, {held.min():.2f} to {held.max():.2f}" if len(held) else "-"
