"""Every code block of the site and the README is run, or says why not; every notebook runs from end to end."""

import contextlib
import doctest
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from swirl_agents.testing import tiny_model, tiny_tokenizer
from swirl_agents.testing_server import ChatServer

ROOT = Path(__file__).parent.parent.parent
WRITTEN = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name != "design.md"]
"""Pages in files; the design's blocks are trees, flows and one example that other pages have."""
NOTEBOOKS = [
    pytest.param(path, marks=pytest.mark.slow if "train" in path.stem else (), id=path.stem)
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
]
WEAK = ROOT / "tests" / "benchmarks" / "data" / "weak"
"""A policy of sums, which has something to learn."""
LANGUAGES = {"python", "pycon", "sh", "text", "json"}
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
SMALL = {
    "--tasks": "2", "--samples": "2", "--demonstrations": "2", "--updates": "1", "--epochs": "1", "--swirl.epochs": "1",
}  # fmt: skip
"""Flags of printed commands, and what stands there in the tests."""
RUN = ("--filter", "none", "--max-steps", "3", "--swirl.max-new-tokens", "8", "--sft.epochs", "1")
ADDED = {"run": RUN, "generate": ("--max-new-tokens", "8", "--max-steps", "3"), "eval": ("--max-new-tokens", "8")}


@dataclass(frozen=True)
class Block:
    """A block: its language, its text, and why it is not run (`None`: it is)."""

    kind: str
    text: str
    why: str | None


def blocks(markdown):
    """The blocks of a page, in order."""
    return [Block(found["kind"], found["text"], found["why"]) for found in BLOCK.finditer(markdown)]


def run_python(markdown):
    """Run the Python and the doctest blocks of a page in the current folder, in one namespace; returns what each block printed.

    A block that begins with `# name.py` is written to that file.
    """
    world, printed = {"__name__": "__main__"}, {}
    sys.path.insert(0, os.getcwd())
    try:
        for block in blocks(markdown):
            if block.why is not None:
                continue
            if block.kind == "pycon":
                test = doctest.DocTestParser().get_doctest(block.text, {}, "page", None, 0)
                out = io.StringIO()
                assert (
                    not doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
                    .run(test, out=out.write)
                    .failed
                ), out.getvalue()
            elif block.kind == "python":
                if name := re.match(r"# (\w+\.py)\n", block.text):
                    Path(name[1]).write_text(block.text)
                    sys.modules.pop(name[1].removesuffix(".py"), None)
                    continue
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile(block.text, "<page>", "exec"), world)
                printed[block.text] = out.getvalue()
    finally:
        sys.path.remove(os.getcwd())
    return printed


def commands(block):
    """The `swirl` commands of a shell block, a list of words each; continued lines are one."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("swirl ")]


def small(words, replaced):
    """A command with little to do: few tasks, and `replaced` texts in place of the printed ones."""
    words = [replaced.get(word, word) for word in words]
    for old, new in replaced.items():
        words = [word.replace(old, new) if "://" in old else word for word in words]
    for i, word in enumerate(words[:-1]):
        if word in SMALL:
            words[i + 1] = SMALL[word]
        if word == "--by":
            words[i + 1] = "none"
    added = ADDED.get(words[0], ())
    if words[0] == "run" and "--model" not in words:
        added = (*added, "--model", replaced["smollm2-135m"])
    return [*words, *added]


def call(words):
    """Run a command in this process; returns its exit code and what it said."""
    from swirl_benchmarks import cli

    path = list(sys.path)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["swirl", *words])
        with contextlib.redirect_stderr(out):
            try:
                cli.main()
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
    sys.path[:] = path
    return code, out.getvalue()


@pytest.fixture(scope="session")
def hooks():
    """What writes the reference."""
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    spec = importlib.util.spec_from_file_location("swirl_docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture(scope="session")
def reference(hooks):
    """path -> Markdown of every page that is written from docstrings."""
    return {path: text for path, text in hooks.pages() if not path.startswith("notebooks/")}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to be in, with the modules of pages forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A model folder of a few thousand random weights, in place of the model that pages name; some legal actions are tokens."""
    tools = ("calculator", "math_exp")  # the default grammar's and the paper's
    legal = [f"<{tool}>{i}+{j}</{tool}>" for tool in tools for i in range(2, 40) for j in range(2, 12)]
    model = tmp_path_factory.mktemp("docs") / "tiny"
    tokenizer = tiny_tokenizer(" ".join([*legal, *(f"<answer>{i}</answer>" for i in range(100))]))
    tiny_model(tokenizer).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return str(model)


@pytest.fixture(scope="session")
def server():
    """In place of a model's server."""
    with ChatServer("<answer>42</answer>\nGOOD") as running:
        yield running.url


def run_shell(markdown, replaced):
    """Run the commands of a page's shell blocks; what a page promises elsewhere is not looked at."""
    from swirl_benchmarks.cli import COMMANDS

    for block in blocks(markdown):
        if block.kind == "sh" and block.why is None:
            for words in commands(block):
                assert words[0] in COMMANDS, words
                code, text = call(small(words, replaced))
                assert code == 0, (words, text[-1500:])


@pytest.mark.parametrize("path", [*WRITTEN, ROOT / "README.md"], ids=lambda path: path.stem)
def test_each_block_has_a_language_or_a_reason(path):
    for block in blocks(path.read_text()):
        assert block.kind in LANGUAGES, block
        if block.kind == "sh" and block.why is None:
            lines = block.text.splitlines()
            assert all(line.startswith(("swirl ", "#")) or not line for line in lines), block.text


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_pages_run_as_printed(path, folder, tiny, server):
    text = path.read_text()
    printed = run_python(text)
    found = blocks(text)
    for block, after in zip(found, found[1:], strict=False):
        if block.text in printed and after.kind == "text":
            assert printed[block.text].strip() == after.text.strip()
    run_shell(text, {"smollm2-135m": tiny, "http://127.0.0.1:8000/v1": server})


def test_commands_of_the_readme_run(folder, tiny):
    run_shell((ROOT / "README.md").read_text(), {"smollm2-135m": tiny})


def test_each_registered_name_has_its_page_in_the_fixed_form(hooks, reference):
    from swirl_env.registration import ENVS

    entries = hooks.entries()
    assert {one.name for one in entries if one.group == "Environments"} == set(ENVS)
    assert len({one.page for one in entries}) == len(entries)
    for entry in entries:
        titles = re.findall(r"^## (.*)$", reference[entry.page], re.M)
        assert titles == ["What it is", "Arguments", "Example", "Errors", "Source"], entry
        assert "```" in reference[entry.page].partition("## Example")[2].partition("## Errors")[0], entry


def test_examples_of_the_reference_give_what_they_say(reference, folder):
    for path, text in reference.items():
        if "/environments/" not in path:  # those were played while they were written
            run_python(text.partition("## Errors")[0])


def test_algorithms_of_the_reference_train(reference, folder):
    for name in ("swirl", "reinforce", "sft"):
        run_shell(reference[f"reference/algorithms/{name}.md"], {"smollm2-135m": str(WEAK)})


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebooks_run(path, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(str(ROOT / part) for part in (".", "agents", "algos", "benchmarks"))
    )
    notebook = nbformat.read(path, 4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.slow
def test_the_site_builds_strictly_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in tmp_path.rglob("*.html"):
        assert not re.search(
            r"<(?:script|img|link rel=.stylesheet.)[^>]*(?:src|href)=.(?:https?:)?//", page.read_text()
        ), page
