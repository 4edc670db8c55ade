"""Benchmark suites: policies side by side on several task sets, in one folder that goes on where it stopped.

A suite is a TOML file in `suites/`: `about`, `limit` (questions a set), `overlap` (precision and recall of words, as the
paper's table 4), `transfer` (see `_transfer`) and `[[sets]]` of `env`, `files` (official files, in the order in which they
are looked for) and `ids` (a list in `paper_ids.json`). Every (set, model) has its own files in the folder:
SET/MODEL.unjudged.jsonl and SET/MODEL.jsonl, so that a model may be added later. Left out: the paper's outcome judges (GPT-4o,
Gemma-2-27b), whose judgement the official metrics stand for here.
"""

import json
import time
import tomllib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
from pydantic import TypeAdapter
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from swirl_agents.judges import open_judge
from swirl_agents.scripted import SCRIPTED
from swirl_algos import stages
from swirl_algos.folders import claim, digest, read_claim

from swirl_benchmarks import evaluate, metrics
from swirl_benchmarks.judging import slug
from swirl_benchmarks.metrics import Estimate, process_score
from swirl_env.answers import precision_recall_f1
from swirl_env.client import PREFIX
from swirl_env.errors import ConfigError, SwirlError
from swirl_env.io import Writer, read, read_official
from swirl_env.tasks.download import data_folder
from swirl_env.transport import without_credentials
from swirl_env.types import STRICT, Policy, Task, Trajectory

FOLDER = Path(__file__).parent / "suites"
SUITES = ("smoke", "paper", "transfer")
SAMPLE = 1 << 16
"""Bytes of a model's file that are looked at, at four places: a training changes all weights."""


@dataclass(frozen=True, slots=True)
class Set:
    """A task set of a suite."""

    __pydantic_config__ = STRICT

    env: str
    files: tuple[str, ...] = ()
    """Names (or patterns) of official files, the first choice first."""
    ids: str | None = None
    """Name of a list in `paper_ids.json`."""

    @property
    def name(self) -> str:
        return self.env.rpartition("/")[2].partition("-")[0].lower()


@dataclass(frozen=True, slots=True)
class Suite:
    """What a suite measures."""

    __pydantic_config__ = STRICT

    about: str
    sets: tuple[Set, ...]
    limit: int
    """Questions of each set."""
    overlap: bool = False
    transfer: bool = False


@dataclass(frozen=True, slots=True)
class Sitting:
    """Episodes that were played in one go."""

    __pydantic_config__ = STRICT

    set: str
    model: str
    episodes: int
    seconds: float


