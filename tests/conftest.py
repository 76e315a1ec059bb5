"""Shared by all tests: small packed corpora, made once a session and a worker."""

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it once a process, when it is first imported
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # idle processes that no driver of ours can use, whose environments differ
os.environ["ALLOGRAFT_CACHE"] = tempfile.mkdtemp(prefix="allograft-cache-")  # never the user's own

import shutil
from pathlib import Path

import pytest
from hypothesis import settings
from shared import as_user, head, on_head, services, studied  # noqa: F401  fixtures for several files
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

# A test that waits for a processor is not a slow one, and the same commit has the same result.
settings.register_profile("busy machine", deadline=None, derandomize=True)
settings.load_profile("busy machine")


# Files that take half a minute or more, the longest first: what comes last and alone keeps one processor idle. The first four share the
# services of tests/shared.py, so one process runs them.
SHARING = ("test_cluster_jobs", "test_cluster_submit", "test_cluster_chaos", "test_cluster_services")
LONG = (*SHARING, "test_cluster_main", "test_cluster_stop", "test_cluster_hosts", "test_cluster_fanout", "test_deploy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


class ByFile(LoadFileScheduling):
    """A file in one process, and those that share services in the same. Not xdist's groups: 3.8 cannot name them under pytest 9.2."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "services" if Path(file).stem in SHARING else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    """What xdist deals the tests out by."""
    return ByFile(config, log)


def pytest_unconfigure() -> None:
    """Remove the cache of these tests."""
    shutil.rmtree(os.environ["ALLOGRAFT_CACHE"], ignore_errors=True)


def _pack(card: str, raw: str, out: Path) -> str:
    from shards.card import load_card
    from shards.pack import pack

    pack(load_card(card), raw, str(out))
    return str(out)


@pytest.fixture(scope="session")
def phantom_chest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards of 240 chest phantoms."""
    return _pack("phantom-chest", "phantom:240", tmp_path_factory.mktemp("phantom-chest"))


@pytest.fixture(scope="session")
def phantom_fundus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards of 60 fundus phantoms."""
    return _pack("phantom-fundus", "phantom:60", tmp_path_factory.mktemp("phantom-fundus"))
