"""PostgreSQL, accounts and the MLflow UI: the study of tests/shared.py, seen through the services that it ran on."""

import json
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest
from browser import CHROMIUM, Browser
from services import Services, database_password, postgres
from shared import OUT, Studied

from base import storage
from base.errors import RequestError
from cluster.mlflow_store import require_server

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.mark.skipif(postgres() is None, reason="needs PostgreSQL: apt-get install postgresql")
def test_runs_and_accounts_are_in_postgresql(as_user: Services, studied: Studied) -> None:
    services = as_user

    def asked(query: str) -> str:
        programs = postgres()
        assert programs
        reach = ["--host", "127.0.0.1", "--port", str(services.ports["postgres"]), "--username", "mlflow", "mlflow"]
        environment = {**services.environment, "PGPASSWORD": database_password(services)}
        command: list[str | Path] = [programs / "psql", *reach, "--no-align", "--tuples-only", "--command", query]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()

    tag = "select count(distinct value) from tags where key = 'allograft.key' and value in"
    keys = storage.listing(f"{OUT}/cells")
    assert len(keys) == 6
    assert asked(f"{tag} ({', '.join(map(repr, keys))})") == "6"
    assert asked("select username from users where is_admin") == "admin"
    assert services.environment["MLFLOW_TRACKING_PASSWORD"] not in asked("select password_hash from users")


@pytest.mark.parametrize(
    "path", ["/", "/api/2.0/mlflow/experiments/get?experiment_id=0", "/ajax-api/2.0/mlflow/experiments/get?experiment_id=0"]
)
def test_nothing_is_shown_without_a_login(services: Services, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{services.tracking}{path}")
    assert refused.value.code == 401


def test_a_study_is_not_begun_without_a_login_that_the_server_knows(as_user: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    require_server(as_user.tracking)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another")
    with pytest.raises(RequestError, match="MLFLOW_TRACKING_USERNAME"):
        require_server(as_user.tracking)
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    with pytest.raises(RequestError, match="MLFLOW_TRACKING_USERNAME"):
        require_server(as_user.tracking)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_runs_are_listed_and_compared_in_the_browser(as_user: Services, studied: Studied, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    services = as_user
    experiment = MlflowClient(tracking_uri=services.tracking).get_experiment_by_name("tiny").experiment_id
    runs = MlflowClient(tracking_uri=services.tracking).search_runs([experiment])
    cells = [run for run in runs if run.data.tags.get("allograft.kind") == "cell"]
    compared = quote(json.dumps([run.info.run_id for run in cells[:2]])), quote(json.dumps([experiment]))
    with Browser() as browser:
        page = browser.open(
            f"{services.tracking}/#/experiments/{experiment}/runs?viewStateShareKey=cells",
            ("admin", services.environment["MLFLOW_TRACKING_PASSWORD"]),
        )
        page.width(1600, 1000)
        shown = page.shows(cells[0].info.run_name)
        page.screenshot(tmp_path / "runs.png")
        assert all(run.info.run_name in shown for run in cells)
        page.goto(f"{services.tracking}/#/compare-runs?runs={compared[0]}&experiments={compared[1]}")
        shown = page.shows("test_auroc_mean")
        page.screenshot(tmp_path / "compared.png")
        assert all(run.info.run_name in shown for run in cells[:2])
        assert page.logins >= 1
        assert len(page.requests) > 10
        assert [url for url in page.requests if not url.startswith((f"{services.tracking}/", "data:"))] == []  # nobody else is told of it
        # The browser's warnings are among them; those of MLflow's table about its own age are nobody's error.
        assert [error for error in page.errors if not error.startswith("AG Grid: ")] == []
