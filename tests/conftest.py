"""Fixtures for all tests. Real data is found through AISP_TEST_DATA, a directory with data/ and models/."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models; threads that wait for a busy core make them slower
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if not Path("/dev/nvidiactl").exists():  # no GPU: Triton's kernels by its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not _starts_ray(item.path))  # the longest first


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """For `-n 2`: one worker takes all files that start Ray, in turn; of the others a file is one worker's."""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "ray" if _starts_ray(Path(str(config.rootpath), file)) else file

    return ByFile(config, log)


@cache
def _starts_ray(file: Path) -> bool:
    return "pytest.mark.ray" in file.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real prompts and a real tiny language model; tests that want them skip where they are absent."""
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
