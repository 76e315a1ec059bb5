"""The `out` of a study: whether one stands there, and which. Loads nothing before it is needed: a wrong path is refused at once.

url = require_study(absolute("runs/demo"))       # RequestError where none stands
study = study_at(url)
"""

from typing import TYPE_CHECKING

from base import storage
from base.errors import RequestError
from base.paths import is_url

if TYPE_CHECKING:
    from cluster.study import Study

FILE = "study.yaml"
HINT = "allograft run studies/demo.yaml"


def require_study(out: str, hint: str = HINT) -> str:
    """The same path or URL. Raises RequestError where no study stands."""
    if not storage.exists(storage.join(out, FILE)):
        raise RequestError(f"no study here (no {FILE})", where=out, hint=hint)
    return out


def study_at(out: str) -> "Study":
    """The study that stands there; its `out` is this one, since a folder may have been moved or copied.

    Raises:
        RequestError: none stands, or another version wrote it.
    """
    from base.config import read
    from cluster.study import Study

    return read(storage.join(require_study(out), FILE), Study).model_copy(update={"out": out})


def refuse_other_out(study: "Study") -> None:
    """Raises RequestError where `out` holds another study, or what is no study, before anything is written there."""
    path = storage.join(study.out, FILE)
    if storage.exists(path):
        held = storage.read_yaml(path).get("study")
        if held != study.study:
            raise RequestError(f"this folder holds the study '{held}', not '{study.study}'", where=study.out, hint="give another out=")
    elif not is_url(study.out):
        ours = {"shards", "driver.lock"}
        others = [name for name in storage.listing(study.out) if name not in ours and not name.startswith(".doctor-")]
        if others:
            raise RequestError(f"not empty and not a study ({', '.join(others[:3])})", where=study.out, hint="give another out=")
