"""Work that waits for other work and for its share of a cluster: everything that is ready runs at once, each node in a thread.

    graph = Graph(ray.cluster_resources)
    graph.add(Node("pack a", pack, shares=("CPU",)))
    graph.add(Node("train", train, needs=("pack a",), holds={"CPU": 2}))
    graph.run()
    graph.results["train"], graph.failed, graph.skipped

Nothing is kept here: a node finds by itself what of its work stands already, so a graph may be cut off anywhere and built again.
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from base.errors import WorkError, in_a_line

POLL_S = 2.0  # a cluster that has grown is seen so late
PATIENCE_S = 3.0  # for nodes that share to end, when the graph ends early
NOT_TRIED = "not tried"  # what is said of a node that needs one that failed
EXACT = 1e-6  # shares of a GPU do not add up to the last bit


@dataclass(frozen=True)
class Node:
    """A piece of work.

    needs: names of nodes whose results it takes; it starts when all are done, and never where one of them failed.
    after: names of nodes that must have ended, in whatever way.
    once: names of nodes of which one must be done, or all must have ended.
    holds: what it takes of the cluster while it runs; it starts when so much is free.
    shares: of which resources it uses what the others leave, see `Graph.left`; it looks often whether the graph has ended, see
        `Graph.check`.
    """

    name: str
    act: Callable[[], Any]
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    once: tuple[str, ...] = ()
    holds: Mapping[str, float] = field(default_factory=dict)
    shares: tuple[str, ...] = ()


class Stopped(Exception):
    """Ends a node whose graph has ended before it."""


class Graph:
    """Nodes in the order in which they were added: of two that are ready and do not fit together the earlier one starts.

    Args:
        total: what there is of each resource; asked again and again, since clusters grow and shrink.
    """

    def __init__(self, total: Callable[[], Mapping[str, float]]) -> None:
        self.total = total
        self.results: dict[str, Any] = {}  # by node, of those that are done
        self.failed: dict[str, WorkError] = {}
        self.skipped: dict[str, str] = {}  # the failed node that each of them, directly or not, waited for
        self._nodes: dict[str, Node] = {}
        self._running: dict[str, threading.Thread] = {}
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._seen: tuple[float, Mapping[str, float]] = (-POLL_S, {})
        self._ended: queue.SimpleQueue[tuple[str, Any, BaseException | None]] = queue.SimpleQueue()

    def add(self, node: Node) -> None:
        """What it waits for must have been added before it."""
        missing = [name for name in (*node.needs, *node.after, *node.once) if name not in self._nodes]
        if missing or node.name in self._nodes:
            raise ValueError(f"node '{node.name}': " + (f"no such node: {', '.join(missing)}" if missing else "added twice"))
        self._nodes[node.name] = node

    @property
    def names(self) -> list[str]:
        """Of the nodes, in their order."""
        return list(self._nodes)

    def run(self) -> None:
        """Until every node is done, has failed or waits for one that has.

        A WorkError or OSError is the failure of its node: the others go on. Anything else that a node raises ends the graph and is raised
        here.
        """
        try:
            while self._start():
                self._collect()
        finally:
            self._stop.set()
            until = time.monotonic() + PATIENCE_S
            for name, thread in self._running.items():
                if self._nodes[name].shares:
                    thread.join(max(0.0, until - time.monotonic()))

    def left(self) -> dict[str, float]:
        """What each running node that shares may use now: of what is left over by those that hold, and by those that are ready to and wait
        for room, an equal part with the others that share that resource."""
        with self._lock:
            taken = [node for other, node in self._nodes.items() if other in self._running or self._waits(node)]
            return {what: max(0.0, size - _sum(taken, what)) / _sharing(taken, what) for what, size in self._all().items()}

    def reserved(self) -> dict[str, float]:
        """The rest: what each of them has to leave to others."""
        left = self.left()
        return {what: size - left.get(what, 0.0) for what, size in self._all().items()}

    def check(self) -> None:
        """For nodes that work for long: raises Stopped once the graph has ended."""
        if self._stop.is_set():
            raise Stopped

    # -- the scheduler

    def _start(self) -> bool:
        """Start what can start; False when nothing runs and nothing ever will."""
        with self._lock:
            for node in self._nodes.values():
                if lost := next((name for name in node.needs if name in self.failed or name in self.skipped), None):
                    self.skipped.setdefault(node.name, self.skipped.get(lost, lost))
                elif self._ready(node) and self._fits(node):
                    thread = threading.Thread(target=self._work, args=(node,), name=node.name, daemon=True)
                    self._running[node.name] = thread
                    thread.start()
            return bool(self._running)

    def _ready(self, node: Node) -> bool:
        if node.name in self._running or self._has_ended(node.name):
            return False
        once = any(name in self.results for name in node.once) or all(map(self._has_ended, node.once))
        return once and all(map(self._has_ended, node.after)) and all(name in self.results for name in node.needs)

    def _has_ended(self, name: str) -> bool:
        return name in self.results or name in self.failed or name in self.skipped

    def _fits(self, node: Node) -> bool:
        holding = [self._nodes[name] for name in self._running if self._nodes[name].holds]
        total = self._all()
        # Alone it may ask for more than there is: clusters that grow do so for work that waits.
        return not holding or all(size + _sum(holding, what) <= total.get(what, 0.0) + EXACT for what, size in node.holds.items())

    def _all(self) -> Mapping[str, float]:
        # Asking a cluster takes milliseconds, and nodes that share ask before every piece of their work.
        if time.monotonic() - self._seen[0] >= POLL_S:
            self._seen = (time.monotonic(), self.total())
        return self._seen[1]

    def _waits(self, node: Node) -> bool:
        return bool(node.holds) and self._ready(node)

    def _work(self, node: Node) -> None:
        try:
            ended: tuple[str, Any, BaseException | None] = (node.name, node.act(), None)
        except BaseException as error:  # noqa: BLE001, raised by the scheduler
            ended = (node.name, None, error)
        self._ended.put(ended)

    def _collect(self) -> None:
        try:
            name, result, error = self._ended.get(timeout=POLL_S)
        except queue.Empty:
            return
        with self._lock:
            del self._running[name]
            if error is None:
                self.results[name] = result
            elif isinstance(error, WorkError):
                self.failed[name] = error
            elif isinstance(error, OSError):  # of a disk, a store or a network
                self.failed[name] = WorkError(in_a_line(error))
            else:
                raise error


def _sharing(nodes: list[Node], what: str) -> int:
    return max(1, sum(what in node.shares for node in nodes))


def _sum(nodes: list[Node], what: str) -> float:
    return sum(node.holds.get(what, 0.0) for node in nodes)
