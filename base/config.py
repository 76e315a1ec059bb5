"""Strict configuration: YAML and `key=value` settings checked by one pydantic model, with errors that name file and key.

study = load("studies/demo.yaml", Study, ["cells.seeds=[0]"])
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AllowInfNan, BaseModel, ConfigDict, ValidationError, WithJsonSchema

from base import storage
from base.errors import RequestError
from base.problems import problems

# A float that need not be finite, for which JSON has no number: of models with ser_json_inf_nan="strings".
Number = Annotated[float, AllowInfNan(True), WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]})]

# Where a key is cut: at its dots, but for those of a file's name (`data.../cards/mine.yaml.raw`), which may have one before its suffix.
KEY_CUT = re.compile(r"(?<![./])\.(?!ya?ml(?:[./]|$))")


class Strict(BaseModel):
    """Frozen; an unknown key is an error, and so is a number that is not finite. Every file format of the project is a subclass."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


def check_range(name: str, low_high: tuple[float, float], most: float = 1.0) -> None:
    """Raises ValueError for what is not 0 < low <= high <= most."""
    low, high = low_high
    if not 0 < low <= high <= most:
        raise ValueError(f"{name} must be 0 < low <= high <= {most:g}, got {low:g}, {high:g}")


M = TypeVar("M", bound=BaseModel)
Settings = Sequence[str] | Mapping[str, Any]  # `key=value` texts as typed, or dotted keys with values as in a study file


def load(path: str | Path, model: type[M], overrides: Settings = ()) -> M:
    """Read a YAML file, apply `key=value` settings (OmegaConf dot-list) and check it.

    Raises:
        RequestError: no such file, not YAML, a malformed setting, or anything that the model refuses.
    """
    return parse(load_tree(path, overrides), model, str(path))


def read(url: str, model: type[M]) -> M:
    """A YAML file that Allograft wrote, at a path or URL.

    Raises:
        FileNotFoundError: there is none.
        RequestError: another version wrote it.
    """
    return parse(storage.read_yaml(url), model, url)


def load_tree(path: str | Path, overrides: Settings = ()) -> dict[str, Any]:
    """The YAML file with its settings applied, as plain data, before any model has seen it."""
    import yaml

    try:
        text = Path(path).read_text()
    except FileNotFoundError as error:
        raise RequestError("no such file", where=str(path)) from error
    except IsADirectoryError as error:
        raise RequestError("this is a folder, not a file", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise RequestError("not UTF-8 text", where=str(path)) from error
    try:
        loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's reads in a tenth of the time
        _refuse_doubled_keys(yaml.compose(text, Loader=loader), str(path))
        tree = yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RequestError(f"not YAML: {getattr(error, 'problem', error)}", where=f"{path}{line}") from error
    if not isinstance(tree, dict):
        raise RequestError("expected a mapping of keys to values", where=str(path))
    return apply(tree, overrides)


def _refuse_doubled_keys(node: Any, path: str) -> None:
    # YAML keeps the last of two equal keys and says nothing.
    import yaml

    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise RequestError(f"the key '{key.value}' stands twice", where=f"{path}:{key.start_mark.line + 1}")
        for _, value in node.value:
            _refuse_doubled_keys(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_doubled_keys(item, path)


def apply(tree: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The tree with settings applied; a list entry is addressed by its number or its `name`.

    A typed `key=value` replaces what stood at the key. Settings that come as a mapping reach below it: `{recipe: {epochs: 3}}` says what
    `{recipe.epochs: 3}` says, and the recipe's other keys stay.
    """
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            if isinstance(value, Mapping) and value:
                apply(tree, {f"{key}.{inner}": item for inner, item in value.items()})
            else:
                assign(tree, key, value)
        return tree
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for setting in settings:
        key, equals, text_value = setting.partition("=")
        if not equals or not key:
            raise RequestError(f"'{setting}' is not a setting", hint="settings are key=value, for instance cells.seeds=[0,1]")
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text_value}"]))["value"]  # type: ignore[index, call-overload]
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise RequestError(f"cannot read the value '{text_value}'", where=f"setting {key}") from error
        assign(tree, key, value)
    return tree


def assign(tree: dict[str, Any], key: str, value: object) -> None:
    """Set `tree.a.b = value`, making mappings on the way."""
    # OmegaConf.update cannot address a list entry by name; `pretrain.simclr.seeds` is what people type.
    *parents, last = KEY_CUT.split(key)
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = _entry(node, part, ".".join(parents[: depth + 1]))
            continue
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict | list):
            raise RequestError("has no keys below it", where=f"setting {'.'.join(parents[: depth + 1])}")
    if isinstance(node, list):
        _entry(node, last, key)
        node[next(i for i, item in enumerate(node) if str(i) == last or _name(item) == last)] = value
    else:
        node[last] = value


def _name(item: object) -> str | None:
    return item.get("name") if isinstance(item, dict) else None


def _entry(items: list[Any], part: str, where: str) -> Any:
    for i, item in enumerate(items):
        if str(i) == part or _name(item) == part:
            return item
    names = [str(_name(item) or i) for i, item in enumerate(items)]
    raise RequestError(f"no entry '{part}'", where=f"setting {where}", hint=f"entries: {', '.join(names)}")


def parse(data: Any, model: type[M], where: str) -> M:
    """Check plain data against a model; every problem is reported at once, each with its key.

    Raises:
        RequestError: with the file, the keys, and the nearest right name of an unknown key.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = problems(error, model, data)
    raise RequestError("; ".join(found), where=where)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. Models are dumped by alias."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", by_alias=True)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def to_yaml(value: BaseModel) -> str:
    """The resolved configuration as it is written beside results."""
    import yaml

    return yaml.safe_dump(value.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)
