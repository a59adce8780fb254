"""Fixtures for all tests. Real data is found through AISP_TEST_DATA, a directory with data/ and models/."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models; threads that wait for a busy core make them slower
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if not Path("/dev/nvidiactl").exists():  # no GPU: Triton's kernels by its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `-n 2 --dist loadgroup`: one worker takes all that starts Ray, in turn and first; a file is one worker's."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if item.get_closest_marker("ray") else item.path.stem))


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
