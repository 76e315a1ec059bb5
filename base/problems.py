"""What a model refuses, in sentences of this project: the key as the file has it, what is wrong, the nearest right key or value.

problems(error, Study, data)     # ["cells.fractions.0: 1.5 is more than 1", "unknown key 'cells.sedes', did you mean 'cells.seeds'?"]

Where a value may have several forms (`list | dict`) pydantic tells what each of them lacks, and names the form within the place. Here the
form that was meant speaks alone: the one whose kind is right.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from base.errors import nearest

Key = tuple[str | int, ...]
KINDS = {  # by the first word of pydantic's name for an error of kind
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "dict": "a mapping of keys to values",
    "mapping": "a mapping of keys to values",
    "model": "a mapping of keys to values",
    "none": "nothing",
}
LIMITS = {
    "greater_than": "{got} is not more than {gt:g}",
    "greater_than_equal": "{got} is less than {ge:g}",
    "less_than": "{got} is not less than {lt:g}",
    "less_than_equal": "{got} is more than {le:g}",
    "multiple_of": "{got} is not a multiple of {multiple_of:g}",
    "string_too_short": "{got} has fewer letters than {min_length}",
    "string_too_long": "{got} has more letters than {max_length}",
}
SHOWN = 80  # letters of a value that is repeated
STEP = 0.1  # of likeness that a key loses for each step between its place and that of the wrong one
ALIKE = 0.5  # least likeness of what is proposed
WANTED = "wanted"  # a type of our own: no form of the value is right, and the message says which there are


class _Found(NamedTuple):
    """A problem at a key. forms: where pydantic names a form of the value, how much of the key stands before it, and the name."""

    key: Key
    forms: tuple[tuple[int, str], ...]
    detail: ErrorDetails

    @property
    def root(self) -> Key:
        """The key of the first value that may have several forms."""
        return self.key[: self.forms[0][0]]


def problems(error: ValidationError, model: type[BaseModel], data: Any) -> list[str]:
    """Every problem that was found in the data, each with its key."""
    return [_sentence(one, model) for one in _settled([_found(detail, model, data) for detail in error.errors()])]


# -- places


def _found(detail: ErrorDetails, model: type[BaseModel], data: Any) -> _Found:
    key: list[str | int] = []
    forms: list[tuple[int, str]] = []
    for at, part in enumerate(detail["loc"], 1):
        there, data = _below_data(data, part)
        absent = detail["type"] == "missing" and at == len(detail["loc"])  # a key, though it is not in the data
        if not there and not absent and (part == "[key]" or len(_members_at(model, key)) > 1):
            forms.append((len(key), str(part)))
        else:
            key.append(part)
    return _Found(tuple(key), tuple(forms), detail)


def _below_data(data: Any, part: str | int) -> tuple[bool, Any]:
    """Whether that key or place is in the data, and what is there; what is there now where it is not."""
    if isinstance(data, Mapping) and part in data:
        return True, data[part]
    if isinstance(data, list | tuple) and isinstance(part, int) and part < len(data):
        return True, data[part]
    return False, data


def _members(annotation: Any) -> list[Any]:
    """The types of which a value may be."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [member for one in get_args(annotation) if one is not NoneType for member in _members(one)]
    return [annotation]


def _members_at(model: Any, key: Sequence[str | int]) -> list[Any]:
    """The types of which the value at that key may be."""
    here = _members(model)
    for part in key:
        here = [member for one in here for below in _below(one, part) for member in _members(below)]
    return here


def _below(annotation: Any, part: str | int) -> list[Any]:
    origin, args = get_origin(annotation), get_args(annotation)
    if isinstance(origin, type) and args:
        if issubclass(origin, Mapping):
            return [args[1]]
        return [one for one in args if one is not Ellipsis] if issubclass(origin, Collection) and isinstance(part, int) else []
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [field.annotation for name, field in annotation.model_fields.items() if part in (name, field.alias)]
    return []


