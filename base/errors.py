"""Errors that reach a user: one line that says what is wrong, where (file and key), and what to type next."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class AllograftError(Exception):
    """Base of the errors that the command line prints without a traceback.

    Args:
        what: what is wrong, in one sentence without a final full stop.
        where: file and key, for instance `study.yaml: cells.tasks[0]`.
        hint: the next command to type, or the nearest right name.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__(what, where, hint)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f" ({self.hint})" if self.hint else ""
        return f"{place}{self.what}{advice}"

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process borders (Ray); the keyword arguments would be lost by the default.
        return _rebuild, (type(self), self.what, self.where, self.hint)


def _rebuild(kind: type[AllograftError], what: str, where: str | None, hint: str | None) -> AllograftError:
    return kind(what, where=where, hint=hint)


class RequestError(AllograftError):
    """The request is wrong; nothing was started. Exit code 2."""

    exit_code = 2


class WorkError(AllograftError):
    """The request was fine and the work failed. Exit code 1."""

    exit_code = 1


@contextmanager
def at(where: str) -> Iterator[None]:
    """Requests refused inside name this place too, `study.yaml: cells.tasks[0]`, before the file and key that they name themselves."""
    try:
        yield
    except RequestError as error:
        if error.where and error.where.startswith(where):
            raise
        place = ": ".join(part for part in (where, error.where) if part)
        raise RequestError(error.what, where=place, hint=error.hint) from error


class Diverged(WorkError):
    """A training's loss or output is not finite: the same command would end there again."""


def in_a_line(error: BaseException) -> str:
    """An error that is none of ours, short: its kind and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name most like `name`, or None when none is close."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return found[0] if found else None


def unknown(kind: str, name: str, names: Iterable[str], where: str | None = None) -> RequestError:
    """The error for a name that is not in the list, with the nearest right one."""
    known = sorted(names)
    close = nearest(name, known)
    hint = f"did you mean '{close}'?" if close else f"known: {', '.join(known)}" if known else "there is none"
    return RequestError(f"unknown {kind} '{name}'", where=where, hint=hint)
