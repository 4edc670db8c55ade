"""Transcripts <-> tokens. The only token code in the house.

A chat template is rendered once with markers in place of the contents and cut at them. The pieces are tokenised with
special tokens on, contents with special tokens off: text of a document, a user or a model can never become a control
token. States are append-only by construction: ids = prompt + action + turn + action + ..., where an action is exactly
the ids that were sampled, so nothing is ever re-tokenised, whatever a template would do to older messages.
"""

from dataclasses import dataclass

import numpy as np

from swirl_env.errors import ConfigError
from swirl_env.types import Message, Transcript

_MARKS = [f"@@content-{i}@@" for i in range(3)]


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
            turn = self._pieces(["user", "assistant", "user"])
        else:
            head, turn = [tokenizer.bos_token or "", "\n"], ["", "\n", "\n", "\n"]
        self._before_prompt, self._after_prompt = map(self._template_ids, head)
        self._after_action, self._after_observation = map(self._template_ids, turn[2:])

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
        for message in messages[first:]:
            if message.role == "assistant":
                action = self.content_ids(message.content) if message.ids is None else message.ids.tolist()
                spans.append((len(ids), len(ids) + len(action)))
                ids.extend(action)
            else:
                ids.extend(self.turn_ids(action, message.content))
        return Encoded(np.asarray(ids, np.int32), spans)

    def decode(self, ids) -> str:
        """Text of sampled ids, control tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
