"""The README's Python runs as printed, and its commands exist."""

import gzip
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
TRAINING = next(block for block in BLOCKS if "swirl.train" in block)
DATA = ROOT / "swirl_env" / "data"


def run(code, folder):
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def folder(tmp_path):
    """A folder with the files that the README speaks of."""
    (tmp_path / "train.jsonl").write_bytes(gzip.decompress((DATA / "gsm8k_train.jsonl.gz").read_bytes()))
    paragraphs = gzip.decompress((DATA / "hotpotqa_test.json.gz").read_bytes())
    (tmp_path / "hotpot_dev_distractor_v1.json").write_bytes(paragraphs)
    (tmp_path / "my_paragraphs.jsonl").write_text('{"title": "Zebra", "text": "An animal."}\n')
    (tmp_path / "mine.py").write_text(next(block for block in BLOCKS if block.startswith("# mine.py")))
    return tmp_path


def test_python_blocks(folder):
    out = run("\n".join(block for block in BLOCKS if block != TRAINING), folder)
    assert "<result>" in out


@pytest.mark.slow
def test_training_block(folder):
    assert "'loss'" in run(TRAINING, folder)


def test_every_command_named_is_a_command():
    from swirl_benchmarks.cli import COMMANDS

    assert set(re.findall(r"`swirl (\w+)", TEXT)) <= set(COMMANDS)
    targets = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in targets for target in re.findall(r"^make (\w+)", TEXT, re.M))


def test_the_project_names_no_private_place():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in files or pytest.skip("not a git checkout"):
        path = ROOT / name
        if path.suffix in {".gz", ".png", ".safetensors"} or not path.is_file():
            continue
        assert not re.search(r"(?<![\w./~$])/(?:home|root|work)/\w", path.read_text()), name
