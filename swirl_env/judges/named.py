"""Judges by name or by JSON, as `judge=` of `gym.make` takes them."""

import json
from collections.abc import Callable
from typing import Any

from swirl_env.client import make_endpoint
from swirl_env.errors import ConfigError, UnknownNameError, near
from swirl_env.judges.cache import Cached
from swirl_env.judges.combine import Combine
from swirl_env.judges.model import ModelJudge
from swirl_env.names import load_object
from swirl_env.types import Judge, Policy

BY_NAME = {
    "rules": "swirl_env.judges.rules:RulesJudge",
    "rules-written": "swirl_env.judges.rules:WRITTEN",
    "gold-steps": "swirl_env.judges.gold:GoldSteps",
    "outcome": "swirl_env.judges.combine:Outcome",
}
BY_JSON = {
    "model": "swirl_env.judges.model:ModelJudge",
    "combine": "swirl_env.judges.combine:Combine",
    "cache": "swirl_env.judges.cache:Cached",
}
"""Keys of a judge as JSON -> what each makes."""
_SPEC = """{"combine": ["rules", "model:http://127.0.0.1:8000/v1"], "how": "gate"}"""


def make_judge(spec: str | dict[str, Any], open_model: Callable[..., Policy] | None = None) -> Judge:
    """A judge by name or by JSON.

    Args:
        spec: `rules`, `gold-steps`, `outcome`; `model:URL` or `model:URL#MODEL`, a model behind an OpenAI-compatible server;
            `module:attribute`, a judge or a class of judges; several of these joined by `+`, each asked only about what all
            before it call good. Or a dict: `{"combine": [...], "how": ..., "weights": ...}` (see `Combine`), `{"model": URL,
            "mode": ..., "samples": ..., ...}` (see `ModelJudge`; other keys are settings of `ChatClient`); either may have
            `"cache": FILE`.
        open_model: (name, **settings) -> policy, of every model named; `None`: addresses only. The command line's also opens
            models in its own process.

    Raises:
        UnknownNameError: nothing is called that, with the near match. ConfigError: a value that cannot work.
    """
    if isinstance(spec, dict):
        try:
            return _from_dict(dict(spec), open_model or _open_endpoint)
        except TypeError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"judge= has a setting of a wrong type ({error}): {_shown(spec)}.") from error
    if not isinstance(spec, str):
        raise ConfigError(
            f"judge= takes a name such as 'rules' or 'module:attribute', or {_SPEC}; got {spec!r}. A live judge comes in by "
            "wrapper: JudgeReward(env, judge)."
        )
    if spec.lstrip().startswith("{"):
        try:
            value = json.loads(spec)
        except ValueError as error:
            raise ConfigError(f"judge= begins like JSON, but is not JSON: {error}.") from None
        return make_judge(value, open_model)
    if spec.startswith("model:"):
        return make_judge({"model": spec.removeprefix("model:")}, open_model)
    if "+" in spec:
        return make_judge({"combine": spec.split("+"), "how": "gate"}, open_model)
    if spec not in BY_NAME and ":" not in spec:
        known = [*BY_NAME, "model:URL"]
        raise UnknownNameError(f"No judge is called {spec!r}.{near(spec, known)} Your own: 'module:attribute'.")
    judge = load_object(BY_NAME.get(spec, spec), "judge")
    judge = judge() if isinstance(judge, type) else judge
    if not callable(judge) or not isinstance(getattr(judge, "name", None), str):
        raise ConfigError(f"{spec!r} is not a judge: expected a callable with a `name`, got {judge!r}.")
    return judge


def _from_dict(spec: dict[str, Any], open_model: Callable[..., Policy]) -> Judge:
    path = spec.pop("cache", None)
    if "combine" in spec:
        judges = spec.pop("combine")
        if not isinstance(judges, list):
            raise ConfigError(f"'combine' takes a list of judges, such as {_SPEC}; got {judges!r}.")
        if unknown := set(spec) - {"how", "weights"}:
            raise UnknownNameError(f"combine has no setting {min(unknown)!r}.{near(min(unknown), ['how', 'weights'])}")
        judge: Judge = Combine([make_judge(one, open_model) for one in judges], **spec)
    elif "model" in spec:
        name, mode, samples = spec.pop("model"), spec.pop("mode", "verdict"), spec.pop("samples", 1)
        if not isinstance(name, str) or not name:
            raise ConfigError(f"A model is named as in model:http://127.0.0.1:8000/v1, got {name!r}.")
        settings = {"temperature": 0.0 if samples == 1 else 1.0, "top_logprobs": 20 if mode == "probability" else 0}
        judge = ModelJudge(open_model(name, **settings | spec), mode, samples)
    else:
        wrong = near(next(iter(spec)), ("combine", "model")) if spec else ""
        raise ConfigError(
            f"A judge as JSON is {_SPEC} or {{'model': URL}}; got keys {', '.join(spec) or 'none'}.{wrong}"
        )
    if path is None:
        return judge
    return Cached(judge, path)


def _open_endpoint(name: str, **settings: Any) -> Policy:
    if "://" not in name:
        raise ConfigError(
            f"judge= takes a model's address, such as model:http://127.0.0.1:8000/v1, not {_shown(name)}. A model in this process "
            "is named on the command line, or comes in by wrapper: JudgeReward(env, ModelJudge(LocalPolicy(...)))."
        )
    return make_endpoint(name, **settings)


def _shown(spec: Any) -> str:
    text = json.dumps(spec, default=str)
    return "that" if "@" in text else text[:200]
