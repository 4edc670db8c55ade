"""The `sql` tool: read-only questions to a user's SQLite file.

Three things keep the file as it is and the call short: the file is opened with `mode=ro`; the engine's authorizer allows
SELECT alone, so that writes, ATTACH and PRAGMA are refused while a query is compiled; a progress handler stops what runs
past the deadline. A single instruction of the engine cannot be stopped (`instr` of a long text in a longer one takes
time m x n), so the query runs in a thread that is left behind when it does not stop in time; the limits on lengths bound
what it can still use. Each call opens the file anew, so a tool may be pickled and used from any thread.

`random()` is refused: the same query gives the same rows.
"""

import difflib
import re
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from swirl_env.errors import ConfigError, ToolError
from swirl_env.tools.base import describe

MAX_VALUE_BYTES = 1_000_000
"""A longer text or blob cannot be read, nor made by a function."""
MAX_QUERY_CHARACTERS = 10_000
MAX_COLUMNS = 100
MAX_SCHEMA_CHARACTERS = 1_500
"""What the description tells of tables and columns; more is cut, and the cut is said."""

_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE, sqlite3.SQLITE_FUNCTION}
_REFUSED_FUNCTIONS = {
    "load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "random", "randomblob",
}  # fmt: skip
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: MAX_VALUE_BYTES,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 500,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}


class Sql:
    """The `sql` tool over one SQLite file.

    Args:
        path: the file; also one in WAL mode or in a read-only folder.
        max_rows: rows that one call shows.
        max_characters: length of the shown table; one cell may take a quarter of it.
        timeout: seconds a query may take.

    Raises:
        ConfigError: there is no such file, it is no SQLite database, or it has no table.

    Examples:
        >>> import sqlite3
        >>> with sqlite3.connect("shop.db") as shop:
        ...     _ = shop.execute("create table fruit (name text, price real)")
        ...     _ = shop.execute("insert into fruit values ('pear', 0.4), ('fig', 0.9)")
        >>> import gymnasium as gym, swirl_env
        >>> env = gym.make("swirl/Tasks-v0", tools=["sql:shop.db"])
        >>> text, info = env.reset(seed=0)
        >>> text, *_, info = env.step("<sql>select name from fruit where price > 0.5</sql>")
        >>> print(info["step"].observation)
        <result>name
        fig</result>
    """

    name = "sql"

    def __init__(self, path: str | Path, max_rows: int = 50, max_characters: int = 4_000, timeout: float = 2.0):
        for name, value in (("max_rows", max_rows), ("max_characters", max_characters), ("timeout", timeout)):
            kinds = (int, float) if name == "timeout" else int
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 1e9:
                raise ConfigError(f"sql: {name} must be a positive number, got {value!r}.")
        self.path = Path(path).expanduser().resolve()
        self.max_rows, self.max_characters, self.timeout = max_rows, max_characters, timeout
        if not self.path.is_file():
            raise ConfigError(f"sql: there is no file {self.path}. Expected a SQLite database.")
        try:
            with closing(self._connect()) as connection:
                self.columns, self._virtual = _columns(connection)
        except sqlite3.Error as error:
            raise ConfigError(f"sql: {self.path} cannot be read as a SQLite database: {error}.") from error
        if not self.columns:
            raise ConfigError(f"sql: {self.path} holds no table.")
        says, self.parameters = describe(self.__call__)
        self.description = f"{says} {_schema(self.columns)}"

    def __call__(self, query: str) -> str:
        """Runs one read-only SQLite query.

        Args:
            query: A SELECT statement.
        """
        if len(query) > MAX_QUERY_CHARACTERS:
            raise ToolError(f"The query has {len(query):,} characters; at most {MAX_QUERY_CHARACTERS:,} are read.")
        return _within(self.timeout, lambda deadline: self._ask(query, deadline))

    def _ask(self, query: str, deadline: float) -> str:
        refused: list[str] = []

        def authorize(action: int, first: str | None, second: str | None, *_: Any) -> int:
            if action == sqlite3.SQLITE_FUNCTION and str(second).lower() in _REFUSED_FUNCTIONS:
                refused.append(f"The function {second} is refused.")
            elif action == sqlite3.SQLITE_PRAGMA and first == "data_version" and second is None:
                pass  # asked by full-text tables; it tells only whether the file has changed
            elif action == sqlite3.SQLITE_PRAGMA:
                refused.append("PRAGMA is refused. Tables and their columns stand in sqlite_master.")
            elif action not in _ALLOWED:
                refused.append("Only SELECT is allowed: the database is read-only.")
            return sqlite3.SQLITE_DENY if refused else sqlite3.SQLITE_OK

        try:
            with closing(self._connect()) as connection:
                for limit, value in _LIMITS.items():
                    connection.setlimit(limit, value)
                for name in self._virtual:  # a full-text table asks for more than SELECT while it is opened
                    connection.execute(f"SELECT 1 FROM {name} LIMIT 0").close()
                connection.text_factory = lambda data: data.decode(errors="replace")
                connection.set_authorizer(authorize)
                connection.set_progress_handler(lambda: time.monotonic() > deadline, 200)
                return self._table(connection.execute(query))
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            if refused:
                raise ToolError(refused[0]) from None
            raise ToolError(self._explained(str(error))) from None

    def _table(self, rows: sqlite3.Cursor) -> str:
        """The rows as text: the column names, then a line for each row, cells separated by ` | `."""
        if rows.description is None:
            raise ToolError("There is no query. Write a SELECT statement.")
        if len(rows.description) > MAX_COLUMNS:
            raise ToolError(f"The query asks for {len(rows.description)} columns; at most {MAX_COLUMNS} are shown.")
        widest = max(self.max_characters // 4, 1)
        lines = [" | ".join(_cell(column[0], widest) for column in rows.description)]
        length = len(lines[0])
        for count, row in enumerate(rows):
            line = " | ".join(_cell(value, widest) for value in row)
            length += len(line) + 1
            if count == self.max_rows or (length > self.max_characters and count):
                return "\n".join([*lines, f"(There are more rows; the first {count} are shown.)"])
            if length > self.max_characters:
                line = f"{line[: self.max_characters]}... ({len(line) - self.max_characters:,} characters were cut)"
            lines.append(line)
        return "\n".join(lines if len(lines) > 1 else [*lines, "(no rows)"])

    def _explained(self, message: str) -> str:
        """SQLite's message as a sentence, with the near match of a misspelt table or column."""
        if message == "interrupted":
            return _too_long(self.timeout)
        if "too big" in message:
            return f"A value is larger than {MAX_VALUE_BYTES:,} bytes, which cannot be read."
        message = f"SQLite: {message.rstrip('.')}."
        if found := re.search(r"no such (table|column): (?:\w+\.)?(.+)\.", message):
            tables = found[1] == "table"
            known = self.columns if tables else {name for names in self.columns.values() for name in names}
            if close := difflib.get_close_matches(found[2], sorted(known), n=1):
                message += f" Did you mean {close[0]}?"
            if tables:
                message += f" There are: {_cut(', '.join(self.columns), 300)}."
        return message

    def _connect(self) -> sqlite3.Connection:
        """A read-only connection that has read the schema."""
        wal = self.path.with_name(self.path.name + "-wal")
        # A file in WAL mode in a read-only folder opens only as immutable; that is true while no log waits beside it.
        modes = ["mode=ro"] + ([] if wal.exists() and wal.stat().st_size else ["mode=ro&immutable=1"])
        for mode in modes:
            connection = sqlite3.connect(f"{self.path.as_uri()}?{mode}", uri=True, timeout=self.timeout)
            try:
                connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()
                return connection
            except sqlite3.Error as error:
                connection.close()
                cannot_open = getattr(error, "sqlite_errorcode", 0) & 0xFF in (
                    sqlite3.SQLITE_CANTOPEN,
                    sqlite3.SQLITE_READONLY,
                )
                if mode == modes[-1] or not cannot_open:
                    raise
        raise AssertionError("unreachable")

    def __reduce__(self) -> tuple[Any, ...]:
        return Sql, (self.path, self.max_rows, self.max_characters, self.timeout)


def _within(seconds: float, function: Callable[[float], str]) -> str:
    """`function(deadline)` in a thread of its own, which is left behind when it does not stop in time."""
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(function(time.monotonic() + seconds))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, name="swirl-sql", daemon=True)
    thread.start()
    thread.join(seconds + 0.2)
    if not outcome:
        raise ToolError(_too_long(seconds))
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _too_long(seconds: float) -> str:
    return f"The query was stopped: it took longer than {seconds:g} seconds. Ask for less, or add a WHERE or LIMIT."


