"""The viewer's server: uvicorn on a socket of 127.0.0.1, until Ctrl-C."""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from tqdm import tqdm

from swirl_benchmarks.sockets import listen
from swirl_benchmarks.viewer.index import Index, files_of
from swirl_benchmarks.viewer.pages import make_app

HOST = "127.0.0.1"


def serve(runs: Sequence[Path], port: int = 0, open_browser: bool = False) -> None:
    """Index the runs, print the address, and answer until Ctrl-C.

    Args:
        runs: run folders and files of trajectories.
        port: 0 for a free one.
        open_browser: whether to open the address.

    Raises:
        ConfigError: there is nothing to show, or the port is in use.
    """
    with listen(HOST, port) as listener:
        size = sum(path.stat().st_size for run in runs if run.exists() for path in files_of(run) if path.is_file())
        with tqdm(
            total=size,
            desc="read",
            unit="B",
            unit_scale=True,
            delay=1,
            dynamic_ncols=True,
            disable=bool(os.environ.get("SWIRL_QUIET")),
        ) as progress:
            index = Index(runs, progress.update)
        count, some = index.bad(1)
        for note in index.notes:
            print(f"swirl view: {note}", file=sys.stderr)
        if count:
            first = f"{some[0].at}:{some[0].line}: {some[0].reason}"
            print(f"swirl view: {count} lines cannot be shown, such as {first}", file=sys.stderr)
        address = f"http://{HOST}:{listener.getsockname()[1]}/"
        print(f"{address} shows them; Ctrl-C ends it.", flush=True)
        if open_browser:
            import webbrowser

            webbrowser.open(address)
        config = uvicorn.Config(make_app(index), log_level="warning", access_log=False, timeout_graceful_shutdown=1)
        with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn when it has ended
            uvicorn.Server(config).run(sockets=[listener])
