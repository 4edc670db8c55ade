"""The adapter against the installed verifiers: its own evaluation plays, a server on 127.0.0.1 is the model."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swirl_env.errors import ConfigError

pytest.importorskip("verifiers.v1", reason="needs the extra `verifiers`")
import verifiers.v1 as vf  # noqa: E402
from swirl_agents.testing_server import ChatServer  # noqa: E402
from swirl_benchmarks.export import TRACE_VERSION, export_rows  # noqa: E402
from verifiers.v1.cli.eval.runner import run_eval  # noqa: E402
from verifiers.v1.configs.cli.eval import EvalConfig  # noqa: E402
from verifiers.v1.utils.trace_store import read_episodes  # noqa: E402

from swirl_env.adapters.verifiers import SwirlConfig, SwirlTask, SwirlTaskset  # noqa: E402


def calls(*made):
    """An assistant message with tool calls."""
    return {
        "content": "let me see",
        "tool_calls": [
            {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for i, (name, arguments) in enumerate(made)
        ],
    }


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Plays tasks by verifiers' evaluation (the `null` harness, in a subprocess); the model's k-th message on a question is the k-th
    of its script, and the last one again. Returns the traces by task id, read back from `traces.jsonl`, and the server."""
    monkeypatch.chdir(tmp_path)
    Path("swirl_tasks.py").write_text(
        'from swirl_env.adapters.verifiers import SwirlTaskset\n\n__all__ = ["SwirlTaskset"]\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # for uv
    monkeypatch.setenv("SWIRL_TEST_SECRET", "none")
    monkeypatch.delitem(sys.modules, "swirl_tasks", raising=False)

    def run(env, scripts, **kwargs):
        questions = {task.data.prompt: task.data.id for task in SwirlTaskset(SwirlConfig(env=env, kwargs=kwargs))}

        def reply(body):
            user = next(message["content"] for message in body["messages"] if message["role"] == "user")
            script = scripts[questions[user]]
            return script[min(sum(m["role"] == "assistant" for m in body["messages"]), len(script) - 1)]

        with ChatServer(reply) as server:
            config = EvalConfig.model_validate({
                "env": {
                    "taskset": {"id": "swirl_tasks", "env": env, "kwargs": kwargs},
                    "agent": {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}},
                },
                "model": "test", "client": {"base_url": server.url, "api_key_var": "SWIRL_TEST_SECRET"}, "push": False, "rich": None,
                "select": {"include": {"ids": list(scripts)}}, "output_dir": tmp_path, "run": {"dir": "run"},
            })  # fmt: skip
            asyncio.run(run_eval(config))
        episodes = read_episodes(tmp_path / "run", vf.WireTrace)
        assert all(episode.ok for episode in episodes), [episode.traces[0].errors for episode in episodes]
        return {episode.task.data.id: episode.traces[0] for episode in episodes}, server

    return run


def test_rollouts_are_scored_by_the_environment(evaluate):
    good, wrong, endless = "gsm8k-train-170", "gsm8k-train-0", "gsm8k-train-1"
    traces, server = evaluate(
        "swirl/GSM8K-v0",
        {
            good: [calls(("calculator", {"expression": "10+3"})), "38"],
            wrong: [calls(("calculator", {"expression": "1/0"}), ("calculator", {"wrong": 1})), "I do not know"],
            endless: [calls(("calculator", {"expression": "10+3"}))],
        },
        max_steps=3,
    )
    [tool] = server.bodies[0]["tools"]
    assert tool["function"]["name"] == "calculator"
    assert tool["function"]["parameters"]["required"] == ["expression"]
    one = traces[good]
    assert one.rewards["outcome"].score == 1.0 and one.metrics["steps"] == 2 and one.info["stop"] == "answered"
    # as the environment itself rewards these actions
    import gymnasium as gym

    env = gym.make("swirl/GSM8K-v0", grammar="openai", max_steps=3)
    env.reset(options={"task_id": good})
    actions = [calls(("calculator", {"expression": "10+3"})), {"content": "38"}]
    rewards = [env.step(json.dumps({"role": "assistant"} | action))[1] for action in actions]
    assert one.info["turn_rewards"] == rewards
    assert one.rewards["process"].score == pytest.approx(sum(rewards) / 2)
    said = [node.message.content for node in traces[wrong].nodes if node.message.role == "tool"]
    assert len(said) == 2 and all(text.startswith("error: ") for text in said) and "takes expression" in said[1]
    assert traces[wrong].rewards["outcome"].score == 0.0
    assert traces[endless].stop_condition == "step_limit" and traces[endless].info["stop"] == "step_limit"
    assert traces[endless].rewards["outcome"].score == 0.0 and traces[endless].metrics["steps"] == 3


