"""OpenEnv both ways: our environments behind its protocol, its environments behind Gymnasium's.

`make_app` serves an environment (`swirl serve` puts it on a socket, with limits), `SwirlClient` is the typed client of it, and
`from_openenv` makes a `gymnasium.Env` of any OpenEnv server: one that plays an environment of ours gives back its whole `info`,
so wrappers and `rollout` go on working. Written against openenv 0.10.

What a server sends never holds a gold answer while the episode runs: no task, and of a judge that sees the gold only the score.
"""

import json
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import gymnasium as gym
import requests
from gymnasium.error import ResetNeeded
from gymnasium.utils import EzPickle
from pydantic import Field, TypeAdapter

from swirl_env.errors import ConfigError, SwirlError, UnknownNameError
from swirl_env.registration import REMOTE
from swirl_env.spaces import Unicode
from swirl_env.transport import without_credentials
from swirl_env.types import EnvRecord, Message, Step, Task, Transcript

try:
    from openenv.core.client_types import StepResult
    from openenv.core.env_client import EnvClient
    from openenv.core.env_server.http_server import create_fastapi_app
    from openenv.core.env_server.interfaces import Environment
    from openenv.core.env_server.types import Action, ConcurrencyConfig, EnvironmentMetadata, Observation, State
    from openenv.core.generic_client import GenericEnvClient
    from websockets.exceptions import ConnectionClosed
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "swirl_env.adapters.openenv needs openenv: pip install 'swirl-env[openenv]'.", name=error.name
    ) from None

STEP: TypeAdapter[Step] = TypeAdapter(Step)
TASK: TypeAdapter[Task] = TypeAdapter(Task)
MAX_EPISODE_ID = 255
"""Characters of a client's name for its episode, as in OpenEnv's own HTTP request."""


class TextAction(Action):
    text: str = Field(description="A thought, tool calls or an answer, in the environment's grammar.")


class TextObservation(Observation):
    """`done` and `reward` (`None` after a reset) are OpenEnv's own; `done` is `terminated or truncated`."""

    text: str = Field(description="The text so far, tool results appended: what the local environment returns.")
    messages: list[dict[str, str]] = Field(default=[], description="The same as chat messages: role and content.")
    stop: list[str] = Field(default=[], description="Strings after which nothing more of an action is read.")
    terminated: bool = Field(default=False, description="The episode ended by an answer.")
    truncated: bool = Field(default=False, description="It ended otherwise.")
    task_id: str | None = None
    step: dict[str, Any] | None = Field(
        default=None, description="The step just taken: action as parsed, tool results, verdict. None after a reset."
    )
    outcome: float | None = Field(
        default=None, description="The official metric in [0, 1] at the end; None before it, or where it is unknown."
    )


class TextState(State):
    """`episode_id` and `step_count` are OpenEnv's own."""

    env: str = Field(default="", description="The id of the environment that is served.")
    grammar: str | None = None
    tools: list[dict[str, Any]] = Field(default=[], description="OpenAI function schemas of the tools.")
    stop_reason: str | None = Field(default=None, description="Why the episode ended; None: it has not.")
    task: dict[str, Any] | None = Field(
        default=None, description="Id and question; the gold answers and facts only once the episode is over."
    )


