"""Claims in the plan, in the diary and on the screen.

register_claims(study, events)                a driver writes down every claim that is new, before anything runs
register_family(study, rows, events)          and every comparison of its plan that is
Asked(study).setting(setting)                 whether the study has cells of a setting of its matrix
show(outs)                                    `allograft claims OUT...`: the ledger of each study
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from analysis.claims import load_claim, settings_of
from base import storage
from base.config import canonical_json
from base.errors import RequestError
from base.paths import absolute, names
from cluster.events import Events
from cluster.outs import require_study
from cluster.screen import table
from cluster.study import Study
from finetune.task import Task, load_task

if TYPE_CHECKING:
    from analysis.ledger import Entry
    from cluster.plan import Setting


JUDGED = "Holds: after Holm's correction over the claims. Fails: by the claim's own 95 % interval, uncorrected."

# -- before the run


def axes(source: str, architecture: str, strategy: dict[str, Any], task: Task, fraction: float, resolution: int) -> dict[str, Any]:
    """A setting as claims see it: as analysis.ledger.axes_of sees its finished cells."""
    from finetune.search import asked
    from finetune.strategies import resolve

    options = {name: value for name, value in asked(strategy)[1].items() if name != "name"}
    whole = {"name": strategy["name"], **resolve(asked(strategy)[1])[1].model_dump(mode="json"), **options}
    kind = "segmentation" if task.kind == "segmentation" else "classification"
    held = {"source": source, "architecture": architecture, "strategy": whole, "task": task.task, "kind": kind}
    return {**held, "fraction": float(fraction), "resolution": resolution}


def axes_of_matrix(study: Study) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every setting of a matrix, told from the study file alone, and its strategy as the file has it. Weights that do not say here of which
    architecture they are may be of any that the study names."""
    matrix = study.cells
    assert matrix is not None
    own = list(dict.fromkeys(found for entry in study.pretrain if (found := study.architecture_of(entry))))
    drawn = matrix.architectures or own
    for name in matrix.tasks:
        task = load_task(name, matrix.task_settings.get(name, {}))
        for source, strategy, fraction, resolution in itertools.product(
            matrix.sources, matrix.strategies, matrix.of_task("fractions", name), matrix.of_task("resolutions", name)
        ):
            known = architecture_of(study, source.source)
            for architecture in [known] if known else drawn:
                yield axes(source.name, architecture, strategy, task, fraction, resolution), strategy


def architecture_of(study: Study, source: str) -> str | None:
    """Of a source that says it by its name: a pretraining of the study, timm's or published weights; None of others, and of random ones."""
    from encoders.published import load_zoo

    kind, _, name = source.partition(":")
    if kind == "pretrain":
        entry = next(entry for entry in study.pretrain if entry.name == name)
        return study.architecture_of(entry) or architecture_of(study, study.first(entry).start_from)
    if kind == "timm":
        return name.partition(".")[0]
    return load_zoo(name).architecture if kind == "zoo" else None


class Asked:
    """Which settings of its matrix a study has cells of: with `asked_by: claims` those of a claim both of whose sides are in the matrix."""

    def __init__(self, study: Study) -> None:
        matrix = study.cells
        assert matrix is not None
        self.all = matrix.asked_by == "matrix"
        if self.all:
            return
        found = list(axes_of_matrix(study))
        seen = [(i, held) for i, (held, _) in enumerate(found)]
        kept = {i for claim in study.claims for _, a, b in settings_of(claim, seen) for i in (*a, *b)}
        self.settings = {canonical_json(found[i][0]) for i in kept}
        self.strategies = {(found[i][0]["task"], found[i][0]["architecture"], canonical_json(found[i][1])) for i in kept}

    def strategy(self, task: str, architecture: str, strategy: dict[str, Any]) -> bool:
        """Whether there are cells of a task, an architecture and a strategy as the study has it."""
        return self.all or (task, architecture, canonical_json(strategy)) in self.strategies

    def setting(self, setting: "Setting") -> bool:
        """Whether a setting has cells."""
        if self.all:
            return True
        of = (setting.source, setting.architecture, setting.strategy, setting.task, setting.fraction, setting.resolution)
        return canonical_json(axes(*of)) in self.settings


