"""The nouns of the toolkit: frozen records that travel between rooms and into files.

Scores lie in [0, 1], log-probabilities are in nats, times in seconds. `None` means unknown, never 0.
Shape letters: `T` tokens, `S` steps. Times and costs are left out of comparison, so that two seeded runs are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import BeforeValidator, ConfigDict, PlainSerializer

SCHEMA = 1
"""Version of the trajectory record; raised when a field changes meaning."""

STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


def _reads(dtype: str) -> BeforeValidator:
    def array(value: Any) -> np.ndarray:
        try:
            return np.asarray(value, dtype=dtype)
        except (TypeError, OverflowError) as error:
            raise ValueError(str(error)) from None  # what pydantic tells with its place

    return BeforeValidator(array)


Ids = Annotated[np.ndarray, _reads("int32"), PlainSerializer(lambda array: array.tolist(), when_used="json")]
Flags = Annotated[
    np.ndarray, _reads("bool"), PlainSerializer(lambda array: array.astype(int).tolist(), when_used="json")
]
# float32 is written in its shortest form that reads back to the same 32 bits
Logprobs = Annotated[
    np.ndarray,
    _reads("float32"),
    PlainSerializer(lambda array: [float(str(value)) for value in array], when_used="json"),
]

StopReason = Literal["answered", "step_limit", "token_limit", "malformed_limit", "error"]


@dataclass(frozen=True, slots=True)
class Document:
    __pydantic_config__ = STRICT

    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Task:
    __pydantic_config__ = STRICT

    id: str
    """Unique in its task set; the official id where one exists."""
    question: str
    answers: tuple[str, ...]
    """Accepted gold forms. Never shown to the policy, nor to a judge that does not declare `uses_gold`."""
    meta: dict[str, Any] = field(default_factory=dict)
    """JSON facts: hops, type, gold sub-steps. Documents stay in the task set and are found by task id."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    __pydantic_config__ = STRICT

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolResult:
    __pydantic_config__ = STRICT

    text: str
    """What the model reads, escaped so that it can neither act nor close its own block."""
    error: str | None = None
    """`unknown_tool`, `bad_arguments`, `tool_error` (the tool refused) or `crash` (a bug); `None`: it worked."""
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Action:
    """One model response: a thought, calls or an answer, or a reason why it is none of them."""

    __pydantic_config__ = STRICT

    text: str
    """Exactly as sampled."""
    thought: str = ""
    calls: tuple[ToolCall, ...] = ()
    answer: str | None = None
    malformed: str | None = None
    """What was wrong and what to write instead; `None` for a well-formed action."""


@dataclass(frozen=True, slots=True)
class Verdict:
    __pydantic_config__ = STRICT

    score: float | None
    """In [0, 1]; `None` if the judge could not tell."""
    reason: str
    judge: str
    """Name and version, as `rules@1`."""
    parts: dict[str, float | None] = field(default_factory=dict)
    """Named component scores, for judges made of several."""
    seconds: float = field(default=0.0, compare=False)
    tokens: int = field(default=0, compare=False)
    """Tokens that a model spent on this verdict."""

    @property
    def good(self) -> bool | None:
        """The paper's GOOD or BAD: score >= 0.5; `None` if unknown."""
        return None if self.score is None else self.score >= 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """The tokens one step adds: first the template and observation (`sampled` false), then the action exactly as
    sampled (true). A turn end put after a stop string belongs to the next step's unsampled part."""

    __pydantic_config__ = STRICT

    ids: Ids
    """int32[T]"""
    sampled: Flags
    """bool[T]"""
    logprobs: Logprobs
    """float32[T], nats, under the distribution that was sampled from (temperature included); 0 where not sampled."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokens) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in ("ids", "sampled", "logprobs")
        )

    @property
    def action_ids(self) -> np.ndarray:
        """int32[A]: the sampled part."""
        return self.ids[self.sampled]


@dataclass(frozen=True, slots=True)
class Message:
    __pydantic_config__ = STRICT

    role: Literal["system", "user", "assistant"]
    content: str
    ids: Ids | None = field(default=None, compare=False)
    """int32[T] of the content exactly as sampled; `None`: rendering tokenises the content."""


@dataclass(frozen=True, slots=True)
class Transcript:
    """The state s_i: everything said so far. Append-only."""

    __pydantic_config__ = STRICT

    messages: tuple[Message, ...]
    stop: tuple[str, ...] = ()
    """Strings after which the environment reads nothing more: a policy may stop there."""
    seed: int | None = field(default=None, compare=False)
    """Seed of the draw to be made at this state; `None`: the policy's own."""

    @property
    def text(self) -> str:
        return "\n".join(message.content for message in self.messages)


