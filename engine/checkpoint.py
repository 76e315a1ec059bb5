"""The one checkpoint system: safetensors, JSON, and a COMMIT file of hashes written last, under any fsspec url.

    saver = Saver(url, keep=2)
    saver.save(Snapshot(step, model, optimizer, state, mine))               # every rank calls; written while training goes on
    saver.finish()                                                          # stands now
    found = find_newest(url)                                                # None, or the newest one whose hashes hold
    snapshot = load(found)

    <url>/step-00000120/  model.safetensors  optimizer.safetensors  ema.safetensors (when any)  rank<r>.safetensors  state.json  COMMIT

A folder without COMMIT is a save that was cut off: never read, removed by a later save. Nothing is ever unpickled. `model`, `optimizer` and
`ema` are whole, so they load at any number of ranks; `rank<r>` holds what belongs to one process (random state, queues) and is read back
only at the same number of ranks.
"""

import hashlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from base import storage
from base.errors import RequestError, WorkError
from base.paths import is_url
from engine import ranks
from engine.saved import STATE, Commit, RunState, State, read_commit, read_state

Tensors = dict[str, Tensor]
LONGEST_UPLOAD = 1800.0  # seconds that rank 0 waits for the others' files
AT_ONCE = 16  # ranks that are asked for: one after the other 512 of them would take half a minute


@dataclass
class Snapshot:
    """What a checkpoint holds. `state` is what is no tensor; `mine` is this rank's."""

    step: int
    model: Tensors
    optimizer: Tensors
    state: RunState
    mine: Tensors = field(default_factory=dict)
    ema: Tensors | None = None


@dataclass(frozen=True)
class Found:
    """A committed checkpoint. `refused` says why newer folders were passed over (for the log)."""

    url: str
    step: int
    refused: tuple[str, ...] = ()


class Saver:
    """Writes checkpoints of one run while it goes on. Every rank holds one.

    keep: how many of the newest stay. The one with the best `state.score` stays as well, and the newest whose `state.sound` is true: what
        a run that went wrong is taken back to.
    """

    def __init__(self, url: str, keep: int = 2) -> None:
        self.url, self.keep = url, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, snapshot: Snapshot) -> str:
        """Start to write the checkpoint of `snapshot.step`, after the last one stands; returns its url. Collective.

        The tensors must be copies: training goes on while they are written.

        Raises:
            WorkError: the last one could not be written; nothing that a later run would trust was left behind.
        """
        self.finish()
        place = storage.join(self.url, f"step-{snapshot.step:08d}")
        if ranks.rank() == 0:
            _uncommit(place)
        ranks.barrier()
        rank, world = ranks.rank(), ranks.world()
        self._thread = threading.Thread(target=self._write, args=(place, snapshot, rank, world), name=f"checkpoint {snapshot.step}")
        self._thread.start()
        return place

    def finish(self) -> None:
        """Wait until what was started stands. Raises as `save`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, place: str, snapshot: Snapshot, rank: int, world: int) -> None:
        # In a thread of its own, so without collectives: ranks meet by the files that say what each has written.
        try:
            _write_files(place, snapshot, rank, world)
            if rank == 0:
                _commit(place, snapshot, world)
                _prune(self.url, self.keep, snapshot.step)
        except BaseException as error:  # noqa: BLE001, handed to the run, which raises it
            self._error = error


def _write_files(place: str, snapshot: Snapshot, rank: int, world: int) -> None:
    with tempfile.TemporaryDirectory(prefix="allograft-save-") as folder:
        local = Path(folder)
        _write(local, f"rank{rank}", snapshot.mine)
        if rank == 0:
            _write(local, "model", snapshot.model)
            _write(local, "optimizer", snapshot.optimizer)
            if snapshot.ema is not None:
                _write(local, "ema", snapshot.ema)
            described = State(**{**dict(snapshot.state), "step": snapshot.step, "world_size": world})
            (local / STATE).write_text(described.model_dump_json(by_alias=True))
        hashes = {path.name: _sha256(path) for path in sorted(local.iterdir())}
        for name in hashes:
            storage.put_file(local / name, storage.join(place, name))
    storage.put(storage.join(place, f"rank{rank}.done"), json.dumps(hashes))


def _commit(place: str, snapshot: Snapshot, world: int) -> None:
    until = time.monotonic() + LONGEST_UPLOAD
    with ThreadPoolExecutor(min(world, AT_ONCE)) as pool:
        parts = list(pool.map(lambda rank: _part(place, rank, until), range(world)))
    hashes = {name: sha256 for part in parts for name, sha256 in part.items()}
    commit = Commit(step=snapshot.step, sha256=hashes, score=snapshot.state.score, sound=snapshot.state.sound)
    storage.put(storage.join(place, storage.COMMIT), json.dumps(commit.model_dump(by_alias=True), sort_keys=True))


def _part(place: str, rank: int, until: float) -> dict[str, str]:
    """The hashes of what a rank wrote, as soon as it has."""
    pause_s = 0.05
    while (told := storage.read_or_none(storage.join(place, f"rank{rank}.done"))) is None:
        if time.monotonic() > until:
            raise WorkError(f"rank {rank} has not written its part of the checkpoint in {LONGEST_UPLOAD:.0f} s", where=place)
        time.sleep(pause_s)
        pause_s = min(1.0, 2 * pause_s)
    return dict(json.loads(told))


def newest_step(url: str) -> int:
    """The step of the newest committed checkpoint; 0 without one."""
    return next((step for step, _, _ in _committed(url)), 0)


def newest_sound(url: str) -> str | None:
    """The newest committed checkpoint whose `state.sound` is true."""
    return next((place for _, place, commit in _committed(url) if commit.sound), None)


def find_newest(url: str) -> Found | None:
    """The newest checkpoint whose COMMIT stands and whose files have the hashes it names. Rank 0 looks; all ranks get its answer."""
    answer = _search(url) if ranks.rank() == 0 else None
    found = ranks.share([answer.url, answer.step, list(answer.refused)] if answer else None)
    return Found(found[0], found[1], tuple(found[2])) if found else None


def load(found: Found) -> Snapshot:
    """Read a checkpoint on this rank, tensors on the CPU. `mine` is empty when the number of ranks has changed.

    Raises:
        RequestError: another version wrote it.
    """
    with _here(found.url, of_rank=ranks.rank()) as local:
        state = read_state(str(local), found.url)
        mine = local / f"rank{ranks.rank()}.safetensors"
        same = state.world_size == ranks.world()
        ema = local / "ema.safetensors"
        return Snapshot(
            step=found.step,
            model=load_file(local / "model.safetensors"),
            optimizer=load_file(local / "optimizer.safetensors"),
            state=state,
            mine=load_file(mine) if same and mine.exists() else {},
            ema=load_file(ema) if ema.exists() else None,
        )


def random_state() -> Tensors:
    """Torch's random state of this process (numpy's and Python's global ones are used nowhere)."""
    state = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["rng.cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Tensors) -> None:
    """Inverse of `random_state`; absent entries leave the generator as it is."""
    if "rng.cpu" in state:
        torch.set_rng_state(state["rng.cpu"])
    if "rng.cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng.cuda"])


