"""`swirl report`: what is there is shown, what is not is told, and nothing of a trajectory acts on the page."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from markupsafe import Markup
from swirl_agents.scripted import make_scripted
from swirl_algos import stages
from swirl_benchmarks import evaluate, report_plots
from swirl_benchmarks.report import write_report

from swirl_env.errors import ConfigError
from swirl_env.io import dumps, read
from swirl_env.judges import make_judge
from swirl_env.types import Trajectory

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run folder as `swirl run` leaves it, of scripted policies: the later one is worse."""
    folder = tmp_path_factory.mktemp("report") / "run"

    def make():
        return evaluate.make("swirl/HotPotQA-v0", judge=None, reward="outcome", split="test")

    env, judge = make(), make_judge("rules")
    ids = list(env.unwrapped.task_set.tasks)[:4]
    played = {
        name: stages.generate(make, make_scripted(name, env.unwrapped), ids, folder / f"{name}.tmp", name=name)
        for name in ("oracle", "random")
    }
    for path in folder.glob("*.tmp"):
        path.unlink()
    first = played["random"][0]
    step = replace(first.steps[0], action=replace(first.steps[0].action, text=EVIL))
    played["random"][0] = replace(first, steps=(step, *first.steps[1:]), task=replace(first.task, question=EVIL))
    stages.judge(played["oracle"], judge, folder / "eval" / "warm_start.jsonl")
    stages.judge(played["random"], judge, folder / "eval" / "swirl.jsonl")
    stages.rewrite(folder / "trajectories.jsonl", played["oracle"])
    for name in ("rules", "outcome"):
        stages.judge(played["oracle"], make_judge(name), folder / f"judged-{name}.jsonl")
    stages.filter_by("process", stages.judge(played["oracle"], judge, folder / "judged.jsonl"), folder / "kept.jsonl")
    (folder / "training" / "swirl").mkdir(parents=True)
    updates = [{"update": i, "loss": 1 / (i + 1), "score": i / 12, "kl": 0.01 * i, "outcome": None} for i in range(12)]
    updates[-1]["alarm"] = "The process score rose."
    (folder / "training" / "swirl" / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in updates))
    (folder / "run.json").write_text(json.dumps({"config": {"env": "swirl/HotPotQA-v0", "swirl": {"beta": 0.02}}}))
    return folder


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture
def undrawn(monkeypatch):
    """Plots are laid out, but not drawn, which takes most of the time."""
    monkeypatch.setattr(
        report_plots, "_save", lambda name, figure, about: report_plots.Plot(name, Markup("<svg></svg>"), b"", about)
    )


def page_of(run, tmp_path):
    notes = write_report([run], tmp_path / "r.html", tmp_path / "png", "swirl report run")
    return (tmp_path / "r.html").read_text(), notes


def test_a_report_shows_every_part_and_its_plots(run, tmp_path):
    page, notes = page_of(run, tmp_path)
    for title in (
        "Alarms",
        "What was run",
        "Results",
        "Learning curves",
        "Reward by step",
        "What the filter kept",
        "Judges",
        "Slowest tools",
        "Worst regressions",
    ):
        assert f"<h3>{title}</h3>" in page
    assert "The process score rose." in page and "swirl.beta" in page
    assert re.search(
        r"swirl - warm_start</td><td>-1\.000 \[-1\.000, -0\.510\]</td>", page
    )  # four questions: never clear
    assert re.search(r"<td>generated</td><td>4</td><td>100.0%</td>", page)
    assert re.search(r"<td>outcome and rules</td>|<td>rules and outcome</td>", page)
    pictures = {path.name for path in (tmp_path / "png").glob("*.png")}
    assert len(pictures) == page.count("<figure") == 5
    assert all((tmp_path / "png" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert len(notes) == 1 and "no results.json" in notes[0]


def test_it_is_whole_in_itself_and_text_stays_text(run, tmp_path):
    page, _ = page_of(run, tmp_path)
    assert EVIL not in page and "&lt;script&gt;alert(1)" in page
    assert "<script" not in page.lower() and "default-src &#39;none&#39;" not in page and "default-src 'none'" in page
    links = set(re.findall(r'(?:src|href)="([^"#]+)', page))
    assert links <= {"data:,"}
    assert "var(--ink)" in page and "#1f2329" not in page.partition("</style>")[2]  # plots follow the theme


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: (run / "run.json").write_text("{"), "run.json cannot be read and is left out"),
        (lambda run: (run / "results.json").write_text("[]"), "results.json cannot be read and is left out"),
        (
            lambda run: (run / "eval" / "swirl.jsonl").open("a").write('{"task": 1}\n'),
            "the 4 trajectories before it are shown",
        ),
        (lambda run: (run / "training/swirl/metrics.jsonl").open("a").write('{"upd'), "metrics.jsonl:13 is torn"),
        (lambda run: shutil.rmtree(run / "training"), "no results.json"),
        (lambda run: (run / "judged.jsonl").write_text('{"task": 1}\n'), "judged.jsonl:1"),
    ],
)
def test_what_cannot_be_read_is_told_and_the_rest_is_shown(spoil, says, run, tmp_path, undrawn):
    spoil(run)
    page, notes = page_of(run, tmp_path)
    assert any(says in note for note in notes)
    assert "<h3>Results</h3>" in page and 'class="note"' in page


