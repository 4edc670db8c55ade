"""The log-probabilities of an action's tokens, to be shown as shading.

A record holds the tokens' ids, not their texts. Where a tokenizer.json lies in the run folder (a trained model) or in the
folder of the model that its run.json names, it spells them; it is believed only where the whole spells the action exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from swirl_algos.folders import read_claim

from swirl_env.errors import ConfigError, DataError
from swirl_env.types import Step

LEVELS = (0.05, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0)
"""Nats below 0 at which the next shade begins."""
MOST = 1_000
"""Tokens of one action that are shown."""
Spell = Callable[[list[int]], str]


@dataclass(frozen=True, slots=True)
class Cell:
    """One sampled token."""

    text: str | None
    """`None`: no tokenizer is at hand."""
    logprob: float
    level: int
    """0: nearly certain, up to `len(LEVELS)`."""


@dataclass(frozen=True, slots=True)
class Cells:
    shown: list[Cell]
    count: int
    mean: float
    lowest: float


def cells(step: Step, spell: Spell | None) -> Cells | None:
    """The sampled tokens of an action; `None` if the policy gave none. Raises `DataError` if they do not belong together."""
    if step.tokens is None:
        return None
    shapes = {array.shape for array in (step.tokens.ids, step.tokens.sampled, step.tokens.logprobs)}
    if len(shapes) > 1 or len(min(shapes)) != 1:
        raise DataError(f"Tokens: expected ids, sampled and logprobs of one length, got shapes {sorted(shapes)}.")
    if not len(ids_A := step.tokens.action_ids):
        return None
    logprobs_A = step.tokens.logprobs[step.tokens.sampled]
    spelled = spell is not None and len(ids_A) <= MOST and ids_A.min() >= 0
    texts = _texts(ids_A.tolist(), step.action.text, spell) if spell and spelled else None
    shown = [
        Cell(None if texts is None else texts[i], logprob, sum(-logprob > bound for bound in LEVELS))
        for i, logprob in enumerate(logprobs_A[:MOST].tolist())
    ]
    return Cells(shown, len(ids_A), float(logprobs_A.mean()), float(logprobs_A.min()))


def _texts(ids: list[int], action: str, spell: Spell) -> list[str] | None:
    """The text that each token adds; the first bytes of a character add none. `None` if they do not spell the action."""
    if not spell(ids).startswith(action):
        return None
    texts, done = [], ""
    for end in range(1, len(ids) + 1):
        whole = spell(ids[:end])
        if end < len(ids):
            whole = whole.rstrip("\ufffd")
        if not whole.startswith(done):
            return None
        texts.append(whole[len(done) :])
        done = whole
    return texts


class Speller:
    """Finds the tokenizer of a run, once."""

    def __init__(self) -> None:
        self._found: dict[Path, Spell | None] = {}

    def of(self, run: Path) -> Spell | None:
        """What spells the tokens of this run; `None` if no tokenizer is at hand."""
        if run not in self._found:
            self._found[run] = _open(run)
        return self._found[run]


def _open(run: Path) -> Spell | None:
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        return None
    folder = run if run.is_dir() else run.parent
    files = sorted(folder.glob("*/tokenizer.json"))
    try:
        files.append(Path(str(read_claim(folder / "run.json").get("model"))) / "tokenizer.json")
    except (ConfigError, OSError):
        pass  # a file of trajectories has no settings beside it
    for file in files:
        if file.is_file():
            try:
                tokenizer = Tokenizer.from_file(str(file))
            except Exception:  # its only kind of error: half-written, or of another version
                continue
            return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
    return None
