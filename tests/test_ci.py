"""What CI checks beside the tests: every skip is listed, and missing tests are noticed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import conftest

ROOT = Path(__file__).parent.parent
LISTED = [line.split(maxsplit=1) for line in conftest.SKIPS.read_text().splitlines() if not line.startswith("#")]


@pytest.mark.parametrize(("pattern", "reason"), LISTED)
def test_a_listed_skip_has_a_reason_and_matches_a_test(pattern, reason):
    files = ROOT.glob(pattern.partition("::")[0])
    tests = [
        f"{file.relative_to(ROOT)}::{test}"
        for file in files
        for test in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    ]
    assert reason and any(conftest.fnmatchcase(test, pattern) for test in tests)


@pytest.mark.parametrize(("strict", "code"), [("", 0), ("1", 1)])
def test_ci_fails_on_a_skip_that_is_not_listed(tmp_path, strict, code):
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_sessionfinish\n")
    (tmp_path / "test_it.py").write_text("import pytest\n\ndef test_a():\n    pytest.skip('why not')\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "AISP_STRICT_SKIPS": strict, "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stdout
    assert ("test_it.py::test_a was skipped" in done.stdout) == bool(code)


def test_a_listed_skip_passes_with_any_parameter():
    listed = "tests/test_prompts_render.py::test_every_real_dialogue_is_rendered_back_exactly"
    assert conftest.unlisted([f"{listed}[chosen]", "tests/test_new.py::test_a[x::y]"]) == ["tests/test_new.py::test_a"]


def test_ci_knows_how_many_tests_there_are(request):
    """Nine tenths of the suite, with some room to grow. It can fail only in a session of the whole suite."""
    (least,) = map(int, re.findall(r"^min_passed=(\d+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    assert least >= 0.8 * len(request.session.items), "raise min_passed to nine tenths of the suite"
