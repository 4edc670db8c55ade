"""The policy against a real model server: `transformers serve` with the default model, over the loopback."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import gymnasium as gym
import pytest
from swirl_agents.endpoint import EndpointPolicy
from swirl_agents.rollout import rollout

import swirl_env  # noqa: F401
from swirl_env.client import ChatClient, make_endpoint
from swirl_env.errors import ConfigError
from swirl_env.judges import ask
from swirl_env.judges.model import ModelJudge
from swirl_env.types import Action, Message, StepView, Transcript

pytestmark = pytest.mark.slow
SAMPLED = {"generation_config": '{"do_sample": true, "eos_token_id": 2, "pad_token_id": 2}'}  # its default is greedy


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, model) of a running server."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="transformers serve needs it: pip install 'transformers[serving]'")
    from swirl_agents.models import _converted

    try:
        model = str(_converted())
    except ConfigError as missing:
        pytest.skip(str(missing))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    serve = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", model]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*serve, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        for _ in range(360):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        process.terminate()
        process.wait(30)


def test_a_real_model_answers(server):
    url, model = server
    client = make_endpoint(f"endpoint:{url}#{model}", temperature=0.0, max_new_tokens=24, timeout=120)
    client.check()
    transcript = Transcript((Message("user", "What is the capital of France? Answer in one sentence."),), ("Paris",))
    [[completion]] = client([transcript])
    assert completion.finish == "stop", completion.text
    assert completion.text.endswith("Paris")
    assert client.usage.completion_tokens >= 5


def test_n_samples_are_draws_of_their_own(server):
    url, model = server
    client = ChatClient(url, model, max_new_tokens=12, timeout=120, extra=SAMPLED, concurrency=1)
    transcript = Transcript((Message("user", "Write a story about a dog."),), (), 7)
    [first], [again] = client([transcript], 3), client([transcript], 3)
    assert len({completion.text for completion in first}) > 1
    assert first == again, "the same seeds draw the same"
    assert all(completion.finish in ("length", "eos") for completion in first)


def test_a_real_model_plays(server):
    def make():
        return gym.make("swirl/GSM8K-v0", max_steps=2)

    url, model = server
    env = make()
    policy = EndpointPolicy(ChatClient(url, model, max_new_tokens=24, timeout=120), env.unwrapped.grammar)
    [trajectory] = rollout(make, policy, [(next(iter(env.unwrapped.task_set.tasks)), 0)])
    assert trajectory.stop in ("answered", "step_limit")
    assert trajectory.steps
    assert trajectory.policy == f"endpoint:{model}"


def test_a_model_that_it_does_not_have(server):
    with pytest.raises(ConfigError, match="has no such model"):
        ChatClient(server[0], "nope", timeout=60, retries=1).check()


def test_a_real_model_judges(server):
    url, model = server
    judge = ModelJudge(ChatClient(url, model, temperature=0.0, max_new_tokens=24, timeout=120))
    views = [
        StepView("What is 2+3?", (), Action(text, "", (), answer), 3)
        for text, answer in (("<answer>5</answer>", "5"), ("<answer>9</answer>", "9"))
    ]
    verdicts = ask(judge, views)
    assert len(verdicts) == 2
    for verdict in verdicts:  # so small a model seldom ends in GOOD or BAD: then it is unknown, and says why
        assert verdict.score in (None, 0.0, 1.0)
        assert verdict.score is not None or "does not end in GOOD or BAD" in verdict.reason
        assert verdict.judge == f"model:endpoint:{model}@2"