def register_claims(study: Study, events: Events) -> None:
    """An event for every claim that is not in the diary, with the number of settings whose results stand on both sides already.

    A claim that says something else than before is another claim, whatever its name.
    """
    from analysis import results
    from analysis.family import registrations
    from analysis.ledger import axes_of

    known = registrations(study.out)
    new = [claim for claim in study.claims if claim.sha256 not in known]
    if not new:
        return
    seen = [(cell, axes_of(cell)) for cell in results.finished(study.out) if not cell.shuffled]
    for claim in new:
        events.add("claim", claim=claim.name, sha256=claim.sha256, standing=len(settings_of(claim, seen)))


def register_family(study: Study, rows: Iterable[Mapping[str, Any]], events: Events) -> None:
    """One event for the comparisons of a plan (analysis.family.pairs_of) that are not in the diary, by their two sources, with the
    settings, and of these the ones in which results stand on both sides already and those with one seed on a side (which are written down
    again when they have several). Where nothing was ever registered, what an earlier version planned is first.

    rows: of plan.json, as it will be written.
    """
    from analysis import results
    from analysis.family import family_of, in_settings, planned_family

    tree, known = results.read_study(study.out), family_of(study.out)
    asked, before = results.without_controls(rows), results.expected(study.out)
    first = {} if known else planned_family(tree, before)
    planned = first | planned_family(tree, asked)
    new = {}
    for name, held in planned.items():
        before_it = known.get(name) or known.get(("", *name[1:]))
        if before_it is None or held.several > before_it.several:
            new[name] = held
    if not new:
        return
    stand = set(storage.holding(storage.join(study.out, "cells"), "result.json"))
    # Cells that an earlier plan had by their keys, where this one does not know them yet.
    sides = [in_settings(held, tree) for held in (asked, before)]
    done = {(*where, source) for one in sides for where, by in one.items() for source, (_, keys) in by.items() if stand.intersection(keys)}
    pairs: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for name, (kind, a, b, several) in new.items():
        architecture, rest = name[:2]
        pair: dict[str, Any] = {"architecture": architecture, "kind": kind, "a": a, "b": b, "settings": [], "standing": [], "single": []}
        pair = pairs.setdefault((architecture, kind, a, b), pair)
        pair["settings"].append(rest)
        pair["single"] += [] if several else [rest]
        stands = name not in first and {(architecture, rest, a), (architecture, rest, b)} <= done
        pair["standing"] += [rest] if stands else []
    events.add("family", pairs=list(pairs.values()))


# -- on the screen


def show(outs: Sequence[str]) -> None:
    """Print the ledger of each study; without one, the ready claims and how they are run.

    Raises:
        RequestError: no study there, or one without claims.
    """
    if not outs:
        ready()
        return
    for i, out in enumerate(outs):
        url = require_study(absolute(out), "allograft claims --run")
        if i:
            print()
        _study(url)


def ready() -> None:
    """The claims of studies/claims, and what they are tested by."""
    held = [load_claim(name) for name in names("claim")]
    table([(claim.name, claim.about, claim.sentence, claim.paper or "") for claim in held], ("claim", "about", "sentence", "from"))
    print(
        f"\n{len(held)} claims. On phantoms: allograft claims --run. On your data: allograft claims --run preset=radiographs data...=PATH"
    )


def _study(url: str) -> None:
    from analysis.evidence import gather

    with gather(url) as evidence:
        if not evidence.ledger and not evidence.withdrawn:
            raise RequestError("this study makes no claims", where=url, hint="claims: [...] in its file, before it runs")
        counts = f"{len(evidence.ledger)} claims in their settings, {len(evidence.cells)} of {evidence.asked} cells"
        print(f"{evidence.study.get('study')}: {counts}")
        header = ("claim", "verdict", "a - b", "why", "it would take", "about", "in", "compared")
        table([row(entry) for entry in evidence.ledger], header)
        print(f"\n{JUDGED}")
        if evidence.withdrawn:
            print(f"\nwithdrawn or changed since the study first ran: {', '.join(evidence.withdrawn)}")


def row(entry: "Entry") -> tuple[str, ...]:
    """A line of the ledger."""
    sides = entry.claim.comparison
    verdict = entry.verdict + (", direction only" if entry.direction_only else "")
    verdict += f" so far, {entry.missing} cell{'s' * (entry.missing > 1)} missing" if entry.missing else ""
    verdict += ", added after the results" if entry.late else ""
    compared = f"{sides.a.words()} against {sides.b.words()}: {entry.claim.expect}, margin {entry.claim.margin:g}"
    return entry.claim.name, verdict, entry.effect(), entry.why, entry.needs() or "-", entry.about, entry.where(), compared
