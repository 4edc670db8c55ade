"""Downloads the official files of the task sets into the cache folder, each once.

    for path in fetch("gsm8k"):
        gym.make("swirl/GSM8K-v0", path=str(path))

A file grows as `NAME.part` and gets its name when it is whole, so what has a name can be trusted. A cut download goes on
where it stopped (`Range` with `If-Range`; where the server ignores that, from the start), a server error is tried again.
Then its SHA-256 is compared with the published one; where none is published it is recorded in `SHA256SUMS` at the first
download, and compared with that from then on. A file put there by hand is treated the same.
"""

import fcntl
import hashlib
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from swirl_env.cache import cache_folder
from swirl_env.errors import DataError, UnknownNameError, near

ATTEMPTS = 4
"""Failures in a row, none of which brought a byte, after which a download is given up."""
WAIT_SECONDS = 1.0
"""Before the second attempt; doubled for each further one."""
TIMEOUT_SECONDS = (10, 60)
"""To connect, and between two pieces."""


@dataclass(frozen=True, slots=True)
class Source:
    """One official file."""

    file: str
    """Its name in the cache folder."""
    url: str
    megabytes: float | None = None
    """About; `None`: not known."""
    sha256: str | None = None
    """Published checksum; `None`: none is."""
    members: tuple[str, ...] = ()
    """Of a zip file: the names, without folders, of the files to take out of it."""

    @property
    def names(self) -> tuple[str, ...]:
        """What lies in the cache folder afterwards, for `path=`."""
        return self.members or (self.file,)


_HOTPOT = "http://curtis.ml.cmu.edu/datasets/hotpot"
_GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
_BEERQA = "https://nlp.stanford.edu/projects/beerqa"