def _paths(annotation: Any, above: tuple[type, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key below a type; NAME stands for a name of the user's own, N for the number of an entry."""
    for member in _members(annotation):
        origin, args = get_origin(member), get_args(member)
        if isinstance(origin, type) and args and issubclass(origin, Collection):
            name, inner = ("NAME", args[1]) if issubclass(origin, Mapping) else ("N", args[0])
            yield from ((name, *rest) for rest in _paths(inner, above))
        elif isinstance(member, type) and issubclass(member, BaseModel) and member not in above:
            for plain, field in member.model_fields.items():
                own = field.alias or plain
                yield (own,)
                yield from ((own, *rest) for rest in _paths(field.annotation, (*above, member)))


def _likeliest(model: type[BaseModel], key: Key) -> str | None:
    """The key that was meant: by its last name, and by how near it stands. None where none is alike."""
    *parents, wrong = key
    found = []
    for up in range(len(parents) + 1):
        above = parents[: len(parents) - up]
        for path in (path for member in _members_at(model, above) for path in _paths(member)):
            like = SequenceMatcher(None, str(wrong), path[-1]).ratio() - STEP * (up + len(path) - 1)
            found.append((like, ".".join(map(str, [*above, *path]))))
    like, name = max(found, key=lambda one: one[0], default=(0.0, ""))
    return name if like >= ALIKE else None


# -- forms of a value


def _settled(found: list[_Found]) -> list[_Found]:
    """Of each value that may have several forms the problems of the one that was meant."""
    values: dict[Key | int, list[_Found]] = {}
    for i, one in enumerate(found):
        values.setdefault(one.root if one.forms else i, []).append(one)
    return [problem for held in values.values() for problem in (_of_value(held) if held[0].forms else held)]


def _of_value(found: list[_Found]) -> list[_Found]:
    root = found[0].root
    by_form: dict[str, list[_Found]] = {}
    for one in found:
        by_form.setdefault(one.forms[0][1], []).append(one._replace(forms=one.forms[1:]))
    forms = [_settled(held) for held in by_form.values()]
    if right := [held for held in forms if not any(one.key == root and _of_kind(one.detail) for one in held)]:
        return min(right, key=len)
    wanted = " or ".join(dict.fromkeys(_expected(one.detail) for held in forms for one in held if one.key == root))
    return [_Found(root, (), {**found[0].detail, "type": WANTED, "msg": wanted})]


# -- sentences


def _of_kind(detail: ErrorDetails) -> bool:
    """Whether the value is of another kind than the form."""
    kind = detail["type"]
    return kind in ("literal_error", "string_pattern_mismatch", WANTED) or (kind not in LIMITS and kind.partition("_")[0] in KINDS)


def _expected(detail: ErrorDetails) -> str:
    if detail["type"] == WANTED:
        return detail["msg"]
    if detail["type"] == "literal_error":
        return str(detail["ctx"]["expected"])
    if detail["type"] == "string_pattern_mismatch":
        return f"text of the pattern {detail['ctx']['pattern']}"
    return KINDS[detail["type"].partition("_")[0]]


def _sentence(one: _Found, model: type[BaseModel]) -> str:
    key = ".".join(map(str, one.key))
    if one.detail["type"] == "extra_forbidden":
        close = _likeliest(model, one.key)
        return f"unknown key '{key}'" + (f", did you mean '{close}'?" if close else "")
    if one.detail["type"] == "missing":
        return f"missing key '{key}'"
    return ": ".join(filter(None, (key, _what(one.detail))))


def _what(detail: ErrorDetails) -> str:
    kind, value = detail["type"], detail["input"]
    try:
        got = json.dumps(value, default=str, ensure_ascii=False)
    except TypeError:  # a key that is a date, which YAML has
        got = str(value)
    if _of_kind(detail):
        known = re.findall(r"'([^']+)'", _expected(detail))
        close = nearest(value, known) if isinstance(value, str) else None
        return (
            f"expected {_expected(detail)}"
            + (f", got {got}" if len(got) <= SHOWN else "")
            + (f", did you mean '{close}'?" if close else "")
        )
    if kind in LIMITS:
        return LIMITS[kind].format(got=got, **detail["ctx"])
    if kind in ("too_short", "too_long"):
        bound = f"at least {detail['ctx']['min_length']}" if kind == "too_short" else f"at most {detail['ctx']['max_length']}"
        return f"has {len(value)} {'entry' if len(value) == 1 else 'entries'}, {bound} are wanted" if value else "is empty"
    return re.sub(r"^(Value error, |Input should be )", lambda found: "" if found[0].startswith("Value") else "expected ", detail["msg"])
