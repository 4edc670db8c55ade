"""Transcripts <-> tokens. The only token code in the house.

A chat template is rendered once with markers in place of the contents and cut at them. The pieces are tokenised with
special tokens on, contents with special tokens off: text of a document, a user or a model can never become a control
token. States are append-only by construction: ids = prompt + action + turn + action + ..., where an action is exactly
the ids that were sampled, so nothing is ever re-tokenised.

The exception are templates that rewrite history (Qwen3's drops the thoughts of older turns; servers follow it too): there
`rewrites` is true, an older action that the template changes is tokenised in its changed form, and a state is no longer a
prefix of the next. All that share prefixes look at the tokens, so they share less there and stay exact.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from swirl_env.errors import ConfigError
from swirl_env.types import Message, Transcript

_MARKS = [f"@@content-{i}@@" for i in range(3)]
_ROLES = ["user", "assistant", "user"]
_TELLING = ("<think>why</think><search>what</search>", "<think>\nwhy\n</think>\n\nwhat")
"""Actions that a template which rewrites history would change."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of a transcript."""

    ids: np.ndarray
    """int32[T]"""
    spans: list[tuple[int, int]]
    """[start, end) of each action within `ids`, in order."""


class Renderer:
    """Tokenises transcripts for one tokenizer and its chat template (or plain lines, if it has none).

    Raises:
        ConfigError: the template cannot render a user, assistant, user conversation.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        if getattr(tokenizer, "chat_template", None):
            head = self._pieces(["user"])
            turn = self._pieces(_ROLES)
        else:
            head, turn = [tokenizer.bos_token or "", "\n"], ["", "\n", "\n", "\n"]
        self._before_prompt, self._after_prompt = map(self._template_ids, head)
        self._after_action, self._after_observation = map(self._template_ids, turn[2:])
        self._around_old = turn[1], turn[2]
        self._older = lru_cache(4096)(self._as_template_has_it)
        self.rewrites: bool = any(self._older(text) != text for text in _TELLING)
        """Whether the chat template changes actions once a turn follows them."""

    def _pieces(self, roles: list[str]) -> list[str]:
        """The template's text before, between and after the contents of messages with these roles."""
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=False)]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            pieces: list[str] = []
            for mark in _MARKS[: len(roles)]:
                piece, found, text = text.partition(mark)
                if not found:
                    raise ValueError(f"the template drops the content of message {len(pieces) + 1}")
                pieces.append(piece)
        except Exception as error:  # templates raise whatever they like
            raise ConfigError(
                f"The chat template of {self.tokenizer.name_or_path!r} cannot render {', '.join(roles)} messages: {error}. "
                "Use a model whose template alternates user and assistant turns."
            ) from error
        return [*pieces, text]

    def _as_template_has_it(self, text: str) -> str:
        """An action as the template writes it when a turn follows; spaces around it do not count as a change."""
        if not getattr(self.tokenizer, "chat_template", None):
            return text
        messages = [{"role": r, "content": c} for r, c in zip(_ROLES, (_MARKS[0], text, _MARKS[2]), strict=True)]
        try:
            whole = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # templates raise whatever they like; what they cannot write they do not change
            return text
        before, after = self._around_old
        rest = whole.partition(_MARKS[0])[2].rpartition(_MARKS[2])[0]
        if not (rest.startswith(before) and rest.endswith(after) and len(rest) >= len(before) + len(after)):
            return text
        written = rest[len(before) : len(rest) - len(after)]
        return text if written.strip() == text.strip() else written

    def _template_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def content_ids(self, text: str) -> list[int]:
        """Tokens of a content: what looks like a control token is spelled out."""
        if not text:
            return []
        # a lone surrogate has no UTF-8 form, which tokenizers need
        text = text.encode("utf-8", "replace").decode()
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def prompt_ids(self, messages: tuple[Message, ...]) -> list[int]:
        """Tokens of s_1 (a single user message), up to where the first action begins."""
        content = "\n\n".join(message.content for message in messages)
        return [*self._before_prompt, *self.content_ids(content), *self._after_prompt]

    def turn_ids(self, action_ids: list[int], observation: str) -> list[int]:
        """Tokens between an action and the next: end of turn (unless the model wrote it), observation, next turn's head."""
        after = self._after_action
        if after and len(action_ids) and action_ids[-1] == after[0]:
            after = after[1:]
        return [*after, *self.content_ids(observation), *self._after_observation]

    def encode(self, transcript: Transcript) -> Encoded:
        """Tokens of a state (or of a finished transcript, which ends in an action)."""
        messages = transcript.messages
        first = next((i for i, m in enumerate(messages) if m.role == "assistant"), len(messages))
        ids, action = self.prompt_ids(messages[:first]), list[int]()
        spans: list[tuple[int, int]] = []
        for i, message in enumerate(messages[first:], first):
            if message.role == "assistant":
                action = self.content_ids(message.content) if message.ids is None else message.ids.tolist()
                if self.rewrites and i + 1 < len(messages):
                    content = self.decode(action)
                    older = self._older(content)
                    action = action if older == content else self.content_ids(older)
                spans.append((len(ids), len(ids) + len(action)))
                ids.extend(action)
            else:
                ids.extend(self.turn_ids(action, message.content))
        return Encoded(np.asarray(ids, np.int32), spans)

    def decode(self, ids) -> str:
        """Text of sampled ids, control tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
