"""`swirl export`: what other programs read. A model folder for plain transformers, and rows for Hugging Face `datasets`, the first
three in the formats of TRL (its trainers read them as they are):

    prompt-completion   a row a step: `prompt` (messages of the state) and `completion` (the action), in the words of the grammar
    messages            a row a trajectory: `messages` with native tool calls, whatever the grammar, and `tools` (function schemas)
    stepwise            a row a trajectory: `prompt`, `completions` (texts of the steps), `labels` (whether each is good)
    verl                a row a question: `data_source`, `prompt`, `ability`, `reward_model`, `extra_info` (verl's data sets)
    verifiers           a row a trajectory: an episode with its trace, what verifiers 0.4 keeps in `traces.jsonl`

In `messages` the user asks the bare question, since the prompt of an environment describes its own grammar, and what it says beside
results (that one step is left) is left out. In `stepwise` a step begins with the observation before it, so that prompt and steps
joined by newlines are the transcript, and an action's end is where its label belongs. In `verl` the data sources of HotpotQA and MuSiQue
have the names under which verl's own exact match (`search_r1_like_qa_em`, which reads `<answer>`) is found; others need a
`custom_reward_function`. In `verifiers` messages are in the words of the grammar; the tokens of a step, prompt or observation
included, stand on the action's node.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swirl_algos import stages
from swirl_algos.folders import complete
from swirl_algos.launch import judged_file

import swirl_env
from swirl_env.errors import ConfigError, UnknownNameError, near
from swirl_env.io import read
from swirl_env.types import Message, Step, Task, Trajectory

Row = dict[str, Any]
TRACE_VERSION = 1
"""Of verifiers' trace schema."""
SEARCH_R1 = {"swirl/HotPotQA-v0": "searchR1_hotpotqa", "swirl/MuSiQue-v0": "searchR1_musique"}
"""Environment -> the name under which verl scores it by itself."""


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


def verl(trajectory: Trajectory) -> list[Row]:
    """The question, to be played again."""
    env = trajectory.env
    tools = {schema["function"]["name"] for schema in env.tools}
    return [_verl(env.id, env.kwargs, tools, trajectory.task, _messages(trajectory.prompt))]


def verifiers(trajectory: Trajectory) -> list[Row]:
    """The trajectory as verifiers would have recorded it."""
    nodes = [_node(message, i - 1) for i, message in enumerate(trajectory.prompt)]
    for step in trajectory.steps:
        nodes.append(_node(Message("assistant", step.action.text), len(nodes) - 1) | {"sampled": True})
        if step.tokens is not None:
            tokens = step.tokens
            nodes[-1] |= {
                "token_ids": tokens.ids.tolist(), "mask": tokens.sampled.tolist(), "logprobs": tokens.logprobs[tokens.sampled].tolist(),
            }  # fmt: skip
        if step.observation:
            nodes.append(_node(Message("user", step.observation), len(nodes) - 1))
    scores = [None if step.verdict is None else step.verdict.score for step in trajectory.steps]
    known = [score for score in scores if score is not None]
    task = trajectory.task
    of = {
        "type": "SwirlTrajectory", "key": f"{trajectory.env.id}/{task.id}",
        "data": {
            "id": task.id, "name": task.id, "prompt": trajectory.prompt[-1].content, "env": trajectory.env.id,
            "kwargs": json.dumps(trajectory.env.kwargs, sort_keys=True), "question": task.question, "answers": list(task.answers),
        },
    }  # fmt: skip
    rewards = {"outcome": trajectory.outcome, "process": sum(known) / len(known) if known else None}
    ok, name = trajectory.stop != "error", f"{trajectory.env.id}/{trajectory.id}"
    trace = {
        "version": TRACE_VERSION, "id": name, "verifiers": {"version": f"swirl-env {swirl_env.__version__}"}, "task": of,
        "agent": {"config": {"model": trajectory.policy}},
        "tools": [schema["function"] for schema in trajectory.env.tools], "nodes": nodes,
        "rewards": {key: None if score is None else {"score": score, "weight": 1.0} for key, score in rewards.items()},
        "metrics": {"steps": len(scores), "unknown": len(scores) - len(known)},
        "info": {"turn_rewards": scores, "seed": trajectory.seed, "sample": trajectory.sample, "round": trajectory.round},
        "is_completed": True, "ok": ok, "stop_condition": trajectory.stop, "timing": {"start": 0.0},
    }  # fmt: skip
    return [{"id": name, "env": {"id": "swirl-env"}, "task": of, "ok": ok, "traces": [trace]}]