def _steps(url: str) -> list[tuple[int, str]]:
    names = [name for name in storage.listing(url) if name.startswith("step-") and name[5:].isdigit()]
    return sorted(((int(name[5:]), storage.join(url, name)) for name in names), reverse=True)


def _search(url: str) -> Found | None:
    refused: list[str] = []
    for step, place in _steps(url):
        problem = _problem(place)
        if problem is None:
            return Found(place, step, tuple(refused))
        refused.append(f"{place}: {problem}")
    return None


def _problem(place: str) -> str | None:
    """Why this folder must not be read, or None."""
    try:
        commit = read_commit(place)
    except RequestError as error:
        return f"unreadable COMMIT ({error.what})"
    if commit is None:
        return "not committed"
    with _here(place) as local:
        for name, expected in commit.sha256.items():
            if not (local / name).exists():
                return f"{name} is missing"
            if _sha256(local / name) != expected:
                return f"{name} does not have the committed hash"
    return None


def _uncommit(place: str) -> None:
    # COMMIT goes first, so that a removal cut short leaves nothing that looks whole.
    storage.remove(storage.join(place, storage.COMMIT))
    storage.remove(place)


def _committed(url: str) -> Iterator[tuple[int, str, Commit]]:
    """Step, place and COMMIT of those that can be read, the newest first."""
    for step, place in _steps(url):
        with suppress(RequestError):
            if (commit := read_commit(place)) is not None:
                yield step, place, commit


def _prune(url: str, keep: int, newest: int) -> None:
    # What lies above the newest was passed over when the run went on from below: damaged folders would take the place of whole ones.
    committed = [one for one in _committed(url) if one[0] <= newest]
    kept = {step for step, _, _ in committed[: max(1, keep)]}
    kept |= set([step for step, _, commit in committed if commit.sound][:1])
    scored = [(commit.score, step) for step, _, commit in committed if commit.score is not None]
    kept |= {max(scored)[1]} if scored else set()
    for step, place in _steps(url):
        if step not in kept:
            _uncommit(place)


@contextmanager
def _here(place: str, of_rank: int | None = None) -> Iterator[Path]:
    """The folder on the local disk: itself, or a copy, without what belongs to other ranks than `of_rank` where that is given."""
    if not is_url(place):
        yield Path(place)
        return
    folder = tempfile.mkdtemp(prefix="allograft-load-")
    try:
        for name in storage.listing(place):
            if of_rank is None or not name.startswith("rank") or name == f"rank{of_rank}.safetensors":
                storage.get_file(storage.join(place, name), Path(folder) / name)
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(local: Path, name: str, state: Tensors) -> None:
    try:
        save_file(state, local / f"{name}.safetensors")
    except (SafetensorError, OSError) as error:
        raise WorkError(f"cannot write the checkpoint: {error}", where=str(local), hint="free some space in TMPDIR") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