def _cell(value: Any, widest: int) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"[blob of {len(value):,} bytes]"
    return _cut(str(value), widest).replace("\r", "").replace("\n", "\\n")


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}... ({len(text) - length:,} characters were cut)"


def _columns(connection: sqlite3.Connection) -> tuple[dict[str, list[str]], list[str]]:
    """(table or view -> its columns, virtual tables as quoted names); those that cannot be opened are left out."""
    found = connection.execute(
        "SELECT s.name, l.type FROM sqlite_master s JOIN pragma_table_list l ON l.schema = 'main' AND l.name = s.name "
        "WHERE s.type IN ('table', 'view') AND l.type != 'shadow' AND s.name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
    )
    columns, virtual = {}, []
    for name, kind in found.fetchall():
        quoted = '"{}"'.format(name.replace('"', '""'))
        try:
            connection.execute(f"SELECT 1 FROM {quoted} LIMIT 0").close()
        except sqlite3.Error:  # a view over what is gone, or a virtual table whose module is not there
            continue
        columns[name] = [row[0] for row in connection.execute("SELECT name FROM pragma_table_info(?)", [name])]
        if kind == "virtual":
            virtual.append(quoted)
    return columns, virtual


def _schema(columns: dict[str, list[str]]) -> str:
    """`Tables: a(x, y); b(z)`, cut to `MAX_SCHEMA_CHARACTERS`: first long lists of columns, then tables."""
    shown: list[str] = []
    for name, fields in columns.items():
        more = f", ... {len(fields) - 20} more" if len(fields) > 20 else ""
        shown.append(f"{name}({', '.join(fields[:20])}{more})")
    kept: list[str] = []
    for table in shown:
        if kept and sum(map(len, kept)) + len(table) > MAX_SCHEMA_CHARACTERS:
            return f"Tables: {'; '.join(kept)}; and {len(shown) - len(kept)} more in sqlite_master."
        kept.append(_cut(table, MAX_SCHEMA_CHARACTERS))
    return f"Tables: {'; '.join(kept)}."