FORMATS: dict[str, Callable[[Trajectory], list[Row]]] = {
    "prompt-completion": prompt_completion,
    "messages": messages,
    "stepwise": stepwise,
    "verl": verl,
    "verifiers": verifiers,
}


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written from what."""

    source: Path
    rows: int
    left_out: int
    """Trajectories without a step, or (stepwise) with an unknown verdict, or (verl) of a question that has its row."""


def export_rows(run: Path, out: Path, form: str) -> Exported:
    """Write a run's trajectories as rows, whole or not at all.

    Args:
        run: a run folder, whose kept trajectories (stepwise, verifiers: all judged ones, good and bad) are taken; or a file of trajectories.
        out: .jsonl, or .parquet (needs `datasets`; not for verifiers); must not exist yet.
        form: one of `FORMATS`.

    Raises:
        UnknownNameError: no such format. ConfigError: nothing to write, or no place for it.
    """
    if form not in FORMATS:
        raise UnknownNameError(f"No format is called {form!r}.{near(form, FORMATS)}")
    kinds = (".jsonl",) if form == "verifiers" else (".jsonl", ".parquet")
    _check_kind(out, kinds)
    source = _source(run, form)
    trajectories = list(read(source, Trajectory))
    made = [FORMATS[form](trajectory) for trajectory in trajectories]
    if form == "verl":
        made = _numbered(made)
    rows = [row for some in made for row in some]
    if not rows:
        cause = "has a known verdict on every step" if form == "stepwise" else "has a step"
        raise ConfigError(f"None of the {len(made)} trajectories in {source} {cause}. Judge them, or generate others.")
    _write(out, rows)
    return Exported(source, len(rows), made.count([]))


def export_tasks(env_id: str, out: Path, kwargs: Mapping[str, Any]) -> int:
    """Write an environment's questions as rows for verl, whole or not at all.

    Args:
        env_id: a registered id.
        out: .jsonl, or .parquet (needs `datasets`); must not exist yet.
        kwargs: of `gym.make`.

    Returns:
        Rows written.
    """
    from swirl_benchmarks import evaluate

    _check_kind(out, (".jsonl", ".parquet"))
    env = evaluate.make(env_id, **kwargs)
    base: Any = env.unwrapped
    rows = []
    for task_id, task in base.task_set.tasks.items():
        _, info = env.reset(options={"task_id": task_id})
        prompt = _messages(info["transcript"].messages)
        rows.append([_verl(env_id, base.record.kwargs, set(base.tools), task, prompt)])
    _write(out, [row for some in _numbered(rows) for row in some])
    return len(rows)


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


def _verl(env_id: str, kwargs: Mapping[str, Any], tools: set[str], task: Task, prompt: list[Row]) -> Row:
    return {
        "data_source": SEARCH_R1.get(env_id, env_id), "prompt": prompt, "ability": "math" if tools == {"calculator"} else "qa",
        "reward_model": {"style": "rule", "ground_truth": {"target": list(task.answers)}},
        "extra_info": {"split": str(kwargs.get("split")), "index": 0, "task_id": task.id, "env": env_id, "question": task.question},
    }  # fmt: skip


def _numbered(made: Sequence[list[Row]]) -> list[list[Row]]:
    """Each question once, counted from 0."""
    once: dict[tuple[str, str], Row] = {}
    kept: list[list[Row]] = []
    for rows in made:
        fresh = [row for row in rows if (row["extra_info"]["env"], row["extra_info"]["task_id"]) not in once]
        for row in fresh:
            row["extra_info"]["index"] = len(once)
            once[row["extra_info"]["env"], row["extra_info"]["task_id"]] = row
        kept.append(fresh)
    return kept


def _node(message: Message, parent: int) -> Row:
    """A message of a trace; when it was said is not known."""
    said = {"role": message.role, "content": message.content}
    return {"parent": parent if parent >= 0 else None, "message": said, "timestamp": 0.0}


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
    if form in ("stepwise", "verifiers"):
        return judged_file(run)
    if not (run / "kept.jsonl").exists():
        raise ConfigError(
            f"There is no kept.jsonl in {run}. Filter first: swirl filter {run}; or name a file in place of the folder, such as "
            f"{run / 'trajectories.jsonl'}."
        )
    return run / "kept.jsonl"


def _check_kind(out: Path, kinds: tuple[str, ...]) -> None:
    if out.suffix not in kinds:
        raise ConfigError(f"The name of the file says its kind: it ends in {' or '.join(kinds)}, got {out}.")
    _check_new(out)


def _check_new(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"{out} exists already. Give another place, or remove it.")


def _write(out: Path, rows: list[Row]) -> None:
    if out.suffix == ".jsonl":
        stages.rewrite(out, rows)
    else:
        _write_parquet(out, rows)


def _write_parquet(out: Path, rows: list[Row]) -> None:
    from datasets import Dataset

    part = out.with_name(out.name + ".part")
    out.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(part)
    part.replace(out)
