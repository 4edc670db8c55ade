"""The pages of the viewer: the list, one trajectory, two side by side, the selection as a file. All state is in the address.

A trajectory is untrusted text: templates escape everything, no style or script is written into a page, and the policy of
content lets none run. Requests are answered to 127.0.0.1 and localhost by name only, so that no page of elsewhere reads
them under a name of its own (DNS rebinding); only GET is known.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swirl_benchmarks.metrics import process_score
from swirl_benchmarks.viewer.index import FACETS, FLAGS, RANGES, SORTS, Index, Row, Selection
from swirl_benchmarks.viewer.tokens import Speller, cells
from swirl_env.errors import ConfigError, DataError
from swirl_env.io import loads
from swirl_env.types import Trajectory

PAGE = 100
"""Trajectories on a page of the list."""
STEPS = 50
"""Steps of a trajectory on a page."""
MANY = 50
"""Calls of one action, and gold answers, on a page."""
CLIP = 20_000
"""Characters of one text on a page; the line itself is a link."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
HERE = Path(__file__).parent


def make_app(index: Index) -> Starlette:
    """The viewer of an index."""
    pages = _Pages(index)
    routes = [
        Route("/", pages.list),
        Route("/show", pages.show),
        Route("/compare", pages.compare),
        Route("/line", pages.line),
        Route("/export", pages.export),
        Mount("/static", StaticFiles(directory=HERE / "static")),
    ]
    middleware = [
        Middleware(_Headers),
        Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"], www_redirect=False),
    ]
    kinds: tuple[type[Exception], ...] = (ConfigError, DataError, OSError, HTTPException)
    return Starlette(routes=routes, middleware=middleware, exception_handlers=dict.fromkeys(kinds, pages.error))


