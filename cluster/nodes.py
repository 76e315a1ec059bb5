"""A study as a graph: what each piece of its work waits for, and what it holds of the cluster.

    making = Making(study, uri, progress, events)
    making.run()                                      # inside a session of Ray
    making.searches, making.fanned, making.failed()

Datasets are packed side by side. A pretraining starts when its data are packed and held against the test images of every task, and when
the run that it starts from stands; cells of a source when it stands and their task's data are packed and compared. Pretrainings hold their
workers' share of the cluster; packing, comparing and cells work on what these leave.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from cluster import leakage, plan, stages
from cluster.cells import CellStage, Fanned, Feed, write_plan
from cluster.events import Events
from cluster.fit import fit
from cluster.graph import NOT_TRIED, Graph, Node
from cluster.places import of_pretraining
from cluster.plan import Packed, Weights
from cluster.progress import Progress
from cluster.searches import Searches
from cluster.sources import external
from cluster.standing import foreseen, outside_sources, standing_sources, start_seed
from cluster.study import PretrainEntry, SourceEntry, Study
from finetune.task import load_task

CELLS = "cells"


class Making:
    """The graph of a study, and what its nodes hand on to each other."""

    def __init__(self, study: Study, uri: str, progress: Progress, events: Events, lost: Callable[[], bool] = lambda: False) -> None:
        """lost: whether another driver has taken over, so that nothing may be written any more."""
        import ray

        self.lost = lost
        self.study, self.uri, self.progress, self.events = study, uri, progress, events
        self.graph = Graph(lambda: {what: size for what, size in ray.cluster_resources().items() if what in ("CPU", "GPU")})
        self.feed = Feed()
        self.searches = Searches(plan.settings(study, {}, foreseen(study, {}, standing_sources(study))))
        self._restarts: list[int] = []  # of workers, by pretraining
        self._prepared: dict[str, Any] = {}
        self._preparing = threading.Lock()
        self._add()

    @property
    def fanned(self) -> Fanned:
        """What became of the cells."""
        found: Fanned = self.graph.results.get(CELLS, Fanned())
        return found

    @property
    def restarts(self) -> int:
        """How often workers of pretrainings were started again."""
        return sum(self._restarts)

    def run(self) -> None:
        """Until everything is done or has failed.

        Raises:
            RequestError: what a node found wrong with the request.
        """
        ended = False
        write_plan(self.study.out, self.searches, ended)  # a report of a study that goes on says what is missing
        try:
            self.graph.run()
            ended = True
        finally:  # also where a finding ends the study
            if not self.lost():
                leakage.summarise(self.study, self._packed())
                write_plan(self.study.out, self.searches, ended)

    def failed(self) -> dict[str, str]:
        """Reasons by piece of work."""
        reasons = {name: str(error) for name, error in self.graph.failed.items()}
        for name, lost in self.graph.skipped.items():
            if not name.startswith(("leakage ", "fit ")):  # on the way to what a person asked for, which is skipped too
                reasons[name] = f"{NOT_TRIED}: {lost} failed"
        return reasons | self.fanned.failed

    # -- the nodes

    def _add(self) -> None:
        study, add, matrix = self.study, self.graph.add, self.study.cells
        for name in study.data:
            add(Node(f"pack {name}", partial(self._act, f"pack {name}", partial(self._pack, name)), shares=("CPU",)))
        compared = leakage.by_corpus(study)
        for (name, split), tests in compared.items():
            label = _leakage(name, split)
            packs = tuple(dict.fromkeys(f"pack {one}" for one in (name, *tests)))
            add(Node(label, partial(self._act, label, partial(self._compare, (name, split))), needs=packs, shares=("CPU",)))
        for source in outside_sources(study):
            add(Node(f"source {source}", partial(external, source, study.out, self.uri)))
        for entry in study.pretrain:
            read = list(dict.fromkeys([*entry.data.items(), *study.earlier(entry)]))
            needs = tuple(dict.fromkeys([f"pack {name}" for name, _ in read] + [_leakage(*pair) for pair in read if pair in compared]))
            add(Node(f"fit {entry.name}", partial(self._fit, entry), needs=needs))  # of a chain's end before its beginning has trained
            for seed in entry.seeds:
                label = stages.pretrain_label(entry, seed)
                act = partial(self._act, label, partial(self._pretrain, entry, seed))
                holds = of_pretraining(study.resources)
                add(Node(label, act, needs=(*needs, *self._start(entry, seed)), holds=holds))
        if matrix is not None:
            feeders = tuple(label for task in matrix.tasks for source in matrix.sources for label in self._add_feeders(task, source))
            add(Node("last cells", partial(self.feed.waiting.put, None), after=feeders))
            add(Node(CELLS, partial(self._act, CELLS, self._cells), once=feeders, shares=("CPU", "GPU")))
            if study.analyses:
                add(Node("analyses", self._analyse, after=(CELLS,)))

    def _add_feeders(self, task: str, source: SourceEntry) -> list[str]:
        """The nodes that hand the settings of a task and a source to the pool of cells, one for each of its encoders."""
        matrix = self.study.cells
        assert matrix is not None
        dataset, found = load_task(task, matrix.task_settings.get(task, {})).dataset, []
        for run, seed in self._runs(source.source):
            needs = [_leakage(dataset, "train"), *run]
            if source.source == "random" and not matrix.architectures:
                needs += self._outside()  # weights from outside bring the architectures that random ones take
            if source.source != "random" and self._outside():
                # What weights from outside have seen may be a corpus of this study, under another name.
                needs += [_leakage(*pair) for pair in leakage.by_corpus(self.study)]
            found.append(f"cells of {task} {source.name}" + (f" seed {seed}" if len(self._runs(source.source)) > 1 else ""))
            self.graph.add(Node(found[-1], partial(self._feed, task, source, seed), needs=tuple(dict.fromkeys(needs))))
        return found

    def _start(self, entry: PretrainEntry, seed: int) -> tuple[str, ...]:
        """The nodes of what a run starts from."""
        if entry.start_from == "random":
            return ()
        if not entry.start_from.startswith("pretrain:"):
            return (f"source {entry.start_from}",)
        before = self.study.before(entry)[-1]
        return (stages.pretrain_label(before, start_seed(before, seed)),)

    def _runs(self, source: str) -> list[tuple[list[str], int]]:
        """The nodes that make each encoder of a source of cells, and its seed."""
        if source == "random":
            return [([], 0)]
        entry = next((entry for entry in self.study.pretrain if source == f"pretrain:{entry.name}"), None)
        return [([stages.pretrain_label(entry, seed)], seed) for seed in entry.seeds] if entry else [([f"source {source}"], 0)]

    def _outside(self) -> list[str]:
        """The nodes of weights from outside of the study."""
        return [name for name in self.graph.names if name.startswith("source ")]

    # -- what they do

    def _act(self, label: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        finally:
            self.progress.gone(label)

    def _room(self) -> float:
        return self.graph.left().get("CPU", 1.0)

    def _pack(self, name: str) -> Packed:
        packed = stages.pack(self.study, name, self.progress, self.events, self._room, self.graph.check)
        for line in plan.one_class(self.study, name, packed):
            self.progress.say(line)
        return packed

    def _compare(self, corpus: tuple[str, str]) -> None:
        leakage.compare_one(self.study, self._packed(), corpus, self._tests, self.progress, self.events, self._room, self.graph.check)

    def _tests(self, test: str) -> Any:
        """The test images of a dataset, made ready once for all corpora, whose nodes ask at the same time."""
        with self._preparing:
            if test not in self._prepared:
                self._prepared[test] = leakage.prepared(self._packed()[test])
            return self._prepared[test]

    def _packed(self) -> dict[str, Packed]:
        """Datasets that are packed, as they were packed."""
        results = dict(self.graph.results)
        return {name: results[f"pack {name}"] for name in self.study.data if f"pack {name}" in results}

    def _corpora(self, read: Sequence[tuple[str, str]]) -> dict[str, Packed]:
        """Datasets as they are trained on; all of those in `read` are compared."""
        return leakage.trained_on(self.study, self._packed(), {name for name, _ in read})

    def _fit(self, entry: PretrainEntry) -> dict[str, Packed]:
        corpora = self._corpora([*entry.data.items(), *self.study.earlier(entry)])
        fit(self.study, entry, corpora)
        return corpora

    def _pretrain(self, entry: PretrainEntry, seed: int) -> Weights:
        corpora = self._fit(entry)
        before = [self.graph.results[name] for name in self._start(entry, seed)]
        config = plan.pretrain_config(self.study, entry, seed, corpora, before[0] if before else None)
        weights, restarts = stages.pretrain(self.study, config, stages.pretrain_label(entry, seed), self.progress, self.events)
        self._restarts.append(restarts)
        return weights

    def _feed(self, task: str, source: SourceEntry, seed: int) -> None:
        """The settings of a task and an encoder, now that it and the data stand."""
        results = dict(self.graph.results)
        made = {
            entry.name: [results[label] for seed in entry.seeds if (label := stages.pretrain_label(entry, seed)) in results]
            for entry in self.study.pretrain
        }
        outside = {name.removeprefix("source "): found for name, found in results.items() if name.startswith("source ")}
        weights = foreseen(self.study, made, outside)
        if source.name in weights:
            weights[source.name] = [one for one in weights[source.name] if one.seed == seed]
        corpora = leakage.trained_on(self.study, self._packed())
        found = plan.settings(self.study, corpora, weights, only=(task, source.name))
        self.feed.waiting.put(list(found))

    def _cells(self) -> Fanned:
        graph = self.graph
        fanned = CellStage(self.study, self.searches, self.feed, self.progress, self.events, graph.check).run(graph.reserved)
        write_plan(self.study.out, self.searches)
        return fanned

    def _analyse(self) -> None:
        from cluster.analyses import run_analyses

        run_analyses(self.study, self.progress, self.events)


def _leakage(dataset: str, split: str) -> str:
    return f"leakage {dataset} {split}"
