"""Fixtures for all tests. Real data is found through AISP_TEST_DATA, a directory with data/ and models/."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads that wait for a busy core slow them down
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not _starts_ray(item.path))  # the longest first


_BESIDE = ("test_kill_matrix", "test_s3", "test_security", "test_tokens")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """For `-n 2`: the files that start Ray are in two parts that take about as long, one a worker, since both have long
    waits; then each other file runs on one worker."""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            if not _starts_ray(Path(str(config.rootpath), file)):
                return file
            return "ray beside" if Path(file).stem in _BESIDE else "ray"

    return ByFile(config, log)


SKIPS = Path(__file__).parent / "skips.txt"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail CI (AISP_STRICT_SKIPS is set) on a skip that skips.txt does not list."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and os.environ.get("AISP_STRICT_SKIPS"):
        for test in unlisted(report.nodeid for report in reporter.stats.get("skipped", [])):
            reporter.write_line(f"\n{test} was skipped and {SKIPS.name} does not list it", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def unlisted(tests: Iterable[str]) -> list[str]:
    """The ids of skipped tests that no pattern of skips.txt matches."""
    lines = SKIPS.read_text(encoding="utf-8").splitlines()
    patterns = [line.split()[0] for line in lines if line and not line.startswith("#")]
    names = {test.partition("[")[0] for test in tests}
    return sorted(name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns))


@cache
def _starts_ray(file: Path) -> bool:
    return "pytest.mark.ray" in file.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A directory with real prompts and a tiny real language model. Tests that need it are skipped if it is absent."""
    root = os.environ.get("AISP_TEST_DATA")
    if not root or not (Path(root) / "data").is_dir():
        pytest.skip("AISP_TEST_DATA does not name a directory with data/ and models/")
    return Path(root)


@pytest.fixture(scope="session")
def server():
    """A server of the S3 protocol."""
    from s3 import Server

    running = Server()
    yield running
    running.close()