class _Headers:
    """The same headers on every answer."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, with_headers)


class _Pages:
    def __init__(self, index: Index):
        self.index = index
        self.spell = Speller()
        self.templates = Environment(
            loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True,
        )  # fmt: skip
        self.templates.filters |= {"score": _score, "clip": _clip}
        self.templates.globals |= {
            "CLIP": CLIP,
            "MANY": MANY,
            "FACETS": FACETS,
            "FLAGS": FLAGS,
            "RANGES": RANGES,
            "SORTS": SORTS,
        }

    def _html(self, name: str, status: int = 200, **values: Any) -> HTMLResponse:
        text = self.templates.get_template(name).render(**values)
        return HTMLResponse(text.encode(errors="replace"), status)

    def error(self, request: Request, error: Exception) -> Response:
        """A sentence in place of the page."""
        status = (
            error.status_code if isinstance(error, HTTPException) else 400 if isinstance(error, ConfigError) else 404
        )
        what = {404: "There is no such page.", 405: "The viewer only shows: GET is all it knows."}
        text = what.get(status, error.detail) if isinstance(error, HTTPException) else str(error)
        return self._html("error.html", status, title="Not shown", message=text)

    def list(self, request: Request) -> Response:
        self.index.refresh()
        selection = Selection.of(request.query_params)
        page = max(1, _whole(request, "page", 1))
        count = self.index.count(selection)
        rows = self.index.page(selection, (page - 1) * PAGE, PAGE)
        facets = {name: self.index.facet(selection, name) for name in FACETS}
        return self._html(
            "list.html", title="Trajectories", selection=selection, count=count, total=self.index.count(Selection()), rows=rows,
            first=(page - 1) * PAGE, page=page, pages=-(-count // PAGE), facets=facets, bad=self.index.bad(),
            notes=self.index.notes,
        )  # fmt: skip

    def show(self, request: Request) -> Response:
        self.index.refresh()
        selection = Selection.of(request.query_params)
        row = self._row(request)
        return self._html(
            "show.html", title=row.question or row.key, selection=selection, steps_from=_whole(request, "step", 1),
            one=self._side(request, row), **self._around(selection, row), others=len(self.index.same_question(row)),
        )  # fmt: skip

    def compare(self, request: Request) -> Response:
        self.index.refresh()
        selection = Selection.of(request.query_params)
        left = self._row(request)
        others = self.index.same_question(left)
        wanted = request.query_params.get("with", "")
        right = next((one for one in others if _token(one) == wanted), None)
        if right is None:  # of the file of the last comparison, if it has this question too
            same = [one for one in others if one.place["at"] == wanted.partition("|")[0]]
            right = next(iter(same or others), None)
        sides = [self._side(request, one) for one in (left, right) if one is not None]
        return self._html(
            "compare.html", title=f"Compare: {left.question or left.key}", selection=selection, left=left, right=right,
            sides=sides, others=[(_token(one), one) for one in others], token=_token(right) if right else "",
            **self._around(selection, left),
        )  # fmt: skip

    def line(self, request: Request) -> Response:
        """A line as it lies in its file."""
        self.index.refresh()
        data = self.index.line(request.query_params.get("at", ""), _whole(request, "line", 0))
        return Response(data, media_type="text/plain; charset=utf-8")

    def export(self, request: Request) -> Response:
        """The selection as JSONL."""
        self.index.refresh()
        lines = self.index.export(Selection.of(request.query_params))
        named = {"Content-Disposition": 'attachment; filename="selection.jsonl"'}
        return StreamingResponse(_chunks(lines), media_type="application/x-ndjson", headers=named)

    def _row(self, request: Request) -> Row:
        given = request.query_params
        return self.index.find(given.get("at", ""), given.get("key", ""), _whole(request, "line", 0))

    def _around(self, selection: Selection, row: Row) -> dict[str, Any]:
        position, before, after = self.index.around(selection, row)
        page = 1 if position is None else position // PAGE + 1
        return {
            "position": position,
            "before": before,
            "after": after,
            "page": page,
            "count": self.index.count(selection),
        }

    def _side(self, request: Request, row: Row) -> dict[str, Any]:
        """A trajectory as its template wants it; what is not of this schema as JSON with the reason."""
        data = self.index.read(row)
        first = max(1, _whole(request, "step", 1))
        spell = self.spell.of(self.index.runs[row.run])
        try:
            trajectory = loads(Trajectory, data.decode(errors="replace"), f"{row.place['at']}:{row.line}")
            shown = enumerate(trajectory.steps[first - 1 : first - 1 + STEPS], first)
            steps = [{"number": number, "step": step, "cells": cells(step, spell)} for number, step in shown]
        except (DataError, RecursionError) as error:
            return {"row": row, "reason": str(error), "json": _pretty(data)}
        following = first + STEPS if len(trajectory.steps) >= first + STEPS else None
        return {
            "row": row, "reason": "", "trajectory": trajectory, "process": process_score(trajectory), "steps": steps,
            "following": following, "first": first, "meta": _meta(trajectory.task.meta),
        }  # fmt: skip


def _token(row: Row) -> str:
    """A row in one query parameter."""
    return f"{row.place['at']}|{row.key}|{row.line}"


def _whole(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, "")
    if text and not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ConfigError(f"{name}: expected a whole number, got {text!r}.")
    return int(text or default)


def _score(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}".removesuffix("0").removesuffix("0")


def _clip(text: str) -> str:
    return text[:CLIP]


def _pretty(data: bytes) -> str:
    text = data.decode(errors="replace")
    try:
        return json.dumps(json.loads(text), indent=1, ensure_ascii=False)
    except RecursionError:  # nested too deeply to be laid out
        return text


def _meta(meta: dict[str, Any]) -> str:
    return json.dumps(meta, indent=1, ensure_ascii=False) if meta else ""


def _chunks(lines: Iterator[bytes], size: int = 1 << 18) -> Iterator[bytes]:
    """Lines joined to chunks: each costs a turn of the event loop."""
    waiting, held = [], 0
    for line in lines:
        waiting.append(line)
        held += len(line)
        if held >= size:
            yield b"".join(waiting)
            waiting, held = [], 0
    if waiting:
        yield b"".join(waiting)