SOURCES: dict[str, tuple[Source, ...]] = {
    "hotpotqa": (  # checksums: ParlAI, parlai/tasks/hotpotqa/build.py
        Source(
            "hotpot_train_v1.1.json", f"{_HOTPOT}/hotpot_train_v1.1.json", 566.4,
            "26650cf50234ef5fb2e664ed70bbecdfd87815e6bffc257e068efea5cf7cd316",
        ),
        Source(
            "hotpot_dev_distractor_v1.json", f"{_HOTPOT}/hotpot_dev_distractor_v1.json", 46.3,
            "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
        ),
        Source(
            "hotpot_dev_fullwiki_v1.json", f"{_HOTPOT}/hotpot_dev_fullwiki_v1.json", None,
            "2f1f3e594a3066a3084cc57950ca2713c24712adaad03af6ccce18d1846d5618",
        ),
    ),
    "gsm8k": (  # checksums: of the files at commit 3101c7d, as several public projects pin them
        Source(
            "gsm8k_train.jsonl", f"{_GSM8K}/train.jsonl", 4.2,
            "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        ),
        Source(
            "gsm8k_test.jsonl", f"{_GSM8K}/test.jsonl", 0.7,
            "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        ),
    ),
    "musique": (  # the file that the authors' download_data.sh names
        Source(
            "musique_v1.0.zip",
            "https://drive.usercontent.google.com/download?id=1tGdADlNjWFaHLeZZGShh2IRcpO6Lv24h&export=download&confirm=t",
            members=("musique_ans_v1.0_train.jsonl", "musique_ans_v1.0_dev.jsonl", "musique_ans_v1.0_test.jsonl"),
        ),
    ),
    "beerqa": (
        Source("beerqa_train_v1.0.json", f"{_BEERQA}/beerqa_train_v1.0.json", 153),
        Source("beerqa_dev_v1.0.json", f"{_BEERQA}/beerqa_dev_v1.0.json", 16),
        Source("beerqa_test_questions_v1.0.json", f"{_BEERQA}/beerqa_test_questions_v1.0.json", 2.2),
    ),
    "cofca": (),  # no public copy is known
}  # fmt: skip
"""Task set -> its official files."""


def data_folder() -> Path:
    """Where the files are kept: `data` in the cache folder."""
    return cache_folder() / "data"


def listing() -> list[tuple[str, Source, Path | None]]:
    """(task set, source, where it lies) of every official file; `None`: not downloaded yet. Looks at no network."""
    folder = data_folder()
    return [
        (name, source, folder / source.names[0] if all((folder / n).is_file() for n in source.names) else None)
        for name, sources in SOURCES.items()
        for source in sources
    ]


def fetch(name: str, say: Callable[[str], None] = print) -> list[Path]:
    """Download a task set's official files, or one of them, unless they lie in the cache folder already.

    Args:
        name: a task set, such as `gsm8k`, or the name of one file of `listing()`.
        say: told what was done, a line each; a progress bar goes to a terminal's error stream.

    Returns:
        The files, for `gym.make(..., path=...)`.

    Raises:
        UnknownNameError: there is no such set or file.
        DataError: no connection, an error of the server, or another checksum than expected; says where to get the file
            and where to put it by hand. What has come so far is kept.
    """
    every = {source.file: source for sources in SOURCES.values() for source in sources}
    if name not in SOURCES and name not in every:
        raise UnknownNameError(f"No official file or task set is called {name!r}.{near(name, [*SOURCES, *every])}")
    sources = SOURCES[name] if name in SOURCES else (every[name],)
    if not sources:
        raise DataError(f"{name}: no public address of this data is known. Ask its authors, then read it by path=FILE.")
    folder = data_folder()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with _only_one(folder):
        for source in sources:
            target = folder / source.file
            if not target.exists():
                _download(source, target, say)
            _verify(source, target, say)
            _extract(source, target, say)
            paths += [folder / member for member in source.names]
    return paths


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Two processes that append to one file would spoil it."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"Another process is downloading into {folder}. Run this again when it is done.") from None
        yield


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)


def _by_hand(source: Source, target: Path) -> str:
    return f"Or get it by hand from {source.url} , put it at {target} and run this again."


# -- one file


class _Refused(Exception):
    """What no further attempt would mend."""


def _download(source: Source, target: Path, say: Callable[[str], None]) -> None:
    """Until `target` is whole; attempts that bring nothing are counted."""
    import requests

    part, failures = _beside(target, ".part"), 0
    while True:
        before = _size(part)
        try:
            _receive(source, part)
            break
        except _Refused as refusal:
            raise DataError(f"{source.url}: {refusal} {_by_hand(source, target)}") from None
        except requests.RequestException as error:
            failures = failures + 1 if _size(part) <= before else 0
            if failures == ATTEMPTS:
                kept = f" {_size(part):,} bytes are kept, and the next run goes on there." if _size(part) else ""
                raise DataError(
                    f"{source.url} could not be fetched ({_cause(error)}). Is there a connection?{kept} "
                    f"{_by_hand(source, target)}"
                ) from None
            say(f"{source.file}: {_cause(error)}; trying again.")
            time.sleep(WAIT_SECONDS * 2 ** max(0, failures - 1))
    _beside(target, ".etag").unlink(missing_ok=True)
    part.replace(target)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _receive(source: Source, part: Path) -> None:
    """One request: the file, or what is missing of it. Raises `requests.RequestException` where another attempt may help."""
    import requests
    from tqdm import tqdm

    etag_file = part.with_suffix(".etag")
    have, etag = _size(part), etag_file.read_text() if etag_file.exists() else ""
    headers = {"Accept-Encoding": "identity", "User-Agent": "swirl-env"}
    if have and etag:
        headers |= {"Range": f"bytes={have}-", "If-Range": etag}
    with requests.get(source.url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
        if response.status_code == 416:  # nothing comes after what is there
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return
            part.unlink(missing_ok=True)
            raise requests.HTTPError("the server has no such part")
        if response.status_code == 429 or response.status_code >= 500:
            raise requests.HTTPError(f"the server says {response.status_code} {response.reason}")
        if not response.ok:
            raise _Refused(f"the server says {response.status_code} {response.reason}.")
        if "text/html" in response.headers.get("Content-Type", ""):
            raise _Refused("the server sent a web page instead of the file.")
        goes_on = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if response.status_code == 206 and not goes_on:
            part.unlink(missing_ok=True)
            raise requests.HTTPError("the server sent another part than was asked for")
        have = have if goes_on else 0
        plain = "Content-Length" in response.headers and "Content-Encoding" not in response.headers
        said = response.headers.get("Content-Length", "")
        coming = int(said) if plain and said.isdecimal() else None
        if coming is not None and shutil.disk_usage(part.parent).free < coming:
            raise _Refused(f"{coming:,} bytes are to come, and {part.parent} has no room for them.")
        etag_file.write_text(_validator(response.headers))
        bar = tqdm(
            total=coming and have + coming, initial=have, unit="B", unit_scale=True, desc=source.file, disable=None
        )
        with bar, part.open("ab" if goes_on else "wb") as out:
            for piece in response.iter_content(1 << 16):
                out.write(piece)
                bar.update(len(piece))
    if (coming is not None and _size(part) != have + coming) or not _ends_well(source, part):
        raise requests.ConnectionError("the connection was cut")


def _ends_well(source: Source, part: Path) -> bool:
    """Whether a file ends as one of its kind does: a server that tells no length may have cut it."""
    with part.open("rb") as file:
        file.seek(max(0, _size(part) - 65_600))
        tail = file.read()
    if source.file.endswith(".zip"):
        return b"PK\x05\x06" in tail  # the record at the end of every archive
    return tail.rstrip().endswith((b"}", b"]"))


def _validator(headers: Mapping[str, str]) -> str:
    """What tells a server which version of the file we have a part of; a weak ETag cannot."""
    etag = headers.get("ETag", "")
    return headers.get("Last-Modified", "") if etag.startswith("W/") or not etag else etag


# -- checksums


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(source: Source, target: Path, say: Callable[[str], None]) -> None:
    """Compare with the published checksum, or with the one recorded first; a file that differs is put aside."""
    ledger = target.with_name("SHA256SUMS")
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    recorded = {file: digest for digest, _, file in (line.partition("  ") for line in lines)}
    digest, expected = _sha256(target), source.sha256 or recorded.get(source.file)
    if expected is None:
        with ledger.open("a") as out:
            out.write(f"{digest}  {source.file}\n")
        say(f"{target}: no checksum is published; SHA-256 {digest} is recorded in {ledger.name}.")
    elif digest == expected:
        say(f"{target}: the SHA-256 is the {'published' if source.sha256 else 'recorded'} one.")
    else:
        target.replace(_beside(target, ".bad"))
        origin = "published" if source.sha256 else f"recorded in {ledger} when it first came"
        raise DataError(
            f"{target}: SHA-256 {digest} is not the one {origin}, {expected}. The file is damaged, or the publisher changed "
            f"it; it is kept as {target.name}.bad. Run this again"
            + ("." if source.sha256 else f", or delete its line in {ledger.name} to accept another.")
        )


# -- zip files


def _extract(source: Source, target: Path, say: Callable[[str], None]) -> None:
    """The members that are not there yet; each gets its name when it is whole."""
    missing = [member for member in source.members if not (target.parent / member).exists()]
    if not missing:
        return
    try:
        with zipfile.ZipFile(target) as archive:
            inside = {Path(name).name: name for name in archive.namelist() if not name.startswith("__MACOSX")}
            for member in missing:
                if member not in inside:
                    raise DataError(
                        f"{target} has no {member}. It holds {', '.join(sorted(filter(None, inside)))[:300]}."
                    )
                with archive.open(inside[member]) as packed:
                    _write_whole(packed, target.parent / member)
                say(f"{target.parent / member}: taken out of {target.name}.")
    except zipfile.BadZipFile as error:
        raise DataError(f"{target} is not a zip file ({error}). Delete it and run this again.") from None


def _write_whole(packed: IO[bytes], path: Path) -> None:
    part = _beside(path, ".part")
    with part.open("wb") as out:
        shutil.copyfileobj(packed, out)
    os.replace(part, path)