class ServedEnv(Environment):
    """One session over one environment, which its first reset makes.

    Args:
        make_env: makes an environment whose actions and observations are text.
    """

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, make_env: Callable[[], gym.Env]):
        super().__init__()
        self._make_env = make_env
        self._episode: str | None = None
        self._steps = 0

    @cached_property
    def _env(self) -> gym.Env:
        env = self._make_env()
        for space in (env.action_space, env.observation_space):
            if not isinstance(space, Unicode | gym.spaces.Text):
                env.close()
                raise ConfigError(f"An environment of text can be served; actions or observations of this are {space}.")
        return env

    def reset(
        self, /, seed: int | None = None, episode_id: str | None = None, task_id: str | None = None, **others: Any
    ) -> TextObservation:
        """Begin an episode.

        Args:
            seed: of the draw of the task; 0 or more.
            episode_id: the client's own name for the episode, told again in the state; it changes nothing.
            task_id: which task; `None`: a random one.

        Raises:
            ConfigError: anything else was asked for.
        """
        if others:
            raise ConfigError(
                f"A remote reset takes seed and task_id (and episode_id, a name of yours), got {', '.join(map(repr, others))}. "
                "Everything else is set where the environment is served."
            )
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise ConfigError(f"seed must be a whole number of 0 or more, got {_short(seed)}.")
        if task_id is not None and not isinstance(task_id, str):
            raise ConfigError(f"task_id must be the id of a task, got {_short(task_id)}.")
        if episode_id is not None and not (isinstance(episode_id, str) and len(episode_id) <= MAX_EPISODE_ID):
            raise ConfigError(
                f"episode_id must be text of up to {MAX_EPISODE_ID} characters, got {_short(episode_id)}."
            )
        text, info = self._env.reset(seed=seed, options=None if task_id is None else {"task_id": task_id})
        self._episode, self._steps = episode_id or str(uuid.uuid4()), 0
        return self._observation(text, info)

    def step(self, action: TextAction, timeout_s: float | None = None, **_: Any) -> TextObservation:
        """Take one action.

        Raises:
            ConfigError: no episode is running in this session.
        """
        if self._episode is None:
            raise ConfigError(
                "Reset first. Over plain HTTP each request has a session of its own, so episodes are played over /ws."
            )
        try:
            text, reward, terminated, truncated, info = self._env.step(_sendable(action.text))
        except ResetNeeded as error:
            raise ConfigError(str(error)) from None
        self._steps += 1
        return self._observation(
            text, info, float(reward), terminated=terminated, truncated=truncated, done=terminated or truncated
        )

    def _observation(
        self, text: str, info: dict[str, Any], reward: float | None = None, **ends: bool
    ) -> TextObservation:
        transcript, step, done = info.get("transcript"), info.get("step"), ends.get("done", False)
        judge = getattr(self._env.unwrapped, "judge", None)
        if step is not None and step.verdict is not None and getattr(judge, "uses_gold", False) and not done:
            step = replace(step, verdict=replace(step.verdict, reason="not told while the episode runs", parts={}))
        return TextObservation(
            text=text,
            messages=[{"role": one.role, "content": one.content} for one in transcript.messages] if transcript else [],
            stop=list(transcript.stop) if transcript else [],
            task_id=info.get("task_id"),
            step=None if step is None else STEP.dump_python(step, mode="json"),
            outcome=info.get("outcome") if done else None,
            reward=reward,
            **ends,
        )

    @property
    def state(self) -> TextState:
        state = TextState(episode_id=self._episode, step_count=self._steps)
        if self._episode is None:
            return state
        base: Any = self._env.unwrapped
        state.env = self._env.spec.id if self._env.spec else type(base).__name__
        task: Task | None = getattr(base, "task", None)
        if task is not None:
            shown = task if base.stop is not None else Task(task.id, task.question, ())
            state.task, state.stop_reason = TASK.dump_python(shown, mode="json"), base.stop
            state.grammar, state.tools = base.record.grammar, list(base.record.tools)
        return state

    def list_splits(self) -> list[str]:
        return [self._tasks.split]

    def list_tasks(self, split: str) -> list[dict[str, str]]:
        """Ids and questions."""
        return [{"id": task.id, "question": task.question} for task in self._of(split).values()]

    def num_tasks(self, split: str) -> int:
        return len(self._of(split))

    @property
    def _tasks(self) -> Any:
        task_set = getattr(self._env.unwrapped, "task_set", None)
        if task_set is None:
            raise NotImplementedError
        return task_set

    def _of(self, split: str) -> Mapping[str, Task]:
        if split != self._tasks.split:
            raise UnknownNameError(f"The split {self._tasks.split!r} is served, got {_short(split)}.")
        return self._tasks.tasks

    def get_metadata(self) -> EnvironmentMetadata:
        import swirl_env

        spec = self._env.spec
        name = spec.id if spec else type(self._env.unwrapped).__name__
        described = f"{name} of swirl-env: questions over several steps, with tools and a process reward."
        return EnvironmentMetadata(name=name, description=described, version=swirl_env.__version__)

    def close(self) -> None:
        env = self.__dict__.pop("_env", None)
        self._episode = None
        if env is not None:
            env.close()


