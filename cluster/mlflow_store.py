"""The MLflow store of a study: its address, whether it answers, and a client of it.

uri = tracking_uri(study.out, study.tracking)
require_server(uri)                       # RequestError within seconds, without loading MLflow
client = connect(uri)
"""

import json
import os
from typing import Any
from urllib.parse import urlsplit

from base.errors import RequestError

# MLflow's defaults block for minutes when a server is away; nothing is lost here when a call fails, the next round repeats it.
SETTINGS = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the client would repeat what makes a run, too, and an answer that is late would make it two
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",  # it would tell of every table that it makes
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # a line for each run that ends, between those of the study
}
PATIENCE_S = 10.0
CREDENTIALS = "~/.mlflow/credentials"


def tracking_uri(out: str, tracking: str) -> str:
    """The MLflow address of a study: its embedded SQLite store, or the server it names."""
    return f"sqlite:///{out}/mlflow.db" if tracking == "sqlite" else tracking


def require_server(uri: str) -> None:
    """Ask a tracking server for its experiments, without loading MLflow, so that a wrong address costs seconds and not a study.

    Raises:
        RequestError: nothing answers there, it does not know the host name or the login it is asked by, or it is no MLflow server.
    """
    import urllib.error
    import urllib.request

    if not uri.startswith(("http://", "https://")):
        return
    if urlsplit(uri).username:
        hint = "export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where the driver runs"
        raise RequestError("the address of the MLflow server holds a login, which logs would show", where="tracking", hint=hint)
    address = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=_login()), timeout=PATIENCE_S) as reply:
            json.load(reply)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            if os.path.exists(os.path.expanduser(CREDENTIALS)) and not _login():  # which the client reads
                return
            hint = "export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where the driver runs"
            raise RequestError(f"the MLflow server at {uri} does not know this login (401)", where="tracking", hint=hint) from error
        if error.code == 403:
            hint = 'mlflow server --allowed-hosts "HOST:*", HOST as the address names it'
            raise RequestError(f"the MLflow server at {uri} refuses this address (403)", where="tracking", hint=hint) from error
        raise RequestError(f"no MLflow server at {uri} (status {error.code})", where="tracking", hint="mlflow server") from error
    except ValueError as error:
        raise RequestError(f"what answers at {uri} is no MLflow server", where="tracking", hint="mlflow server") from error
    except OSError as error:
        hint = "mlflow server, or tracking=sqlite with a local out"
        raise RequestError(f"no MLflow server answers at {uri} ({error})", where="tracking", hint=hint) from error


def _login() -> dict[str, str]:
    """The header by which MLflow's client would log in, from its variables."""
    import base64

    name, password = (os.environ.get(f"MLFLOW_TRACKING_{part}") for part in ("USERNAME", "PASSWORD"))
    if name and password:
        return {"Authorization": f"Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"}
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def connect(uri: str) -> Any:
    """An MLflow client of the store.

    Raises:
        RequestError: no server answers there.
    """
    require_server(uri)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow
    from mlflow.exceptions import MlflowException

    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        client.search_experiments(max_results=1)
    except MlflowException as error:
        raise RequestError(f"no MLflow server answers at {uri}", where="tracking", hint="mlflow server, or tracking=sqlite") from error
    return client
