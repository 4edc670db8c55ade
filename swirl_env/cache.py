"""Where things that were made once are kept, and how a folder comes to be there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """`$SWIRL_CACHE`, else `swirl-env` in `$XDG_CACHE_HOME`, else `~/.cache/swirl-env`. It may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SWIRL_CACHE") or Path(base) / "swirl-env").expanduser()


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, made by `build` if it is not there yet.

    `build` fills a new folder beside it, which takes the name when complete: a killed build leaves no half folder, and
    of two processes that build at once each goes on with a whole one.

    Args:
        folder: what to make; its name says all that its content depends on.
        build: writes the content into the folder it is given.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        build(work)
        os.chmod(work, 0o755)
        work.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder
