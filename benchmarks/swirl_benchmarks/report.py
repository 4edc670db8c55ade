"""`swirl report RUN...`: one HTML page on runs, whole in itself, and its plots as PNG.

A run folder is read file by file (`swirl run`, `swirl generate` with what was made of it, or `swirl bench`); what is missing, torn or
of another schema becomes a note, and the rest is shown. Trajectories are kept without their tokens.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from swirl_algos.filters import outcome, process
from swirl_algos.folders import flat

from swirl_benchmarks import metrics, report_plots
from swirl_benchmarks.judging import agreement
from swirl_benchmarks.metrics import Estimate, process_score
from swirl_env.errors import ConfigError, DataError
from swirl_env.io import read, write_text
from swirl_env.transport import without_credentials
from swirl_env.types import Trajectory

WORST = 5
"""Regressions that are shown of each pair."""
STEPS = 30
"""Steps of an episode that are shown: one of thousands would fill the page."""
FIGURES = {
    "outcome": "outcome",
    "process": "process score",
    "malformed": "malformed actions",
    "tool_errors": "tool errors",
    "steps": "steps",
}


@dataclass
class Table:
    """Rows of text under headings."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""


@dataclass
class Regression:
    """A question on which the later policy does worse."""

    question: str
    gold: str
    before: dict[str, Any]
    after: dict[str, Any]


@dataclass
class Section:
    """A part of the page; empty ones are left out."""

    title: str
    about: str = ""
    tables: list[Table] = field(default_factory=list)
    plots: list[report_plots.Plot] = field(default_factory=list)
    regressions: list[Regression] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


@dataclass
class Run:
    """What lies in a run folder."""

    folder: Path
    notes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    played: dict[str, list[Trajectory]] = field(default_factory=dict)
    """Policy (of a suite: set, policy) -> judged test trajectories, the earlier first."""
    made: list[Trajectory] = field(default_factory=list)
    """Stage 1, judged where that was done."""
    kept: int | None = None
    judged: dict[str, dict[tuple, Trajectory]] = field(default_factory=dict)
    """Judge -> its trajectories by key, of `judged-NAME.jsonl`."""
    training: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    bench: dict[str, Any] = field(default_factory=dict)
    """Figures of `swirl bench judges`."""

    @property
    def name(self) -> str:
        return self.folder.name or str(self.folder)


def write_report(folders: Sequence[Path], out: Path, png: Path, command: str = "") -> list[str]:
    """Write the page and its plots.

    Args:
        folders: run folders.
        out: the page.
        png: folder for the plots.
        command: shown on the page.

    Returns:
        sentences on what could not be read.

    Raises:
        ConfigError: there is no folder, or nothing at all can be shown of any.
    """
    if not folders:
        raise ConfigError("Give at least one run folder, such as swirl report runs/demo.")
    folders = list({folder.resolve(): folder for folder in folders}.values())
    for folder in folders:
        if not folder.exists():
            raise ConfigError(
                f"There is no run folder {folder}. Give folders of swirl run, swirl generate or swirl bench."
            )
    runs = [read_run(folder) for folder in folders]
    parts = [(run, _sections(run, i)) for i, run in enumerate(runs)]
    notes = [note for run in runs for note in run.notes]
    if not any(sections for _, sections in parts):
        raise ConfigError(" ".join(notes) or f"Nothing can be shown of {', '.join(map(str, folders))}.")
    across = [_across(one, other) for one, other in pairwise(runs)]
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html.j2")
    text = page.render(
        parts=parts, across=[one for one in across if one], command=command, palette=report_plots.PALETTE
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, without_credentials(text))
    png.mkdir(parents=True, exist_ok=True)
    for _, sections in parts:
        for plot in (plot for section in sections for plot in section.plots):
            (png / f"{plot.name}.png").write_bytes(plot.png)
    return notes


# -- reading


def read_run(folder: Path) -> Run:
    """Whatever of a run can be read, with notes on the rest."""
    run = Run(folder)
    if not folder.is_dir():
        run.notes.append(f"{folder} is a file, not a run folder: it is left out.")
        return run
    config = _json(run, folder / "run.json").get("config", {})
    run.config = config if isinstance(config, dict) else {}
    run.results = _json(run, folder / "results.json")
    for key, kind in {"policies": dict, "differences": dict, "sets": dict, "versions": dict, "models": list}.items():
        if not isinstance(run.results.get(key, kind()), kind):
            run.notes.append(f"{folder}/results.json is of another schema: {key!r} is left out.")
            del run.results[key]
    for path in sorted(folder.glob("*judges*.json")):
        run.bench |= {name: one for name, one in _json(run, path).items() if isinstance(one, dict) and "judges" in one}
    for path in sorted(folder.glob("training/*/metrics.jsonl")):
        run.training[path.parent.name] = list(_lines(run, path))
    judged = folder / "judged.jsonl"
    for path in sorted(folder.glob("judged-*.jsonl")):
        run.judged[path.stem.removeprefix("judged-")] = {one.key: one for one in _trajectories(run, path)}
        judged = judged if judged.exists() else path
    acted = {one.key: one for one in _trajectories(run, folder / "trajectories.jsonl")}
    run.made = list((acted | {one.key: one for one in _trajectories(run, judged)}).values())
    if (folder / "kept.jsonl").exists():
        run.kept = sum(1 for _ in _trajectories(run, folder / "kept.jsonl"))
    files = [path for path in folder.glob("*/*.jsonl") if path.parent.name not in ("training", "questions")]
    files = [path for path in files if not (path.parent / "run.json").exists()]  # a run in a run is given by itself
    files = [path for path in files if not path.name.endswith((".unjudged.jsonl", ".failures.jsonl"))]
    for path in sorted(files, key=lambda path: (path.parent.name, path.stat().st_mtime)):
        if played := list(_trajectories(run, path)):
            name = path.stem if path.parent.name == "eval" else f"{path.parent.name}, {played[0].policy}"
            run.played[name if name not in run.played else f"{path.parent.name}, {path.stem}"] = played
    sets = run.results.get("sets", {})
    order = [*run.results.get("policies", {}), "base", "warm_start", "swirl"]
    order += [f"{of}, {model}" for of in sets for model in run.results.get("models", ())]  # as they were given
    run.played = dict(
        sorted(run.played.items(), key=lambda one: order.index(one[0]) if one[0] in order else len(order))
    )
    if not any(folder.iterdir()):
        run.notes.append(f"{folder} is empty: give a folder of swirl run, swirl generate or swirl bench.")
    elif not run.results and (run.config or run.played or run.made):
        run.notes.append(
            f"{folder} holds no results.json: it is half-done, or was made step by step. What is there is shown."
        )
    elif not (run.config or run.results or run.made or run.played or run.training or run.bench):
        run.notes.append(f"{folder} holds no file of a run (run.json, trajectories.jsonl, results.json, ...).")
    return run


def _json(run: Run, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(data, dict):
            raise ValueError(f"expected an object, got {type(data).__name__}")
        return data
    except ValueError as error:
        run.notes.append(f"{path} cannot be read and is left out: {error}.")
        return {}


def _lines(run: Run, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            data = json.loads(line)
        except ValueError:
            run.notes.append(f"{path}:{number} is torn; the updates before it are shown.")
            return
        if isinstance(data, dict):
            yield data


def _trajectories(run: Run, path: Path) -> Iterator[Trajectory]:
    shown = 0
    try:
        for one in read(path, Trajectory):
            yield replace(one, steps=tuple(replace(step, tokens=None) for step in one.steps))
            shown += 1
    except DataError as error:
        run.notes.append(f"{error} It may be of an older schema; the {shown} trajectories before it are shown.")


# -- sections


def _sections(run: Run, index: int) -> list[Section]:
    makers: Iterable[Callable[[Run, str], Section]] = (
        _what,
        _headline,
        _regressions,
        _curves,
        _by_step,
        _funnel,
        _judges,
        _tools,
    )
    sections = [_alarms(run)]
    for maker in makers:
        try:
            sections.append(maker(run, f"{index + 1}-{run.name}"))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration) as error:
            run.notes.append(
                f"{run.folder}: {maker.__name__.strip('_').replace('_', ' ')} cannot be shown, its figures are of another schema "
                f"({type(error).__name__}: {error})."
            )
    return [one for one in sections if one.tables or one.plots or one.regressions or one.lines]


def _what(run: Run, name: str) -> Section:
    facts = {"command": run.results.get("command"), "seconds": run.results.get("seconds"), "python": run.results.get("python"),
             "note": run.results.get("note"), "about": run.results.get("about")}  # fmt: skip
    facts |= {f"version of {key}": value for key, value in run.results.get("versions", {}).items()}
    facts |= {f"{one}: questions": figures.get("questions") for one, figures in run.results.get("sets", {}).items()}
    section = Section("What was run")
    if rows := [(key, value) for key, value in facts.items() if value not in (None, "")]:
        section.tables.append(Table(("", ""), rows))
    if run.config:
        section.tables.append(Table(("setting", "value"), list(flat(run.config).items()), "All settings"))
    return section


def _headline(run: Run, name: str) -> Section:
    """Figures with intervals: those of results.json, else counted anew from the trajectories."""
    policies: dict[str, dict[str, Any]] = dict(run.results.get("policies", {}))
    differences: dict[str, dict[str, Any]] = dict(run.results.get("differences", {}))
    for of, figures in run.results.get("sets", {}).items():
        policies |= {f"{of}, {model}": one for model, one in figures["models"].items()}
        first = next(iter(figures["models"]))
        differences |= {f"{of}, {model} - {first}": one for model, one in figures["differences"].items()}
    if not all(of.keys() >= {"n", *FIGURES} for of in policies.values()):
        run.notes.append(
            f"{run.folder}/results.json is of another schema: figures are counted anew from the trajectories."
        )
        policies, differences = {}, {}
    if not policies:
        policies = {one: metrics.summary(played, lambda t: {}) for one, played in run.played.items()}
        differences = {f"{b} - {a}": _difference(run.played[a], run.played[b]) for a, b in _pairs(run)}
    if not policies:
        return Section("Results")
    rows = [(one, of["n"], *(Estimate(**of[key]) for key in FIGURES)) for one, of in policies.items()]
    section = Section(
        "Results",
        "Means with 95 % intervals over questions.",
        [Table(("policy", "questions", *FIGURES.values()), rows)],
    )
    counts = [of["n"] for of in policies.values()]
    signed = [
        (one, *(_signed(of[key], min(counts)) for key in ("outcome", "process"))) for one, of in differences.items()
    ]
    if signed:
        section.tables.append(Table(("paired difference", "outcome", "process score"), signed, "Paired differences"))
    for key in ("outcome", "process"):
        shown = {one: of[key] for one, of in policies.items() if of[key]["mean"] is not None}
        if shown:
            section.plots.append(report_plots.intervals(f"{name}-{key}", FIGURES[key], shown))
    for key in ("pass", "majority"):
        if any(key in of for of in policies.values()):
            rows = [(one, *(Estimate(**at) for at in of[key].values())) for one, of in policies.items() if key in of]
            sizes = next(of[key] for of in policies.values() if key in of)
            section.tables.append(Table(("policy", *(f"{key}@{k}" for k in sizes)), rows, f"{key}@k"))
    for key in ("hops", "type"):
        groups = [(one, group, at["n"], Estimate(at["mean"], at["low"], at["high"]))
                  for one, of in policies.items() for group, at in of.get(key, {}).items()]  # fmt: skip
        if groups:
            section.tables.append(Table(("policy", key, "questions", "outcome"), groups, f"Outcome by {key}"))
    return section


def _signed(figures: dict[str, Any], n: int) -> str:
    """A difference over `n` questions. Resampling fewer than six says nothing of 0: by chance all of them may change one way."""
    one = Estimate(**figures)
    clear = n >= 6 and one.low is not None and one.high is not None and (one.low > 0 or one.high < 0)
    return f"{one.signed}{', clear of 0' if clear else ''}"


def _difference(before: Sequence[Trajectory], after: Sequence[Trajectory]) -> dict[str, Any]:
    values = {"outcome": lambda t: t.outcome, "process": process_score}
    return {key: asdict(metrics.paired_difference(before, after, value)) for key, value in values.items()}


def _pairs(run: Run) -> list[tuple[str, str]]:
    """Earlier and later policies on the same questions."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in run.played:
        groups[name.partition(", ")[0] if ", " in name else ""].append(name)
    return [pair for group in groups.values() for pair in pairwise(group)]


def _regressions(run: Run, name: str) -> Section:
    section = Section(
        "Worst regressions",
        "Questions on which the later policy does worse than the one before it, the worst first. Of several samples the best "
        "before and the worst after are shown.",
    )
    for before, after in _pairs(run):
        section.regressions += _worse(run.played[before], run.played[after], before, after)
    return section


def _worse(before: Sequence[Trajectory], after: Sequence[Trajectory], names: str, other: str) -> list[Regression]:
    pairs: dict[str, tuple[list[Trajectory], list[Trajectory]]] = defaultdict(lambda: ([], []))
    for side, played in enumerate((before, after)):
        for one in played:
            pairs[one.task.id][side].append(one)

    def change(value: Callable[[Trajectory], float | None], old: list[Trajectory], new: list[Trajectory]) -> float:
        means = [[known for one in side if (known := value(one)) is not None] for side in (old, new)]
        return float(np.mean(means[1]) - np.mean(means[0])) if all(means) else 0.0

    found = [
        ((change(lambda t: t.outcome, old, new), change(process_score, old, new)), old, new)
        for old, new in pairs.values()
        if old and new
    ]
    found = sorted((one for one in found if min(one[0]) < 0 and one[0][0] <= 0), key=lambda one: one[0])[:WORST]

    def worst(side: list[Trajectory], sign: int) -> Trajectory:
        return min(side, key=lambda one: (sign * (one.outcome or 0), sign * (process_score(one) or 0)))

    return [
        Regression(
            new[0].task.question,
            " / ".join(new[0].task.answers),
            _told(names, worst(old, -1)),
            _told(other, worst(new, 1)),
        )
        for _, old, new in found
    ]


def _told(policy: str, one: Trajectory) -> dict[str, Any]:
    steps = [
        {
            "action": _short(step.action.text, 300),
            "results": [_short(result.text, 200) for result in step.results],
            "score": None if step.verdict is None or step.verdict.score is None else f"{step.verdict.score:.2f}",
            "reason": "" if step.verdict is None else _short(step.verdict.reason, 160),
        }
        for step in one.steps[:STEPS]
    ]
    return {
        "policy": policy,
        "steps": steps,
        "stop": one.stop if len(one.steps) <= STEPS else f"{one.stop}, the first {STEPS} of {len(one.steps):,} steps",
        "outcome": "unknown" if one.outcome is None else f"{one.outcome:.2f}",
    }


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def _across(one: Run, other: Run) -> Section | None:
    """Two runs on the same questions: the last policies of each."""
    if not one.played or not other.played:
        return None
    shared = [name for name in other.played if name in one.played]
    name, later = (shared[-1], shared[-1]) if shared else (list(one.played)[-1], list(other.played)[-1])
    before, after = one.played[name], other.played[later]
    both = {t.task.id for t in before} & {t.task.id for t in after}
    if not both:
        return None
    labels = f"{one.name}: {name}", f"{other.name}: {later}"
    found = _difference(before, after)
    table = Table(
        ("paired difference", "outcome", "process score"),
        [(" - ".join(labels[::-1]), *(_signed(of, len(both)) for of in found.values()))],
    )
    return Section(f"{one.name} and {other.name}", "", [table], regressions=_worse(before, after, *labels))


def _curves(run: Run, name: str) -> Section:
    section = Section("Learning curves", "One point an update; the line is the mean of up to ten updates.")
    for training, updates in run.training.items():
        if updates:
            section.plots.append(report_plots.curves(f"{name}-training-{training}", training, updates))
    return section


def _by_step(run: Run, name: str) -> Section:
    section = Section(
        "Reward by step",
        f"Mean score of the judged actions at each step of an episode (the first {STEPS}), and how many there are.",
    )
    groups = {"stage 1": run.made, **run.played} if run.made else run.played
    shown: dict[str, list[tuple[float, int]]] = {}
    for policy, played in groups.items():
        scores: dict[int, list[float]] = defaultdict(list)
        for one in played:
            for i, step in enumerate(one.steps[:STEPS]):
                if step.verdict is not None and step.verdict.score is not None:
                    scores[i].append(step.verdict.score)
        if scores:
            shown[policy] = [
                (float(np.mean(scores[i])) if i in scores else float("nan"), len(scores[i]))
                for i in range(max(scores) + 1)
            ]
    if shown:
        longest = max(map(len, shown.values()))
        rows = [
            [policy, *(f"{mean:.3f} ({n})" if n else "" for mean, n in values), *[""] * (longest - len(values))]
            for policy, values in shown.items()
        ]
        section.tables.append(Table(("policy", *(f"step {i + 1}" for i in range(longest))), rows))
        section.plots.append(report_plots.by_step(f"{name}-by-step", shown))
    return section


def _funnel(run: Run, name: str) -> Section:
    section = Section("What the filter kept")
    if run.made:

        def known(one: Trajectory) -> bool:
            return all(step.verdict is not None and step.verdict.score is not None for step in one.steps)

        counts = {
            "generated": len(run.made),
            "no malformed action": sum(all(step.action.malformed is None for step in one.steps) for one in run.made),
            "every step good (process)": sum(map(process, run.made)),
            "answer right (outcome)": sum(map(outcome, run.made)),
            "process and outcome": sum(process(one) and outcome(one) for one in run.made),
        } | ({} if run.kept is None else {"kept": run.kept})  # fmt: skip
        unknown = sum(not known(one) for one in run.made)
        if unknown == len(run.made):  # not judged yet: no figure, which is another thing than none that is good
            del counts["every step good (process)"], counts["process and outcome"]
        section.about = (
            f"Trajectories of stage 1. {unknown} have a step without a verdict."
            if unknown
            else "Trajectories of stage 1."
        )
        section.tables.append(
            Table(("", "trajectories", "share"), [(key, n, f"{n / len(run.made):.1%}") for key, n in counts.items()])
        )
        section.plots.append(report_plots.funnel(f"{name}-funnel", counts))
    return section


def _judges(run: Run, name: str) -> Section:
    section, rows = Section("Judges"), []
    for one, other in combinations(run.judged, 2):
        pairs = [(run.judged[one][key], run.judged[other][key]) for key in run.judged[one] if key in run.judged[other]]
        pairs = [(left, right) for left, right in pairs if len(left.steps) == len(right.steps)]  # else it was made anew
        found = agreement([left for left, _ in pairs], [right for _, right in pairs])
        shown = ["unknown" if found[key] is None else f"{found[key]:.3f}" for key in ("share", "kappa", "correlation")]
        rows.append((f"{one} and {other}", found["steps"], *shown))
    if rows:
        section.tables.append(
            Table(
                ("judges", "steps", "same GOOD or BAD", "Cohen's kappa", "correlation"),
                rows,
                "Agreement between judges",
            )
        )
    for of, figures in run.bench.items():
        judges = {judge: {key: Estimate(**one) for key, one in all_.items() if isinstance(one, dict) and set(one) == {"mean", "low", "high"}}
                  for judge, all_ in figures["judges"].items()}  # fmt: skip
        keys = list(dict.fromkeys(key for one in judges.values() for key in one))
        section.tables.append(
            Table(
                ("judge", *keys),
                [(judge, *(one.get(key, "") for key in keys)) for judge, one in judges.items()],
                f"Agreement with people: {of}",
            )
        )
    return section


def _tools(run: Run, name: str) -> Section:
    every = [*run.made, *(one for played in run.played.values() for one in played)]
    rows, slowest = [], []
    seconds: dict[str, list[float]] = defaultdict(list)
    for one in every:
        for step in one.steps:
            for call, result in zip(step.action.calls, step.results, strict=False):
                seconds[call.name].append(result.seconds)
                slowest.append((result.seconds, call.name, json.dumps(call.arguments, ensure_ascii=False), one.id))
    figures = metrics.of_tools(every)
    for tool, times in sorted(seconds.items(), key=lambda item: -max(item[1])):
        of = figures[tool]
        rows.append(
            (
                tool,
                f"{of['calls']:,}",
                f"{of['errors']:.1%}",
                f"{of['repeated']:.1%}",
                *(f"{value * 1000:.1f}" for value in (np.mean(times), np.quantile(times, 0.95), max(times))),
            )
        )
    if not rows:
        return Section("Tools")
    slowest.sort(key=lambda one: -one[0])
    calls = [
        (f"{taken * 1000:.1f}", tool, _short(arguments, 120), of) for taken, tool, arguments, of in slowest[:WORST]
    ]
    return Section("Slowest tools", "", [
        Table(("tool", "calls", "errors", "repeated", "mean ms", "95 % under ms", "slowest ms"), rows),
        Table(("ms", "tool", "arguments", "trajectory"), calls, "Slowest calls"),
    ])  # fmt: skip


def _alarms(run: Run) -> Section:
    lines = [str(run.results["alarm"])] if run.results.get("alarm") else []
    for training, updates in run.training.items():
        lines += [f"{training}, update {one.get('update')}: {one['alarm']}" for one in updates if one.get("alarm")][-1:]
    for policy, played in run.played.items():
        stops = Counter(one.stop for one in played)
        if stops["error"]:
            lines.append(
                f"{policy}: {stops['error']} of {len(played)} episodes ended by an error; they are left out of outcome and steps."
            )
        unknown = sum(step.verdict is None or step.verdict.score is None for one in played for step in one.steps)
        if unknown:
            lines.append(f"{policy}: {unknown} steps have no verdict.")
    return Section("Alarms", lines=lines)
