"""`swirl export`: what other programs read. A model folder for plain transformers, and rows for Hugging Face `datasets` in the
formats of TRL (its trainers read them as they are):

    prompt-completion   a row a step: `prompt` (messages of the state) and `completion` (the action), in the words of the grammar
    messages            a row a trajectory: `messages` with native tool calls, whatever the grammar, and `tools` (function schemas)
    stepwise            a row a trajectory: `prompt`, `completions` (texts of the steps), `labels` (whether each is good)

In `messages` the user asks the bare question, since the prompt of an environment describes its own grammar, and what it says beside
results (that one step is left) is left out. In `stepwise` a step begins with the observation before it, so that prompt and steps
joined by newlines are the transcript, and an action's end is where its label belongs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swirl_algos import stages
from swirl_algos.folders import complete
from swirl_algos.launch import judged_file

from swirl_env.errors import ConfigError, UnknownNameError, near
from swirl_env.io import read
from swirl_env.types import Message, Step, Trajectory

Row = dict[str, Any]


def prompt_completion(trajectory: Trajectory) -> list[Row]:
    """Each action after what the policy had read."""
    return [
        {"prompt": _messages(state.messages), "completion": _messages((Message("assistant", step.action.text),))}
        for state, step in zip(trajectory.states(), trajectory.steps, strict=True)
    ]


def messages(trajectory: Trajectory) -> list[Row]:
    """The whole trajectory as a chat with tool calls."""
    said = [turn for step in trajectory.steps for turn in _turns(step)]
    tools = list(trajectory.env.tools)
    return (
        [{"messages": [{"role": "user", "content": trajectory.task.question}, *said], "tools": tools}] if said else []
    )


def stepwise(trajectory: Trajectory) -> list[Row]:
    """The steps with the judge's word on each; no row where one is unknown."""
    labels = [step.verdict and step.verdict.good for step in trajectory.steps]
    if not labels or None in labels:
        return []
    before = ["", *(f"{step.observation}\n" for step in trajectory.steps)]
    steps = [seen + step.action.text for seen, step in zip(before, trajectory.steps, strict=False)]
    return [{"prompt": trajectory.states()[0].text, "completions": steps, "labels": labels}]


FORMATS: dict[str, Callable[[Trajectory], list[Row]]] = {
    "prompt-completion": prompt_completion,
    "messages": messages,
    "stepwise": stepwise,
}


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written from what."""

    source: Path
    rows: int
    left_out: int
    """Trajectories without a step, or (stepwise) with an unknown verdict."""


def export_rows(run: Path, out: Path, form: str) -> Exported:
    """Write a run's trajectories as rows, whole or not at all.

    Args:
        run: a run folder, whose kept trajectories (stepwise: all judged ones, good and bad) are taken; or a file of trajectories.
        out: .jsonl, or .parquet (needs `datasets`); must not exist yet.
        form: one of `FORMATS`.

    Raises:
        UnknownNameError: no such format. ConfigError: nothing to write, or no place for it.
    """
    if form not in FORMATS:
        raise UnknownNameError(f"No format is called {form!r}.{near(form, FORMATS)}")
    if out.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"The name of the file says its kind: it ends in .jsonl or .parquet, got {out}.")
    _check_new(out)
    source = _source(run, form)
    trajectories = list(read(source, Trajectory))
    made = [FORMATS[form](trajectory) for trajectory in trajectories]
    rows = [row for some in made for row in some]
    if not rows:
        cause = "has a known verdict on every step" if form == "stepwise" else "has a step"
        raise ConfigError(f"None of the {len(made)} trajectories in {source} {cause}. Judge them, or generate others.")
    if out.suffix == ".jsonl":
        stages.rewrite(out, rows)
    else:
        _write_parquet(out, rows)
    return Exported(source, len(rows), made.count([]))


def export_model(model: str, out: Path) -> None:
    """A model as a plain folder for `from_pretrained`, in fp32, a LoRA adapter merged; whole or not at all.

    Raises:
        ConfigError: `model` is a run folder, or `out` is there already. Else as `models.load_model`.
    """
    from swirl_agents.models import load_model
    from swirl_algos import checkpoints

    folder = Path(model)
    if (folder / "run.json").exists() and not complete(folder):
        found = ", ".join(sorted(str(path) for path in folder.iterdir() if complete(path))) or "none yet"
        raise ConfigError(f"{model} is a run folder. Name a model in it: {found}.")
    _check_new(out)
    loaded, tokenizer = load_model(model, device="cpu")
    checkpoints.write_folder(out, lambda part: checkpoints.save_model(loaded, tokenizer, part))


def _turns(step: Step) -> list[Row]:
    action = step.action
    if action.calls:
        calls = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in action.calls]
        results = [
            {"role": "tool", "name": call.name, "content": result.text}
            for call, result in zip(action.calls, step.results, strict=True)
        ]
        return [{"role": "assistant", "content": action.thought, "tool_calls": calls}, *results]
    if action.answer is not None:
        thought = {"reasoning_content": action.thought} if action.thought else {}
        return [{"role": "assistant", "content": action.answer, **thought}]
    said = {"role": "assistant", "content": action.text if action.malformed else action.thought}
    return [said, {"role": "user", "content": step.observation}] if step.observation else [said]


def _messages(given: tuple[Message, ...]) -> list[Row]:
    return [{"role": message.role, "content": message.content} for message in given]


def _source(run: Path, form: str) -> Path:
    if run.is_file():
        return run
    if not run.is_dir():
        raise ConfigError(f"There is no {run}. Give a run folder, or a file of trajectories (JSONL).")
    if form == "stepwise":
        return judged_file(run)
    if not (run / "kept.jsonl").exists():
        raise ConfigError(
            f"There is no kept.jsonl in {run}. Filter first: swirl filter {run}; or name a file in place of the folder, such as "
            f"{run / 'trajectories.jsonl'}."
        )
    return run / "kept.jsonl"


def _check_new(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"{out} exists already. Give another place, or remove it.")


def _write_parquet(out: Path, rows: list[Row]) -> None:
    from datasets import Dataset

    part = out.with_name(out.name + ".part")
    out.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(part)
    part.replace(out)