def load(name: str) -> Suite:
    """A suite of the package."""
    return TypeAdapter(Suite).validate_python(tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8")))


def run_suite(
    name: str, models: Sequence[str], folder: Path, *, data: Path | None, limit: int | None, samples: int, temperature: float,
    max_new_tokens: int, judge: str, seed: int, say: Callable[[str], None], command: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Run, or go on with, a suite; returns the figures (also in `results.json`).

    Args:
        name: of `SUITES`.
        models: as in `swirl eval`; the others are compared with the first.
        folder: of this run; one of the same settings goes on, also with further models.
        data: folder with official files; the download cache is looked through too.
        limit: questions a set; `None`: the suite's.
        samples: episodes a question.
        temperature: of sampling.
        max_new_tokens: token cap of an action.
        judge: who scores the steps.
        seed: of the choice of questions and of sampling.
        say: told what is played.
        command: recorded in the results.

    Raises:
        ConfigError: a setting cannot work, or the folder holds a run with other settings. SwirlError: episodes ended by an error.
    """
    suite, started = load(name), time.monotonic()
    _check(models, limit, samples, temperature, seed)
    trained = {model: trained_on(model) for model in models}
    if suite.transfer and not any(trained[model] for model in models[1:]):
        raise ConfigError(
            f"bench {name} compares checkpoints of swirl run or swirl train: give --model BASE --model RUN/swirl, got {', '.join(models)}."
        )
    judging = open_judge(judge)
    limit = suite.limit if limit is None else limit
    settings = {"suite": name, "limit": limit, "samples": samples, "temperature": temperature, "max_new_tokens": max_new_tokens,
                "judge": judge, "seed": seed, "data": None if data is None else str(data)}  # fmt: skip
    claim(folder / "run.json", settings, "--out")
    _claim_models(folder / "models.json", models)
    questions = {one.name: _questions(one, folder, data, say) for one in suite.sets}
    cells: dict[str, dict[str, list[Trajectory]]] = {one.name: {} for one in suite.sets}
    worlds: dict[str, gym.Env] = {}
    for model in models:
        policy: Policy | None = None
        for one in suite.sets:

            def make(one: Set = one) -> gym.Env:
                path, judged = questions[one.name][0], {"judge": None, "reward": "outcome"}
                return evaluate.make(one.env, split="test", path=path and str(path), malformed_limit=3, **judged)

            worlds.setdefault(one.name, make())
            if policy is None or _bound(model):
                policy = evaluate.make_policy(
                    model, worlds[one.name], temperature=temperature, max_new_tokens=max_new_tokens, seed=seed
                )
            chosen = evaluate.choose(list(worlds[one.name].unwrapped.task_set.tasks), limit, seed)  # type: ignore[attr-defined]
            file = folder / one.name / f"{_file(model)}.jsonl"
            acted, tasks = file.with_suffix(".unjudged.jsonl"), worlds[one.name].unwrapped.task_set.tasks  # type: ignore[attr-defined]
            _keep(acted, partial(_still_asked, tasks))
            with _timed(folder, one.name, model, acted):
                made = stages.generate(
                    make, policy, chosen, acted, samples=samples, seed=seed, name=f"{one.name}, {model[-40:]}"
                )
            _keep(file, partial(_is_one_of, {trajectory.key for trajectory in made}))
            cells[one.name][model] = stages.judge(made, judging, file)
    sittings = list(read(folder / "sittings.jsonl", Sitting))
    sets = {
        one.name: _figures(suite, worlds[one.name], cells[one.name], sittings, one.name)
        | {"env": one.env, "questions": questions[one.name][1]}
        for one in suite.sets
    }
    results: dict[str, Any] = {
        "command": command, "about": suite.about, "config": settings, "judge": judging.name,
        "models": [without_credentials(model) for model in models], "sets": sets,
        "seconds": round(time.monotonic() - started, 1), "versions": {"swirl-env": version("swirl-env")},
    }  # fmt: skip
    if suite.transfer:
        results["transfer"] = _transfer(suite, cells, trained, models)
    evaluate.write_json(folder / "results.json", results)
    return results


def check_results(results: dict[str, Any]) -> None:
    """Raise `SwirlError` where episodes ended by an error or too many verdicts are unknown."""
    for name, figures in results["sets"].items():
        for model, one in figures["models"].items():
            if failed := one["stops"].get("error"):
                raise SwirlError(
                    f"{failed} of {one['trajectories']} episodes of {model} on {name} ended by an error, told above. Mend it and give the "
                    "command again: they are made anew."
                )
            if one["unknown"] > stages.UNKNOWN_LIMIT * one["cost"]["actions"]:
                raise SwirlError(
                    f"More than {stages.UNKNOWN_LIMIT:.0%} of the verdicts of {model} on {name} are unknown: mend the judge."
                )


def trained_on(model: str) -> str | None:
    """The environment that a checkpoint RUN/NAME was trained in, by RUN/run.json; `None`: not known."""
    claimed = Path(model).parent / "run.json"
    if not Path(model).is_dir() or not claimed.is_file():
        return None
    env = read_claim(claimed).get("env")
    return env if isinstance(env, str) else None


def _check(models: Sequence[str], limit: int | None, samples: int, temperature: float, seed: int) -> None:
    if not models or len(set(models)) < len(models):
        raise ConfigError(
            f"Give --model once or several times, each another, such as --model oracle; got {', '.join(models) or 'none'}."
        )
    if (limit is not None and limit < 1) or samples < 1 or seed < 0 or temperature < 0:
        raise ConfigError(
            f"--limit and --samples must be at least 1, --seed and --temperature 0 or more; got {limit}, {samples}, {seed}, {temperature}."
        )
    local = [model for model in models if model.partition(":")[0] not in SCRIPTED]
    if samples > 1 and temperature == 0 and local:
        raise ConfigError(f"At --temperature 0 all {samples} samples are equal: give --temperature 1, or --samples 1.")


def _bound(model: str) -> bool:
    """Whether a policy speaks for one environment only; a local model is loaded once for all."""
    return model.partition(":")[0] in SCRIPTED or model.startswith((PREFIX, "{"))


def _file(model: str) -> str:
    """A file name of its own for each model."""
    name = slug(without_credentials(model))
    return name if name == model else f"{name[-60:]}-{digest(model)}"


def _claim_models(path: Path, models: Sequence[str]) -> None:
    """Raise `ConfigError` where a model's files are others than those of the episodes that are there; else note them."""
    noted = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    files = {model: Path(model.removeprefix("replay:")) for model in models}
    now = {_file(model): _state(place) for model, place in files.items() if place.exists()}
    if changed := [model for model in files if noted.get(_file(model)) not in (None, now.get(_file(model)))]:
        raise ConfigError(
            f"{changed[0]} holds another model than the one whose episodes are in {path.parent}. Use another --out."
        )
    if now.keys() - noted.keys():
        evaluate.write_json(path, noted | now)


def _state(place: Path) -> str:
    """What a model's files (or a replayed file) hold, by their sizes and a sample of each: weights are large."""
    told = sha256()
    for path in sorted(place.iterdir()) if place.is_dir() else [place]:
        if path.is_file():
            size = path.stat().st_size
            told.update(f"{path.name} {size} ".encode())
            with path.open("rb") as file:
                for start in (0, size // 3, 2 * size // 3, max(0, size - SAMPLE)):
                    file.seek(start)
                    told.update(file.read(SAMPLE))
    return told.hexdigest()[:16]


def _keep(path: Path, wanted: Callable[[Trajectory], bool]) -> None:
    """Leave out of a file what no longer is what it says, so that it is made anew."""
    found = list(read(path, Trajectory))
    kept = [one for one in found if wanted(one)]
    if len(kept) < len(found):
        stages.rewrite(path, kept)


def _still_asked(tasks: Mapping[str, Task], old: Trajectory) -> bool:
    task = tasks.get(old.task.id)
    return task is not None and (task.question, task.answers) == (old.task.question, old.task.answers)


def _is_one_of(keys: Container[tuple], old: Trajectory) -> bool:
    return old.key in keys


class _timed:
    """Keeps how long episodes took, also where they are stopped."""

    def __init__(self, folder: Path, of: str, model: str, acted: Path):
        self.folder, self.of, self.model, self.acted = folder, of, without_credentials(model), acted

    def _count(self) -> int:
        return sum(1 for line in self.acted.open("rb") if line.endswith(b"\n")) if self.acted.exists() else 0

    def __enter__(self) -> None:
        self.before, self.began = self._count(), time.monotonic()

    def __exit__(self, *_: object) -> None:
        if (made := self._count() - self.before) > 0:
            with Writer[Sitting](self.folder / "sittings.jsonl") as out:
                out.write(Sitting(self.of, self.model, made, round(time.monotonic() - self.began, 3)))


# -- which questions


def _questions(one: Set, folder: Path, data: Path | None, say: Callable[[str], None]) -> tuple[Path | None, str]:
    """(file of tasks or `None` for the bundled ones, a sentence that says which questions these are)."""
    paths = list(_official(one, data))
    wanted = json.loads((FOLDER / "paper_ids.json").read_text(encoding="utf-8"))["ids"][one.ids] if one.ids else None
    if wanted is None:
        told = f"drawn from {paths[0].name}" if paths else "drawn from the bundled test tasks"
        if one.files and not paths:
            told += f" (no {one.files[0]} at hand: swirl data fetch {one.name}, or --data FOLDER)"
        say(f"{one.name}: {told}")
        return (paths[0] if paths else None), told
    target = folder / "questions" / f"{one.name}.jsonl"
    rows: dict[str, Any] = {}
    for path in paths:
        for _, row in read_official(path):
            if isinstance(row, dict) and row.get("_id", row.get("id")) in wanted:
                rows.setdefault(json.dumps(row, sort_keys=True), row)  # two files may hold the same question
        if {row.get("_id", row.get("id")) for row in rows.values()} == set(wanted):
            break
    found = {row.get("_id", row.get("id")) for row in rows.values()}
    if not found:
        why = "hold none of them" if paths else "are not at hand"
        told = f"drawn from the bundled test tasks, not the paper's: the official files ({', '.join(one.files)}) {why}"
        say(f"{one.name}: {told}; swirl data fetch {one.name}, or --data FOLDER")
        return None, told
    told = f"the paper's, by their printed ids: {len(found)} of {len(set(wanted))} ids found, {len(rows)} questions"
    say(f"{one.name}: {told}")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()), encoding="utf-8")
    return target, told


def _official(one: Set, data: Path | None) -> Iterator[Path]:
    """The official files at hand, in the suite's order; a folder may hold them gzip-compressed."""
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data takes a folder with official files; there is no folder {data}.")
    for pattern in one.files:
        for folder in (data, data_folder()):
            if folder is not None and folder.is_dir():
                named = {path: path.name.lower().removesuffix(".gz") for path in sorted(folder.iterdir())}
                yield from (path for path, name in named.items() if fnmatch(name, pattern.lower()) and path.is_file())


# -- figures


def _figures(
    suite: Suite, env: gym.Env, played: dict[str, list[Trajectory]], sittings: list[Sitting], name: str
) -> dict[str, Any]:
    task_set = env.unwrapped.task_set  # type: ignore[attr-defined]
    first = next(iter(played.values()))
    models, differences = {}, {}
    for model, trajectories in played.items():
        told = without_credentials(model)
        figures = evaluate.report(env, told, trajectories)
        if suite.overlap:
            figures["overlap"] = _overlap(trajectories)
        figures |= {
            key: metrics.by_group(trajectories, key, lambda one: one.outcome) for key in ("hops", "type")
        }  # fmt: skip
        if max(one.sample for one in trajectories):
            figures |= metrics.of_samples(task_set, trajectories)
        timed = [one for one in sittings if (one.set, one.model) == (name, told)]
        seconds = sum(one.seconds for one in timed) / sum(one.episodes for one in timed) if timed else None
        figures["tools"] = metrics.of_tools(trajectories)
        figures["cost"] = metrics.of_cost(trajectories) | {"seconds_an_episode": seconds}
        models[told] = figures
        if trajectories is not first:
            differences[told] = {
                "outcome": asdict(metrics.paired_difference(first, trajectories, lambda t: t.outcome, task_set.macro)),
                "process": asdict(metrics.paired_difference(first, trajectories, process_score)),
            }
    return {"models": models, "differences": differences}


def _overlap(trajectories: list[Trajectory]) -> dict[str, Any]:
    """Precision, recall and F1 of the words of the answer, as in the paper's table 4, against the gold form with the best F1."""

    def best(one: Trajectory, part: int) -> float | None:
        if one.stop == "error" or not one.task.answers:
            return None
        forms = [precision_recall_f1(one.answer or "", gold) for gold in one.task.answers]
        return max(forms, key=lambda form: form[2])[part]

    names = ("precision", "recall", "f1")
    return {name: asdict(metrics.mean_of(trajectories, lambda t, i=i: best(t, i))) for i, name in enumerate(names)}  # type: ignore[misc]


def _transfer(
    suite: Suite, cells: dict[str, dict[str, list[Trajectory]]], trained: dict[str, str | None], models: Sequence[str]
) -> dict[str, Any]:
    """Of each checkpoint: what it was trained on, and the mean difference in outcome from the first model over all other sets,
    each weighing the same."""
    figures: dict[str, Any] = {}
    for model in models[1:]:
        if (source := trained[model]) is not None:
            others = {
                one.name: (cells[one.name][models[0]], cells[one.name][model])
                for one in suite.sets
                if one.env != source
            }
            difference = asdict(metrics.macro_difference(others, lambda one: one.outcome))
            figures[model] = {"trained_on": source, "other_sets": list(others), "outcome": difference}
    return figures


# -- for people


def print_suite(results: dict[str, Any], console: Console) -> None:
    """The figures as tables: one for all sets, then hops, types and tools of each."""
    models = results["models"]
    table = Table(
        "",
        *map(escape, models),
        title=f"{escape(results['about'])}\nmean [95 % interval]; differences are paired, from {escape(models[0])}",
        title_justify="left",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, figures in results["sets"].items():
        of = figures["models"]
        table.add_section()
        table.add_row(f"[bold]{name}[/]", *(f"{of[model]['n']} questions" for model in models))
        for label, values in _rows(figures, models):
            table.add_row(f"  {escape(label)}", *values)
    console.print(table)
    for name, figures in results["sets"].items():
        of = figures["models"]
        for key in ("hops", "type"):
            if len(groups := of[models[0]][key]) > 1:
                detail = Table(
                    key, "questions", *map(escape, models), title=f"{name}: outcome by {key}", title_justify="left"
                )
                for group, first in groups.items():
                    shown = [
                        str(Estimate(*(of[model][key][group][part] for part in ("mean", "low", "high"))))
                        for model in models
                    ]
                    detail.add_row(escape(group), str(first["n"]), *shown)
                console.print(detail)
    for model, figures in results.get("transfer", {}).items():
        console.print(
            f"{escape(model)}, trained on {figures['trained_on']}: {Estimate(**figures['outcome']).signed} in outcome over the other sets "
            f"({', '.join(figures['other_sets'])})"
        )


def _rows(figures: dict[str, Any], models: list[str]) -> Iterator[tuple[str, list[str]]]:
    of = [figures["models"][model] for model in models]

    def each(show: Callable[[dict[str, Any]], str]) -> list[str]:
        return [show(one) for one in of]

    def difference(kind: str) -> list[str]:
        found = (figures["differences"].get(model) for model in models)
        return ["" if one is None else Estimate(**one[kind]).signed for one in found]

    yield "outcome", each(lambda one: str(Estimate(**one["outcome"])))
    if figures["differences"]:
        yield "  difference", difference("outcome")
    for name in list(of[0]["metrics"])[1:]:
        yield name, each(lambda one, name=name: str(Estimate(**one["metrics"][name])))  # type: ignore[misc]
    for name in of[0].get("overlap", {}):
        yield f"words: {name}", each(lambda one, name=name: str(Estimate(**one["overlap"][name])))  # type: ignore[misc]
    for kind in ("pass", "majority"):
        for k in of[0].get(kind, {}):
            yield f"{kind}@{k}", each(lambda one, at=(kind, k): str(Estimate(**one[at[0]][at[1]])))  # type: ignore[misc]
    yield "process score", each(lambda one: str(Estimate(**one["process"])))
    if figures["differences"]:
        yield "  difference", difference("process")
    yield "malformed actions", each(lambda one: str(Estimate(**one["malformed"])))
    for tool in sorted({tool for one in of for tool in one["tools"]}):
        yield f"{tool}: calls, errors, repeated", each(lambda one, tool=tool: _tool(one["tools"].get(tool)))  # type: ignore[misc]
    yield "steps", each(lambda one: str(Estimate(**one["steps"])))
    yield (
        "sampled tokens",
        each(lambda one: "unknown" if one["cost"]["tokens"] is None else f"{one['cost']['tokens']:,}"),
    )
    yield (
        "seconds an episode",
        each(lambda one: "unknown" if (s := one["cost"]["seconds_an_episode"]) is None else f"{s:.3g}"),
    )


def _tool(figures: dict[str, Any] | None) -> str:
    return "0" if figures is None else f"{figures['calls']:,}, {figures['errors']:.0%}, {figures['repeated']:.0%}"
