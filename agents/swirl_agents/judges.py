"""Judges by name, where a model that judges may also be one in this process."""

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from swirl_env.cache import cache_folder
from swirl_env.client import PREFIX, make_endpoint
from swirl_env.errors import ConfigError, UnknownArgumentError, near
from swirl_env.judges import make_judge
from swirl_env.judges.cache import Cached
from swirl_env.types import Judge, Policy

VERDICT_TOKENS, WORD_TOKENS = 128, 4
"""Token caps of a local model's reply: an explanation with its verdict, and the one word of `probability`."""


def open_judge(text: str) -> Judge:
    """A judge as people name it: as in `make_judge`, JSON as text, where a model may also be one in this process
    (`open_model`). Verdicts of models are kept in `verdicts.db` of the cache folder, unless the JSON names a `cache`.

    Raises:
        ConfigError: no such judge, or its server refuses everything.
    """
    judge = make_judge(text, open_model)
    for policy in _policies(judge):
        if hasattr(policy, "check"):
            policy.check()
    return (
        Cached(judge, cache_folder() / "verdicts.db") if _policies(judge) and not isinstance(judge, Cached) else judge
    )


def open_model(name: str, **settings: Any) -> Policy:
    """A judge's model: behind a server if the name is an address, else in this process (`smollm2-135m`, a folder, a hub name).

    Args:
        name: as above.
        settings: of `ChatClient` or of `LocalPolicy`.

    Raises:
        ConfigError: there is no such model or setting, with the near match.
    """
    if re.match(r"\w+://", name.removeprefix(PREFIX)):
        return make_endpoint(name, **settings)
    if re.match(r"[\w.-]+:\d+(/|$)", name):
        raise ConfigError(f"A server's address begins with http:// or https://: did you mean model:http://{name}?")
    from swirl_agents.local import LocalPolicy

    known = set(LocalPolicy.__init__.__kwdefaults__ or ()) - {"name"}
    if unknown := set(settings) - known:
        raise UnknownArgumentError(f"A local model has no setting {min(unknown)!r}.{near(min(unknown), known)}")
    tokens = WORD_TOKENS if settings.get("top_logprobs") else VERDICT_TOKENS
    model, tokenizer, shown = _loaded(name)
    return LocalPolicy(model, tokenizer, name=shown, **{"max_new_tokens": tokens} | settings)


@cache
def _loaded(name: str) -> tuple[Any, Any, str]:
    """(model, tokenizer, what verdicts call it). A folder is called by its content too, since it may hold another model later."""
    from swirl_agents.models import DEFAULT, load_model

    model, tokenizer = load_model(name)
    folder = Path(name).expanduser()
    if name == DEFAULT or not folder.is_dir():
        return model, tokenizer, name
    digest = hashlib.sha256()
    for path in sorted(
        path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf", ".json", ".jinja")
    ):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return model, tokenizer, f"{folder.resolve().name}-{digest.hexdigest()[:8]}"


def _policies(judge: Any) -> list[Any]:
    """The models that a judge asks."""
    inner = [*getattr(judge, "judges", ()), *([judge.judge] if isinstance(judge, Cached) else [])]
    own = [judge.policy] if hasattr(judge, "policy") else []
    return own + [policy for one in inner for policy in _policies(one)]
