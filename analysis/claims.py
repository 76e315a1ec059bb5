"""Claims: sentences that a study was made to test, written into its file before it runs.

claim = Claim(name="small-data", sentence="...", about="encoders", comparison={"a": {"source": "imagenet"}, "b": {"source": "random"}},
              expect="greater", margin=0.02, where={"strategy": "full", "fraction": 0.1})

A claim is tested in every setting of the study in which both sides are planned and `where` holds; each is a row of the ledger and a member
of the family over which Holm's correction runs. Nothing here reads a result: see analysis.ledger.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from base.config import Strict, canonical_json, digest, load
from base.paths import named

T = TypeVar("T")
About = Literal["encoders", "methods"]
SETTING = ("source", "strategy", "architecture", "task", "fraction", "resolution")  # what sides share where they are not compared by it
PRETRAINING_SEEDS = 3  # under which nothing is said about methods


class Where(Strict):
    """Conditions on the axes of the matrix; an axis that is left out may be anything. A strategy is named with the options that matter."""

    source: str | None = None
    strategy: dict[str, Any] | None = None
    architecture: str | None = None
    task: str | None = None
    kind: Literal["classification", "segmentation"] | None = Field(None, description="of the task")
    fraction: float | None = Field(None, gt=0, le=1)
    resolution: int | None = None

    @field_validator("strategy", mode="before")
    @classmethod
    def _optioned(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def axes(self) -> frozenset[str]:
        """The axes that are conditioned on."""
        return frozenset(name for name in type(self).model_fields if getattr(self, name) is not None)

    def words(self) -> str:
        """`natural, truncated cut=layer3`."""
        parts = []
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, dict):
                value = " ".join([str(value.get("name", "")), *(f"{key}={item}" for key, item in value.items() if key != "name")])
            if name == "fraction" and value is not None:
                value = f"{value * 100:g} % of the labels"
            if name == "resolution" and value is not None:
                value = f"{value} px"
            if value is not None:
                parts.append(str(value))
        return ", ".join(parts)

    def holds(self, cell: dict[str, Any]) -> bool:
        """Whether a cell fulfils them; `cell` has every axis, `strategy` with all of its options. A kind that is not known (None) may be
        any: a family is rather too large than too small."""
        for name in self.axes:
            wanted, held = getattr(self, name), cell[name]
            if name == "kind" and held is None:
                continue
            if name == "strategy":
                if any(held.get(key) != value for key, value in wanted.items()):
                    return False
            elif wanted != held:
                return False
        return True


class Sides(Strict):
    """What is compared: a against b, and everything else alike."""

    a: Where
    b: Where

    @model_validator(mode="after")
    def _alike(self) -> Self:
        if self.a.axes != self.b.axes or not self.a.axes:
            raise ValueError("a and b name the same axes, at least one")
        if self.a == self.b:
            raise ValueError("a and b are the same")
        if {"task", "kind"} & self.a.axes:
            raise ValueError("results of two tasks are not compared: task and kind belong into where")
        return self


class Claim(Strict):
    """One sentence that results can contradict.

    margin: with greater and less the smallest difference that would be what the sentence says; with equivalent that under which two
    results count as the same. In the metric's own unit.
    outcome: metric, the task's headline on test images; convergence, the mean over training of how much of the way from chance to a
    level that both sides reach a run has gone on validation (1: all of it from the first evaluation on); its margin is such a share too.
    paper: where the sentence comes from.
    """

    schema_: Literal[1] = Field(1, alias="schema")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    sentence: str
    paper: str | None = None
    about: About
    comparison: Sides
    expect: Literal["greater", "less", "equivalent"]
    margin: float = Field(gt=0)
    where: Where = Where()
    outcome: Literal["metric", "convergence"] = "metric"

    @model_validator(mode="after")
    def _says_what_it_tests(self) -> Self:
        if shared := self.where.axes & self.comparison.a.axes:
            raise ValueError(f"where names what is compared: {', '.join(sorted(shared))}")
        if self.about == "encoders" and "method" in self.sentence.lower():
            raise ValueError("a claim about encoders does not speak of methods: say about: methods, which takes 3 pretraining seeds")
        return self

    @property
    def sha256(self) -> str:
        """What the claim says, but for its name and its paper: a sentence that is changed is another claim."""
        return digest(self.model_dump(mode="json", exclude={"name", "paper", "schema_"}))

    def side(self, cell: dict[str, Any]) -> Literal["a", "b"] | None:
        """On which side of the comparison a cell stands, if on any."""
        if not self.where.holds(cell):
            return None
        return "a" if self.comparison.a.holds(cell) else "b" if self.comparison.b.holds(cell) else None


def settings_of(claim: Claim, seen: Sequence[tuple[T, dict[str, Any]]]) -> list[tuple[dict[str, Any], list[T], list[T]]]:
    """The settings in which both sides of a claim are found: what is alike, what stands on side a, what on side b.

    Args:
        seen: anything, with its axes.
    """
    shared = [name for name in SETTING if name not in claim.comparison.a.axes]
    groups: dict[str, tuple[dict[str, Any], dict[str, list[T]]]] = {}
    for one, axes in seen:
        side = claim.side(axes)
        if side is not None:
            setting = {name: axes[name] for name in shared}
            groups.setdefault(canonical_json(setting), (setting, {"a": [], "b": []}))[1][side].append(one)
    return [(setting, sides["a"], sides["b"]) for setting, sides in groups.values() if sides["a"] and sides["b"]]


def load_claim(name: str) -> Claim:
    """A claim by its name in studies/claims, or by its path ending in .yaml.

    Raises:
        RequestError: no such claim, or a file that is none.
    """
    path = named("claim", name)
    return load(path, Claim)