@pytest.mark.parametrize(
    "results",
    [
        {"policies": {"base": {"outcome": 0.5}}},
        {"policies": [1]},
        {"sets": {"gsm8k": {"models": {}}}},
        {"versions": "1.0", "sets": 3},
    ],
)
def test_figures_of_another_schema_are_told_and_the_rest_is_shown(results, run, tmp_path, undrawn):
    (run / "results.json").write_text(json.dumps(results))
    (run / "judged-other.jsonl").write_text(
        (run / "judged.jsonl").read_text().replace('"steps":[', '"steps":[],"x":[', 1)
    )
    page, notes = page_of(run, tmp_path)
    assert any("another schema" in note for note in notes)
    assert "<h3>Reward by step</h3>" in page and "<h3>Slowest tools</h3>" in page


def test_what_is_no_run_is_left_out_and_a_run_in_a_run_is_no_policy(run, made, tmp_path, undrawn):
    shutil.copytree(made, run / "inner")
    (tmp_path / "notes.txt").touch()
    notes = write_report([tmp_path / "notes.txt", run], tmp_path / "r.html", tmp_path / "png")
    assert any("notes.txt is a file" in note for note in notes)
    assert "inner, " not in (tmp_path / "r.html").read_text()


def test_a_run_that_nobody_judged_has_no_share_of_good_ones(run, tmp_path, undrawn):
    for path in [*run.glob("judged*"), run / "kept.jsonl"]:
        path.unlink()
    page, _ = page_of(run, tmp_path)
    assert "answer right (outcome)" in page and "every step good" not in page


def test_an_episode_of_thousands_of_steps_fills_no_page(run, tmp_path, undrawn):
    path = run / "eval" / "swirl.jsonl"
    one = next(read(path, Trajectory))
    path.write_text(dumps(replace(one, steps=one.steps[:1] * 5_000)) + "\n")
    page, _ = page_of(run, tmp_path)
    assert len(page) < 200_000 and "the first 30 of 5,000 steps" in page and "step 31" not in page


def test_nothing_to_show_is_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(ConfigError, match="empty is empty: give a folder"):
        page_of(tmp_path / "empty", tmp_path)
    with pytest.raises(ConfigError, match="holds no file of a run"):
        page_of(tmp_path / "other", tmp_path)
    with pytest.raises(ConfigError, match="There is no run folder"):
        page_of(tmp_path / "nowhere", tmp_path)


def test_two_runs_are_compared_and_the_command_writes_both_forms(made, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(made, tmp_path / name)
    shutil.copy(tmp_path / "b/eval/warm_start.jsonl", tmp_path / "b/eval/swirl.jsonl")
    command = [sys.executable, "-m", "swirl_benchmarks.cli", "report", "a", "b", "--out", "page.html"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert "<h2>a and b</h2>" in page
    assert re.search(r"b: swirl - a: swirl</td><td>\+1\.000", page)
    assert {path.name for path in (tmp_path / "page-files").iterdir()} >= {"1-a-funnel.png", "2-b-funnel.png"}
