"""The house holds: imports point one way, `swirl_env` is light, no module is a hall."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "swirl_env": ROOT / "swirl_env",
    "swirl_agents": ROOT / "agents" / "swirl_agents",
    "swirl_algos": ROOT / "algos" / "swirl_algos",
    "swirl_benchmarks": ROOT / "benchmarks" / "swirl_benchmarks",
}
FLOORS = list(PACKAGES)
ROOMS = [
    {"types", "errors"},
    {"names", "spaces", "syntax", "grammar", "answers", "numerals", "io", "cache", "transport", "client"},
    {"tools", "tasks"},
    {"judges"},
    {"env"},
    {"wrappers", "vector"},
    {"registration", "testing"},
    {"adapters"},
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
FILES = [(package, path) for package, root in PACKAGES.items() for path in sorted(root.rglob("*.py"))]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("package", "path"), FILES, ids=lambda value: str(getattr(value, "name", value)))
def test_floors(package, path):
    allowed = FLOORS[: FLOORS.index(package) + 1]
    for name in imported(path):
        top = name.partition(".")[0]
        assert top not in FLOORS or top in allowed, f"{path} imports {name}: {package} stands below {top}"


@pytest.mark.parametrize("path", sorted(PACKAGES["swirl_env"].rglob("*.py")), ids=lambda path: path.name)
def test_rooms_of_swirl_env(path):
    room = path.relative_to(PACKAGES["swirl_env"]).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "swirl_env" and len(parts) > 1 and parts[1] in LEVEL:
            assert LEVEL[parts[1]] <= LEVEL[room], f"{path.name} imports {name}, which is a later room"
        assert parts[0] not in ("torch", "transformers") or path.name == "dense.py", f"{path.name} imports {name}"


def test_every_room_has_a_place():
    rooms = {
        path.stem for path in PACKAGES["swirl_env"].iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize(("package", "path"), FILES, ids=lambda value: str(getattr(value, "name", value)))
def test_modules_are_rooms(package, path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
    assert len(path.read_text().splitlines()) <= 600


def test_import_is_light():
    code = (
        "import time; start = time.process_time(); import gymnasium as gym, swirl_env; seconds = time.process_time() - start;"
        "import sys; print(seconds, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(out[0]) < 1.0  # the contract of docs/design.md, about 0.3 on a 2-core machine
    assert out[1:] == ["False", "False"]


def test_making_and_playing_loads_no_torch():
    code = (
        "import sys, gymnasium as gym, swirl_env; env = gym.make('swirl/HotPotQA-v0'); env.reset(seed=0);"
        "env.step('<search>film director</search>'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
