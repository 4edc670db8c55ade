"""What task sets over paragraphs say of their gold path, in one form for all of them, and how to see it in a result.

`Task.meta` of HotPotQA, MuSiQue, BeerQA and CofCA:

    hops        int or None
    type        the set's own kind of question, or None; BeerQA: the source
    supporting  titles of the gold paragraphs, in the order of the hops where that is known
    openings    beside each title the first `OPENING` characters of its paragraph, or None where the text is not at hand:
                several paragraphs of a task may share a title
    steps       gold sub-steps {"question", "answer", "title"}, in order; empty where the set has none
"""

from collections.abc import Iterable, Sequence
from typing import Any

OPENING = 100
"""Characters; enough to tell gold paragraphs from others of the same title in all of MuSiQue and BeerQA at hand."""


def gold_meta(
    hops: int | None,
    type: str | None,
    supporting: Iterable[tuple[str, str | None]],
    steps: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The common part of `Task.meta`; `supporting` are (title, text or None) pairs."""
    pairs = [(title, None if text is None else text[:OPENING].rstrip()) for title, text in supporting]
    return {
        "hops": hops,
        "type": type,
        "supporting": [title for title, _ in pairs],
        "openings": [opening for _, opening in pairs],
        "steps": list(steps),
    }


def supporting(meta: dict[str, Any]) -> list[tuple[str, str | None]]:
    """(title, opening or None) of each gold paragraph; empty where none is known."""
    titles = meta.get("supporting", [])
    return list(zip(titles, meta.get("openings") or [None] * len(titles), strict=True))


def shows(text: str, paragraph: tuple[str, str | None]) -> bool:
    """Whether a text (a document, or results as `search` writes them, escaped or not) holds a gold paragraph."""
    title, opening = (_unescaped(part or "") for part in paragraph)
    return f"\n{title}\n{opening}" in f"\n{_unescaped(text)}\n"


def _unescaped(text: str) -> str:
    return text.replace("&lt;", "<")
