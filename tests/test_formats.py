"""Files that a study leaves and others read: their schemas, and one of each as it was written when its format was fixed."""

import json
import os

import pytest
from pydantic import BaseModel

from analysis.compared import Check, Summary
from analysis.comparisons import Kept
from analysis.planned import Plan
from base import storage
from base.config import parse
from base.paths import ROOT
from encoders.export import ExportInfo
from engine.saved import Commit, State
from shards.overlaps import Register

FORMATS: dict[str, tuple[type[BaseModel], str]] = {
    "plan": (Plan, "plan.json"),
    "leakage": (Check, "leakage.json"),
    "leakage_summary": (Summary, "leakage_summary.json"),
    "overlaps": (Register, "overlaps.yaml"),
    "export": (ExportInfo, "allograft.json"),
    "checkpoint_state": (State, "checkpoint_state.json"),
    "checkpoint_commit": (Commit, "checkpoint_commit.json"),
    "comparisons": (Kept, "comparisons.json"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_json_schema_is_committed(name: str) -> None:
    """To change a format: raise its `schema`; ALLOGRAFT_UPDATE_GOLDEN=1 rewrites the file."""
    schema = json.dumps(FORMATS[name][0].model_json_schema(by_alias=True), indent=1, allow_nan=False) + "\n"
    path = ROOT / "docs" / "schemas" / f"{name}.json"
    if os.environ.get("ALLOGRAFT_UPDATE_GOLDEN"):
        path.write_text(schema)
    assert path.read_text() == schema


@pytest.mark.parametrize("name", FORMATS)
def test_golden_files_still_read(name: str) -> None:
    model, file = FORMATS[name]
    text = (ROOT / "tests" / "golden" / file).read_bytes()
    held = json.loads(text) if file.endswith(".json") else storage.from_yaml(text)
    assert json.loads(parse(held, model, file).model_dump_json(by_alias=True)) == held
