"""Figures and tables of the report on MLflow's runs: there, comparable by run, and the same when they come again."""

from pathlib import Path

from made_study import SHA, make

from analysis import report as reports
from analysis.evidence import gather
from analysis.replicates import Bootstrap
from analysis.results import finished
from cluster.mlflow_store import connect
from cluster.showcase import show


def test_figures_and_tables_stand_once_on_the_study_and_on_its_encoders(tmp_path: Path) -> None:
    out = make(tmp_path / "out", {"random": 0.0, "simclr": 0.7}, seeds=2, images=60)
    reports.report(str(out), gather(str(out), Bootstrap(100)))
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("made", artifact_location=f"{tmp_path}/artifacts")
    parent, encoder = (client.create_run(experiment).info.run_id for _ in range(2))
    for _ in range(2):
        show(client, str(out), parent, {SHA["simclr"]: encoder, "f" * 64: encoder}, {cell.key: cell.result for cell in finished(str(out))})
    figures = [file.path for file in client.list_artifacts(parent, "figures")]
    assert "figures/forest0.svg" in figures
    assert {file.path for file in client.list_artifacts(parent, "tables")} == {"tables/results.json", "tables/comparisons.json"}
    both = client.load_table(experiment, "tables/results.json", extra_columns=["run_id"])
    assert both.groupby("run_id").size().to_dict() == {parent: 4, encoder: 2}
    assert set(both.loc[both["run_id"] == encoder, "source"]) == {"simclr"}
    comparisons = client.load_table(experiment, "tables/comparisons.json")
    assert comparisons["a"].tolist() == ["simclr"]