def make_app(make_env: Callable[[], gym.Env], *, max_sessions: int = 64, idle: float = 600.0) -> Any:
    """OpenEnv's own FastAPI application over an environment: `/ws` (sessions), `/health`, `/schema`, `/metadata`, tasks.

    It trusts who asks: `swirl serve` is this behind a token or the loopback, with limits on messages and connections. OpenEnv's
    web page stays off.

    Args:
        make_env: makes one environment of text, a new one at each call; each session has its own.
        max_sessions: sessions at once; a further one is told so and closed.
        idle: seconds without a reset or step after which a session is ended.

    Raises:
        ConfigError: the environment is not one of text.
    """
    from fastapi import Request
    from fastapi.responses import JSONResponse

    first = ServedEnv(make_env)
    name = first.get_metadata().name.rpartition("/")[2]
    first.close()
    limits = ConcurrencyConfig(max_concurrent_envs=max_sessions, session_timeout=idle)
    app = create_fastapi_app(
        partial(ServedEnv, make_env), TextAction, TextObservation, concurrency_config=limits, env_name=name,
        state_cls=TextState, mode="simulation",
    )  # fmt: skip

    @app.exception_handler(SwirlError)
    async def refuse(request: Request, error: SwirlError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    return app


class SwirlClient(EnvClient):
    """The typed client of a served environment of ours: OpenEnv's `EnvClient`, whose actions may be plain text.

    Examples:
        >>> with SwirlClient("http://127.0.0.1:8000").sync() as env:  # doctest: +SKIP
        ...     first = env.reset(seed=0).observation
        ...     result = env.step("<answer>42</answer>")
        ...     print(result.reward, result.observation.outcome)
    """

    def _step_payload(self, action: TextAction | str) -> dict[str, Any]:
        return {"text": action if isinstance(action, str) else action.text}

    def _parse_result(self, payload: dict[str, Any]) -> StepResult:
        reward, done = payload.get("reward"), payload.get("done", False)
        observation = TextObservation(**payload["observation"], reward=reward, done=done)
        return StepResult(observation, reward, done)

    def _parse_state(self, payload: dict[str, Any]) -> TextState:
        return TextState(**payload)


class RemoteTasks:
    """The tasks of a server, whose gold answers it keeps."""

    def __init__(self, get: Callable[..., Any]):
        self._get = get

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """By id, without answers. Raises `ConfigError` if the server lists none."""
        name = self._get("list_environments")[0]
        split = self._get(f"{name}/splits")[0]["name"]
        rows = self._get(f"{name}/tasks", {"split": split})["tasks"]
        return {row["id"]: Task(row["id"], row["question"], ()) for row in rows}

    def outcome(self, task: Task, answer: str | None) -> None:
        """Unknown."""


class RemoteEnv(gym.Env[str, str], EzPickle):
    """A remote OpenEnv environment. The text of an action is the one text field of its actions, an observation the one text
    field of its observations (or all of its observation as JSON). Registered as `swirl/OpenEnv-v0`.

    `info` of one that plays an environment of ours is what the local one gives: `task_id`, `transcript`, `step`, and `outcome`
    at the end; of any other it is `observation`, as it came. A reward of `None` is 0.0.

    Args:
        url: of the server, such as `http://127.0.0.1:8000`.
        action: field of the actions that takes the text; `None`: the only one.
        observation: field of the observations that holds the text; `None`: the only one, or all as JSON.
        token_env: environment variable that holds the bearer token; `None`: none is sent.
        timeout: seconds that an answer may take.

    Raises:
        ConfigError: nothing speaks OpenEnv's protocol there, it refuses the token, or its actions are no text.
        ConnectionError: the connection was lost; the episode is, too.
    """

    metadata = {"render_modes": []}

    def __init__(
        self,
        url: str,
        *,
        action: str | None = None,
        observation: str | None = None,
        token_env: str | None = None,
        timeout: float = 60.0,
    ):
        EzPickle.__init__(self, url, action=action, observation=observation, token_env=token_env, timeout=timeout)
        self.observation_space, self.action_space = Unicode(), Unicode()
        self.url, self.timeout = url.rstrip("/"), timeout
        self._kwargs = {"url": without_credentials(url)} | ({} if token_env is None else {"token_env": token_env})
        self._headers = {} if token_env is None else {"Authorization": f"Bearer {_token(token_env)}"}
        self.task_set = RemoteTasks(self._get)
        schema = self._get("schema")
        if not isinstance(schema, dict) or not {"action", "observation"} <= schema.keys():
            raise ConfigError(f"{url} does not speak OpenEnv's protocol: /schema names no action and observation.")
        texts = _texts(schema["action"])
        self._action = action or (texts[0] if len(texts) == 1 else None)
        if self._action not in texts:
            raise ConfigError(f"{url} takes actions with the text fields {texts}: name one as action=, got {action!r}.")
        shown = _texts(schema["observation"])
        self._ours = {"text", "messages", "step", "truncated"} <= schema["observation"].get("properties", {}).keys()
        self._text = observation or ("text" if self._ours else shown[0] if len(shown) == 1 else None)
        self._client = GenericEnvClient(url, message_timeout_s=timeout, headers=self._headers).sync()
        self._done = True
        self._state: dict[str, Any] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin an episode; `options` (such as `task_id`) are arguments of the remote reset. What the server says against them
        is a `ConfigError`."""
        super().reset(seed=seed)
        given = dict(options or {}) | ({} if seed is None else {"seed": seed})
        result = self._ask(lambda: self._client.reset(**given))
        self._done = bool(result.done)
        return self._read(result)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take one action. Half an emoji (a lone surrogate) has no form in JSON that servers read, and is sent as `?`."""
        if self._done:
            raise ResetNeeded("The episode is over (or has not begun): call reset() before step().")
        result = self._ask(lambda: self._client.step({self._action: _sendable(action)}))
        self._done = bool(result.done)
        text, info = self._read(result)
        truncated = bool(result.observation.get("truncated", False))
        return text, float(result.reward or 0.0), self._done and not truncated, self._done and truncated, info

    def _read(self, result: StepResult) -> tuple[str, dict[str, Any]]:
        self._state = None
        seen = result.observation
        if not self._ours or not seen["messages"]:
            text = seen.get(self._text) if self._text else json.dumps(seen, ensure_ascii=False)
            return str(text), {"observation": seen}
        transcript = Transcript(tuple(Message(**one) for one in seen["messages"]), tuple(seen["stop"]))
        step = None if seen["step"] is None else STEP.validate_python(seen["step"])
        info = {"task_id": seen["task_id"], "transcript": transcript, "step": step}
        return seen["text"], info | ({"outcome": seen["outcome"]} if result.done else {})

    @property
    def stop(self) -> str | None:
        """Why the last episode ended, of an environment of ours."""
        return self._told("stop_reason")

    @property
    def task(self) -> Task:
        """The task of an environment of ours: without gold answers until the episode is over."""
        return TASK.validate_python(self._told("task"))

    @property
    def record(self) -> EnvRecord:
        """What a trajectory says of this environment."""
        return EnvRecord(REMOTE, self._kwargs, self._told("grammar"), tuple(self._told("tools")))

    def close(self) -> None:
        self._client.close()

    def _told(self, name: str) -> Any:
        if self._state is None:
            self._state = self._ask(self._client.state)
        if name not in self._state:
            raise ConfigError(f"{self.url} does not play an environment of this toolkit: its state has no {name!r}.")
        return self._state[name]

    def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:
            raise ConfigError(f"{self.url}: {str(error).removeprefix('Server error: ')}") from None
        except TimeoutError:
            self._done = True
            raise ConnectionError(
                f"{self.url} gave no answer in {self.timeout:g} s. Reset for another episode."
            ) from None
        except (ConnectionClosed, OSError) as error:
            self._done = True
            raise ConnectionError(f"{self.url}: {error}. The episode is lost; reset for another one.") from None

    def _get(self, path: str, body: dict[str, Any] | None = None) -> Any:
        address = f"{self.url.replace('ws', 'http', 1) if self.url.startswith('ws') else self.url}/{path}"
        try:
            method = "GET" if body is None else "POST"
            answer = requests.request(method, address, json=body, headers=self._headers, timeout=self.timeout)
            told = answer.json()
        except (requests.RequestException, ValueError) as error:
            raise ConfigError(f"No OpenEnv server answers at {self.url} ({error}). Is the address right?") from None
        if not answer.ok:
            raise ConfigError(f"{self.url} refuses /{path}: {told.get('detail', told)}")
        return told


def from_openenv(url: str, **kwargs: Any) -> gym.Env[str, str]:
    """A remote OpenEnv environment as a Gymnasium one: `gym.make("swirl/OpenEnv-v0", url=url)`.

    Args:
        url: of the server.
        kwargs: of `RemoteEnv`.
    """
    return gym.make(REMOTE, url=url, disable_env_checker=True, **kwargs)


def _token(variable: str) -> str:
    token = os.environ.get(variable, "")
    if not token:
        raise ConfigError(f"The environment variable {variable} holds no token. Set it, or leave out token_env.")
    return token


def _sendable(text: str) -> str:
    """A lone surrogate has no UTF-8 form: `?`."""
    return text.encode("utf-8", "replace").decode()


def _texts(schema: dict[str, Any]) -> list[str]:
    """Names of the fields that take text."""
    return [name for name, field in schema.get("properties", {}).items() if field.get("type") == "string"]


def _short(value: Any) -> str:
    return f"{value!r}"[:60]