@dataclass(frozen=True, slots=True)
class Step:
    __pydantic_config__ = STRICT

    action: Action
    results: tuple[ToolResult, ...] = ()
    """One per call, same order."""
    observation: str = ""
    """The user turn that the environment appended after the action; empty after the last step."""
    verdict: Verdict | None = None
    """`None`: no judge was asked."""
    tokens: Tokens | None = None
    """`None`: the policy gave none."""


@dataclass(frozen=True, slots=True)
class EnvRecord:
    """What is needed to make the same environment again."""

    __pydantic_config__ = STRICT

    id: str
    kwargs: dict[str, Any]
    grammar: str
    tools: tuple[dict[str, Any], ...]
    """OpenAI function schemas of the live tool set."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    __pydantic_config__ = STRICT

    task: Task
    env: EnvRecord
    prompt: tuple[Message, ...]
    """The messages of s_1."""
    steps: tuple[Step, ...]
    stop: StopReason
    outcome: float | None
    """The task set's official metric of the answer, in [0, 1]; 0 where none was given; `None` if it has no gold, or if a
    failure of the policy ended the episode."""
    policy: str
    seed: int
    sample: int = 0
    """Which of several trajectories of one task."""
    round: int = 0
    schema: int = SCHEMA

    @property
    def key(self) -> tuple[str, int, int]:
        """(task id, sample, round): unique in a run."""
        return self.task.id, self.sample, self.round

    @property
    def id(self) -> str:
        return "/".join(map(str, self.key))

    @property
    def answer(self) -> str | None:
        return self.steps[-1].action.answer if self.steps else None

    def states(self) -> list[Transcript]:
        """s_1 ... s_K: the transcript before each action (paper section 2.1)."""
        messages, states = self.prompt, []
        for step in self.steps:
            states.append(Transcript(messages))
            ids = None if step.tokens is None else step.tokens.action_ids
            messages += (Message("assistant", step.action.text, ids), Message("user", step.observation))
        return states


@dataclass(frozen=True, slots=True)
class StepView:
    """What a judge may see of one action."""

    question: str
    steps: tuple[Step, ...]
    """The earlier steps, with their results and without their verdicts."""
    action: Action
    """The action to judge; its tool result is not shown."""
    steps_left: int | None = None
    """Actions that may follow this one; `None`: no limit."""
    task: Task | None = None
    """With its gold answers; only for a judge that declares `uses_gold`."""
    results: tuple[ToolResult, ...] | None = None
    """What the action's calls returned; only for a judge that declares `uses_gold`."""


@dataclass(frozen=True, slots=True)
class Completion:
    text: str
    """decode(sampled ids), an overrun past a stop string included; of an error, what went wrong in one line."""
    tokens: Tokens | None
    finish: Literal["stop", "eos", "length", "error"]
    """A stop string, the model's own end of turn, the token limit, or a failure of the policy."""
    alternatives: tuple[dict[str, float], ...] | None = None
    """For each generated token, the likeliest tokens' texts and log-probabilities in nats; `None`: not asked or not given."""


class Tool(Protocol):
    """`(**arguments) -> str`. Raises `ToolError` for what the model should read; anything else is a bug."""

    name: str
    description: str
    parameters: dict[str, Any]
    """JSON schema of the arguments."""

    def __call__(self, **arguments: Any) -> str: ...


class Judge(Protocol):
    """Batch in, batch out, same order and length. What cannot be judged is `score=None` with the reason, never 0."""

    @property
    def name(self) -> str: ...

    @property
    def uses_gold(self) -> bool: ...

    def __call__(self, views: list[StepView]) -> list[Verdict]: ...


class Policy(Protocol):
    """`n` completions for each transcript. Knows nothing of environments."""

    @property
    def name(self) -> str: ...

    def __call__(self, transcripts: list[Transcript], n: int = 1) -> list[list[Completion]]: ...


Filter = Callable[[Trajectory], bool]
