"""Where downloaded and computed files are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$SWIRL_CACHE`, else `swirl-env` in `$XDG_CACHE_HOME`, else `~/.cache/swirl-env`. It may not exist yet."""
    if named := os.environ.get("SWIRL_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "swirl-env"
