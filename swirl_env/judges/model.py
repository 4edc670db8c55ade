"""The `model` judge: any language model as a generative reward model (paper, sections 2.1 and 2.2, appendix E).

It sees what the policy saw and the step to judge, not the result of that step and no gold answer; it explains first and
ends with GOOD or BAD. Prompts are in `prompts/*.txt`, in our own words after the paper's rules: one for queries and other
steps of a search, one for math, one for answers.

What is judged cannot judge itself: every line of it stands behind "| ", so it cannot close its frame or write a line of the
judge's; what looks like a control token of a chat template is broken by a blank, so it cannot end its turn; and the verdict is read from the last line of the judge's own reply only, never from the prompt.
"""

import math
import re
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from swirl_env.errors import ConfigError
from swirl_env.types import Completion, Message, Policy, StepView, Transcript, Verdict

VERSION = 2
"""Of the prompts and of how replies are read: verdicts of other versions are not taken from a cache."""
MAX_RESULT = 4_000
"""Characters of one result that the judge reads; longer ones lose their middle."""

_TASKS = {
    "verdict": "Explain in one or two sentences. Then end with a line that holds one word alone: GOOD or BAD.",
    "probability": "Reply with one word: GOOD or BAD.",
}
_VERDICT = re.compile(
    r"(?:(?:the |final |my )*(?:verdict|judg(?:e)?ment|answer|feedback|boxed)\W{1,8}(?:is\W{1,8})?)?(good|bad)", re.I
)
_EDGES = re.compile(r"^[\W_]+|[\W_]+$")
_CONTROL = re.compile(r"<(?=[|\uff5c]|/?s>|[be]os>|(?:start|end)_of_turn>)|\[(?=/?[A-Z_]{4,}\])")
"""How the control tokens of chat templates begin: many servers read them in contents too."""


class ModelJudge:
    """Scores a step by what a language model says of it.

    Args:
        policy: the model: a `swirl_env.client.ChatClient`, a local policy, or any other `Policy`.
        mode: `verdict`: explain, then GOOD (1) or BAD (0); `probability`: P(GOOD) / (P(GOOD) + P(BAD)) from log-probs (the
            policy must give `alternatives`), where the two first have more than half of the probability, else where they have most.
        samples: replies a step; the score is their mean over those that can be read. `verdict` only.

    A reply that holds no verdict, was refused or failed is unknown (`score=None`) with the reason.

    Raises:
        ConfigError: another mode, or a number of samples that does not go with it.

    Examples:
        >>> import gymnasium as gym, swirl_env
        >>> from swirl_agents.testing_server import ChatServer
        >>> with ChatServer("The sum uses numbers of the question.\\nGOOD") as server:  # in place of a real model's server
        ...     env = gym.make("swirl/GSM8K-v0", judge=f"model:{server.url}")
        ...     text, info = env.reset(seed=0)
        ...     verdict = env.step("<calculator>10+3</calculator>")[4]["step"].verdict
        >>> print(verdict.score, verdict.reason)
        1.0 The sum uses numbers of the question.
    """

    uses_gold = False

    def __init__(self, policy: Policy, mode: Literal["verdict", "probability"] = "verdict", samples: int = 1):
        if mode not in _TASKS:
            raise ConfigError(f"mode is 'verdict' or 'probability', got {mode!r}.")
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ConfigError(f"samples must be a whole number of at least 1, got {samples!r}.")
        if mode == "probability" and samples != 1:
            raise ConfigError("mode='probability' reads one reply; samples must be 1.")
        self.policy, self.mode, self.samples = policy, mode, samples
        self.name = f"model:{policy.name}@{VERSION}"
        if mode == "probability" or samples > 1:
            self.name = f"model:{policy.name}:{mode if samples == 1 else f'mean{samples}'}@{VERSION}"

    def __call__(self, views: list[StepView]) -> list[Verdict]:
        transcripts = [Transcript((Message("user", self.prompt(view)),), seed=0) for view in views]
        return [self._verdict(replies) for replies in self.policy(transcripts, self.samples)]

    @property
    def concurrency(self) -> int:
        """How many threads may ask at once; 1 for a model in this process. More than a server is sent at once (its client sees to
        that), so that there is something to send while others wait out a pause."""
        return 4 * getattr(self.policy, "concurrency", 0) or 1

    def key(self, view: StepView) -> tuple[Any, ...]:
        """All that a verdict depends on, for a cache."""
        return self.name, getattr(self.policy, "parameters", None), self.prompt(view)

    def prompt(self, view: StepView) -> str:
        """What the model is asked about a step."""
        steps = "\n\n".join(
            "\n".join([_framed(step.action.text), *(_framed(f"-> {_cut(r.text)}") for r in step.results)])
            for step in view.steps
        )
        return _template(_kind(view)).format(
            question=_framed(view.question), steps=steps or _framed("(none)"), action=_framed(view.action.text),
            task=_TASKS[self.mode],
        )  # fmt: skip

    def _verdict(self, replies: list[Completion]) -> Verdict:
        if not replies:
            return Verdict(None, "the conversation is longer than the judge's context", self.name)
        read = [self._probability(reply) if self.mode == "probability" else verdict_of(reply) for reply in replies]
        known = [score for score, _ in read if score is not None]
        tokens = sum(len(reply.tokens.action_ids) for reply in replies if reply.tokens is not None)
        reason = next((why for score, why in read if score is not None), read[0][1])
        if not known:
            return Verdict(None, reason, self.name, tokens=tokens)
        parts: dict[str, float | None] = {} if len(read) == 1 else {f"reply {i}": s for i, (s, _) in enumerate(read)}
        return Verdict(float(np.mean(known)), reason, self.name, parts, tokens=tokens)

    def _probability(self, reply: Completion) -> tuple[float | None, str]:
        if reply.finish == "error":
            return None, reply.text
        if not reply.alternatives:
            return None, "no log-probs came back: use mode='verdict', or a server and model that give top_logprobs"
        ends = [i for i, place in enumerate(reply.alternatives) if "</think>" in next(iter(place), "")]
        places = reply.alternatives[ends[-1] + 1 if ends else 0 :]
        masses = [mass for place in places if (mass := _masses(place)) is not None]
        if not masses:
            return None, f"neither GOOD nor BAD was likely; it wrote {reply.text[:80]!r}"
        good, bad = next((mass for mass in masses if sum(mass) > 0.5), max(masses, key=sum))
        return good / (good + bad), f"P(GOOD) {good:.3f}, P(BAD) {bad:.3f}"


def _masses(candidates: dict[str, float]) -> tuple[float, float] | None:
    """P(GOOD) and P(BAD) at one place; `None` if neither is among the candidates. If one of them is not, it is given the most that
    it can have: what the others leave, and no more than the last of them."""
    mass = dict.fromkeys(("GOOD", "BAD"), 0.0)
    for token, logprob in candidates.items():
        written = token.strip().upper()
        for word in mass:
            mass[word] += math.exp(logprob) if written and word.startswith(written) else 0.0
    if not any(mass.values()):
        return None
    probabilities = [math.exp(logprob) for logprob in candidates.values()]
    most = max(0.0, min(min(probabilities), 1.0 - sum(probabilities)))
    return mass["GOOD"] or most, mass["BAD"] or most


def verdict_of(reply: Completion) -> tuple[float | None, str]:
    """(1 for GOOD, 0 for BAD, `None` for neither; the explanation) of a reply: its last line holds the verdict alone."""
    if reply.finish == "error":
        return None, reply.text
    said = reply.text.rpartition("</think>")[2]
    cut = " (it was cut at the token limit: raise max_new_tokens)" if reply.finish == "length" else ""
    if said.lstrip().startswith("<think>"):
        return None, f"the judge's reply is a thought without an end{cut}: ...{said.strip()[-80:]!r}"
    lines = [line for line in map(str.strip, unicodedata.normalize("NFKC", said).splitlines()) if _EDGES.sub("", line)]
    if not lines:
        return None, f"the judge's reply is empty{cut}"
    found = _VERDICT.fullmatch(_EDGES.sub("", lines[-1]))
    if found is None:
        return None, f"the judge's reply does not end in GOOD or BAD{cut}: ...{reply.text.strip()[-80:]!r}"
    explanation = " ".join(lines[:-1])[:500]
    return float(found[1].upper() == "GOOD"), explanation or found[1].upper()


def _kind(view: StepView) -> str:
    """Which prompt: by the step itself, and for thoughts and other tools by what the episode does."""
    if view.action.answer is not None:
        return "answer"
    calls = [*view.action.calls, *(call for step in view.steps for call in step.action.calls)]
    return "math" if not any("query" in call.arguments for call in calls) else "search"


@cache
def _template(kind: str) -> str:
    return (Path(__file__).parent / "prompts" / f"{kind}.txt").read_text(encoding="utf-8").strip()


def _framed(text: str) -> str:
    return "\n".join(f"| {line}" for line in _CONTROL.sub(r"\g<0> ", text).splitlines() or [""])


def _cut(text: str) -> str:
    return text if len(text) <= MAX_RESULT else f"{text[: MAX_RESULT // 2]} ... {text[-MAX_RESULT // 2 :]}"
