"""The architecture's own laws: who may import whom, and what the light commands must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NETWORK = "value.py"  # RE-Control's value network, the one file of methods/ that needs torch
PURE = ["aisp_dist/align.py", *(f"aisp_dist/methods/{p.name}" for p in (ROOT / "aisp_dist/methods").glob("*.py"))]
PURE.remove(f"aisp_dist/methods/{NETWORK}")

# Which parts of the library each part may import. Those without arrows are below everything; analysis is on top.
BELOW = {"records", "philox", "quiet", "together"}
ARROWS = {
    "records": set(),
    "philox": set(),
    "together": set(),
    "quiet": set(),
    "demo": set(),
    "config": {"records"},
    "data": BELOW | {"config", "demo"},
    "methods": BELOW | {"config"},
    "engine": BELOW | {"config", "demo", "data", "methods"},  # data: text of tokens; methods: the value network
    "vllm": BELOW | {"config", "data", "engine"},
    "rewards": BELOW | {"config", "data", "engine", "methods", "vllm"},
    "output": BELOW | {"config", "data", "engine", "rewards"},  # the fingerprint digests models and functions
    "align": BELOW | {"config", "data", "methods", "rewards"},
    "bench": BELOW | {"config", "data", "engine", "rewards", "align", "vllm"},
    "placement": {"config"},
    "endpoint": BELOW | {"config", "engine", "rewards"},
    "local": BELOW | {"endpoint", "config", "data", "engine", "vllm", "rewards", "output", "align", "placement"},
    "analysis": BELOW | {"endpoint", "config", "data", "methods", "engine", "vllm", "rewards", "output", "align"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name.split(".")[0] for name in found}


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("aisp_dist", {"ray", "actors", "jobs", "tests"}), ("actors", {"jobs", "tests"}), ("jobs", {"tests"})],
)
def test_layers_point_one_way(package, forbidden):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    assert {str(f): bad for f in files if (bad := imports(f) & forbidden)} == {}


def test_the_parts_of_the_library_point_one_way():
    found = {}
    for path in (ROOT / "aisp_dist").rglob("*.py"):
        here = path.relative_to(ROOT / "aisp_dist").with_suffix("").parts[0]
        if here != "__init__":
            found.setdefault(here, set()).update(parts(path) - {here})
    assert set(found) == set(ARROWS)
    assert {name: bad for name, uses in found.items() if (bad := uses - ARROWS[name])} == {}


def parts(path: Path) -> set[str]:
    """The parts of aisp_dist that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "aisp_dist":
            names |= {f"aisp_dist.{name.name}" for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
    return {name.split(".")[1] for name in names if name.startswith("aisp_dist.")}


def test_the_algorithm_knows_no_machinery():
    for name in PURE:
        assert not imports(ROOT / name) & {"ray", "torch", "transformers", "pyarrow", "datasets"}, name


@pytest.mark.parametrize(
    "command", [["--help"], ["schema"], ["align", "--help"], ["validate", "configs/quickstart.yaml"]]
)
def test_light_commands_load_no_torch_and_no_ray(command, tmp_path):
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('HEAVY', sorted({'torch', 'ray', 'transformers'} & set(sys.modules))))\n"
        f"from jobs import cli; cli.main({command!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout


def test_no_module_says_nothing_by_its_name():
    vague = {"utils", "util", "common", "helpers", "misc", "manager"}
    assert not [p for top in ("aisp_dist", "actors", "jobs") for p in (ROOT / top).rglob("*.py") if p.stem in vague]