def test_one_tool_server_searches_in_each_tasks_own_paragraphs(evaluate):
    tasks = [task.data.id for task in SwirlTaskset(SwirlConfig(env="swirl/HotPotQA-v0")).take(2)]
    traces, _ = evaluate("swirl/HotPotQA-v0", {task: [calls(("search", {"query": "the"})), "yes"] for task in tasks})
    import gymnasium as gym

    env = gym.make("swirl/HotPotQA-v0").unwrapped
    found = [next(n.message.content for n in traces[task].nodes if n.message.role == "tool") for task in tasks]
    for task, text in zip(tasks, found, strict=True):
        assert text.split("\n")[0] in {document.title for document in env.task_set.documents(task)}
    assert found[0] != found[1]


def test_a_trace_is_scored_again_without_a_rollout_and_unknown_is_no_zero(monkeypatch):
    task = next(iter(SwirlTaskset(SwirlConfig())))
    trace = vf.Trace[type(task.data), vf.State, vf.AgentConfig](
        task=vf.TraceTask(type="SwirlTask", data=task.data), agent=vf.AgentInfo(config=vf.AgentConfig())
    )
    answer = {"role": "assistant", "content": "72"}
    trace.nodes = [
        vf.MessageNode(message=vf.UserMessage(content=task.data.prompt)),
        vf.MessageNode(message=vf.AssistantMessage.model_validate(answer), parent=0, sampled=True),
    ]
    import swirl_env.adapters.verifiers as adapter

    made = adapter.make_env

    def silent(*arguments):
        env = made(*arguments)
        env.unwrapped.set_judge(Silent())
        return env

    monkeypatch.setattr(adapter, "make_env", silent)
    asyncio.run(SwirlTask(task.data, adapter.SwirlTaskConfig(outcome_weight=2.0)).score(trace))
    assert set(trace.rewards) == {"outcome"} and trace.rewards["outcome"].weight == 2.0
    assert trace.metrics == {"steps": 1.0, "unknown": 1.0} and trace.info["turn_rewards"] == [None]


class Silent:
    name, uses_gold = "silent@1", False

    def __call__(self, views):
        from swirl_env.types import Verdict

        return [Verdict(None, "no idea", self.name) for _ in views]


def test_what_cannot_work_is_told():
    with pytest.raises(ConfigError, match="grammar= cannot be chosen here"):
        list(SwirlTaskset(SwirlConfig(kwargs={"grammar": "react"})))
    with pytest.raises(ConfigError, match="Did you mean 'max_steps'"):
        list(SwirlTaskset(SwirlConfig(kwargs={"max_step": 3})))
    with pytest.raises(ConfigError, match="over ToolEnv"):
        list(SwirlTaskset(SwirlConfig(env="CartPole-v1")))


def test_exported_traces_are_read_by_verifiers(made, tmp_path):
    import numpy as np
    from swirl_algos import stages

    from swirl_env.types import Tokens

    ids = np.arange(6, dtype=np.int32)
    tokens = Tokens(ids, ids > 3, np.where(ids > 3, -0.25, 0).astype(np.float32))
    one = made(scores=(1.0,), tokens=tokens)
    stages.rewrite(tmp_path / "run.jsonl", [one, made("2", scores=(None, 0.5), outcome=None)])
    export_rows(tmp_path / "run.jsonl", tmp_path / "traces.jsonl", "verifiers")
    assert TRACE_VERSION == vf.TRACE_VERSION
    episodes = read_episodes(tmp_path, vf.WireTrace)
    first, second = (episode.traces[0] for episode in episodes)
    want = [(message.role, message.content) for message in one.states()[-1].messages]
    said = [(message.role, message.content) for message in first.branches[0].messages]
    assert said == [*want, ("assistant", one.steps[-1].action.text)]
    assert first.branches[0].token_ids == ids.tolist()
    assert first.branches[0].sampled_mask == tokens.sampled.tolist()
    assert first.branches[0].logprobs == pytest.approx(tokens.logprobs.tolist())
    assert first.reward == 2.0 and first.info["turn_rewards"] == [1.0, None] and first.num_turns == 2
    assert second.rewards["outcome"] is None and second.rewards["process"].score == 0.5
    assert second.metrics == {"steps": 3.0, "unknown": 2.0}
    assert first.task.data.model_extra["answers"] == ["Tim Burton"]


def test_the_page_runs(page, tmp_path):
    (_, module), (_, command) = page("verifiers")
    (tmp_path / "swirl_tasks.py").write_text(module)
    with ChatServer("72") as server:
        for old, new in (("http://127.0.0.1:8000/v1", server.url), ("Qwen/Qwen3-0.6B", "test"), ("-n 4", "-n 1")):
            assert old in command
            command = command.replace(old, new)
        path = os.environ.get("PYTHONPATH", "")
        command = command.replace("PYTHONPATH=.", f"PYTHONPATH=.:{path}")
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "SWIRL_API_KEY": "none",
        }
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stderr[-2000:]
    [written] = (tmp_path / "outputs").glob("*/traces.jsonl")
    [episode] = read_episodes(written.parent, vf.WireTrace)
    assert episode.traces[0].rewards["outcome"].score in (0.0, 1.0)
