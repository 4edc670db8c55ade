"""The `sql` tool: what it shows, what the engine refuses, what stops."""

import os
import pickle
import shutil
import sqlite3
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swirl_env.errors import ConfigError, ToolError
from swirl_env.testing import check_tool_contract
from swirl_env.tools import Sql, call_tool
from swirl_env.types import ToolCall


def make(path, wal=False):
    with closing(sqlite3.connect(path)) as connection:
        if wal:
            connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript(
            """
            CREATE TABLE city(id INTEGER PRIMARY KEY, name TEXT, people REAL, seal BLOB);
            INSERT INTO city VALUES (1, 'Burbank', 107337, x'0102'), (2, 'Glendale', 196543.5, NULL), (3, 'a
b', NULL, NULL);
            CREATE TABLE number(n INTEGER);
            WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 300) INSERT INTO number SELECT n FROM t;
            CREATE VIEW large AS SELECT name FROM city WHERE people > 150000;
            CREATE VIRTUAL TABLE page USING fts5(body);
            INSERT INTO page VALUES ('the quick fox');
            """
        )
        connection.commit()
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make(tmp_path_factory.mktemp("sql") / "my towns #1? é%20.db")


@pytest.fixture(scope="module")
def tool(path):
    return Sql(path)


def refusal(tool, query):
    with pytest.raises(ToolError) as caught:
        tool(query)
    return str(caught.value)


def test_contract(tool):
    check_tool_contract(
        tool, {"query": "SELECT 1"}, [{"query": "DROP TABLE city"}, {"query": ""}, {"query": "nonsense"}]
    )


def test_description_tells_the_tables(tool):
    assert tool.description.startswith("Runs one read-only SQLite query. Tables: ")
    for table in ("city(id, name, people, seal)", "number(n)", "large(name)", "page(body)"):
        assert table in tool.description
    assert "page_data" not in tool.description


def test_description_of_a_big_schema_is_cut(tmp_path):
    with closing(sqlite3.connect(tmp_path / "big.db")) as connection:
        for i in range(200):
            connection.execute(f"CREATE TABLE t{i}({', '.join(f'c{j}' for j in range(150))})")
    text = Sql(tmp_path / "big.db").description
    assert len(text) < 2_000 and "... 130 more" in text and "more in sqlite_master" in text
    assert Sql(tmp_path / "big.db")("SELECT c149 FROM t199") == "c149\n(no rows)"


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("SELECT name, people FROM city WHERE id < 3", "name | people\nBurbank | 107337.0\nGlendale | 196543.5"),
        ("SELECT seal FROM city WHERE id < 3", "seal\n[blob of 2 bytes]\nNULL"),
        ("SELECT name FROM city WHERE id = 3", "name\na\\nb"),
        ("SELECT * FROM city WHERE 0", "id | name | people | seal\n(no rows)"),
        ("SELECT count(*) AS n FROM number;", "n\n300"),
        ("SELECT * FROM large", "name\nGlendale"),
        ("SELECT body FROM page WHERE page MATCH 'quick'", "body\nthe quick fox"),
        ("WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 3) SELECT n FROM t", "n\n1\n2\n3"),
        ("SELECT name FROM sqlite_master WHERE name = 'city'", "name\ncity"),
        ("SELECT CAST(x'ff41' AS TEXT) AS x", "x\n\ufffdA"),
        ("SELECT printf('%.1f', 2.34) AS x, upper('a') AS y", "x | y\n2.3 | A"),
        ("-- how many\nSELECT 1 AS x", "x\n1"),
    ],
)  # fmt: skip
def test_what_is_shown(tool, query, shown):
    assert tool(query) == shown


def test_rows_and_cells_are_cut_and_it_is_said(path):
    tool = Sql(path, max_rows=5, max_characters=400)
    lines = tool("SELECT n FROM number").splitlines()
    assert lines == ["n", "1", "2", "3", "4", "5", "(There are more rows; the first 5 are shown.)"]
    assert tool("SELECT n FROM number LIMIT 5").splitlines()[-1] == "5"
    wide = tool("SELECT hex(zeroblob(1000)) AS x FROM number")
    assert "(1,900 characters were cut)" in wide and "more rows" in wide and len(wide) < 600


WRITES = [
    "INSERT INTO city(name) VALUES ('x')", "UPDATE city SET name = 'x'", "DELETE FROM city", "DROP TABLE city",
    "REPLACE INTO city(id) VALUES (1)", "CREATE TABLE x(y)", "CREATE TEMP TABLE x(y)", "CREATE INDEX i ON city(name)",
    "ALTER TABLE city ADD COLUMN z", "ATTACH ':memory:' AS other", "ATTACH 'new.db' AS other", "DETACH main", "VACUUM",
    "VACUUM INTO 'copy.db'", "BEGIN", "COMMIT", "SAVEPOINT s", "REINDEX", "ANALYZE", "PRAGMA journal_mode = DELETE",
    "PRAGMA writable_schema = 1", "PRAGMA table_info(city)", "SELECT * FROM pragma_table_info('city')",
    "SELECT * FROM pragma_database_list", "WITH x AS (SELECT 1) DELETE FROM city", "EXPLAIN DELETE FROM city",
    "INSERT INTO page(page) VALUES ('optimize')", "SELECT load_extension('x')", "SELECT writefile('x', 'y')",
    "SELECT readfile('/etc/passwd')", "SELECT fts3_tokenizer('simple')", "SELECT * FROM city ORDER BY random()",
    "SELECT 1; DELETE FROM city", "SELECT 1; SELECT 2", "SELECT ?", "SELECT 1\0", "SELECT '\ud800'", "", "  ; ", "-- x",
    "CREATE TRIGGER t AFTER INSERT ON city BEGIN SELECT 1; END", "SELECT edit('x')", "nonsense", "x" * 20_000,
]  # fmt: skip


@pytest.mark.parametrize("query", WRITES, ids=range(len(WRITES)))
def test_everything_but_one_select_is_refused(tool, path, query, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = path.read_bytes()
    assert refusal(tool, query).endswith((".", "'", "?")), "a sentence"
    assert path.read_bytes() == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("SELECT nmae FROM city", "Did you mean name?"),
        ("SELECT c.nmae FROM city c", "Did you mean name?"),
        ("SELECT * FROM citty", "Did you mean city? There are: "),
        ("PRAGMA table_info(city)", "PRAGMA is refused. Tables and their columns stand in sqlite_master."),
        ("DELETE FROM city", "Only SELECT is allowed: the database is read-only."),
        ("SELECT random()", "The function random is refused."),
        (f"SELECT {', '.join('1' * 200)}", "asks for 200 columns"),
    ],
)
def test_refusals_help(tool, query, said):
    assert said in refusal(tool, query)


ENDLESS = [
    "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT count(*) FROM t",
    "WITH RECURSIVE t(n) AS (SELECT 1 UNION SELECT n + 1 FROM t) SELECT max(n) FROM t",
    "SELECT count(*) FROM number a, number b, number c, number d, number e",
    "SELECT a.n FROM number a, number b, number c, number d ORDER BY a.n * b.n * c.n * d.n",
    # one instruction of the engine that no handler can stop
    "WITH t(x) AS (SELECT hex(zeroblob(490000))) SELECT instr(x, substr(x, 1, 480000) || '1') FROM t, number",
]  # fmt: skip


@pytest.mark.parametrize("query", ENDLESS, ids=["recursive", "recursive distinct", "product", "sort", "instr"])
def test_the_timeout_holds(path, query):
    start = time.monotonic()
    assert "longer than 0.3 seconds" in refusal(Sql(path, timeout=0.3), query)
    assert time.monotonic() - start < 2.5


@pytest.mark.parametrize(
    "query",
    [
        "SELECT zeroblob(2000000000)",
        "SELECT hex(zeroblob(1000000))",
        "SELECT group_concat(hex(zeroblob(10000))) FROM number",
        "SELECT replace(hex(zeroblob(10000)), '0', hex(zeroblob(10000)))",
        "SELECT json_group_array(hex(zeroblob(10000))) FROM number",
        "WITH RECURSIVE t(x) AS (SELECT 'ab' UNION ALL SELECT x || x FROM t) SELECT max(length(x)) FROM t",
    ],
)
def test_memory_bombs_are_refused(tool, query):
    assert "larger than 1,000,000 bytes" in refusal(tool, query)


@given(
    st.text(max_size=40)
    | st.lists(st.sampled_from(["SELECT", "*", "FROM", "city", "(", ")", ",", "1", "WHERE", ";", "'"])).map(" ".join)
)
def test_any_text_is_a_table_or_a_refusal(tool, query):
    result = call_tool({"sql": tool}, ToolCall("sql", {"query": query}))
    assert result.error in (None, "tool_error"), result.text


def test_pickles_and_works_in_threads(tool):
    twin = pickle.loads(pickle.dumps(tool))
    assert twin.description == tool.description
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(twin, [f"SELECT {i} AS x" for i in range(20)])) == [f"x\n{i}" for i in range(20)]


def test_sees_what_others_write_meanwhile(tmp_path):
    for wal in (False, True):
        path = make(tmp_path / f"{wal}.db", wal)
        tool = Sql(path)
        with closing(sqlite3.connect(path)) as writer:
            writer.execute("INSERT INTO city(name) VALUES ('new')")
            writer.commit()
            assert tool("SELECT name FROM city WHERE name = 'new'") == "name\nnew"
            if not wal:
                writer.execute("BEGIN EXCLUSIVE")
                tool.timeout = 0.1
                assert "locked" in refusal(tool, "SELECT 1")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("wal", [False, True])
def test_reads_a_database_in_a_read_only_folder(wal):
    folder = Path(tempfile.mkdtemp(prefix="swirl-test-", dir="/tmp"))
    try:
        make(folder / "x.db", wal)
        folder.chmod(0o555)
        (folder / "x.db").chmod(0o444)
        child = os.fork()
        if child == 0:  # as nobody, if we are root, whom no permission stops
            try:
                if os.getuid() == 0:
                    os.setuid(65534)
                os._exit(0 if Sql(folder / "x.db")("SELECT name FROM city WHERE id = 1") == "name\nBurbank" else 1)
            except BaseException as error:
                print(repr(error))
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        assert sorted(file.name for file in folder.iterdir()) == ["x.db"]
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("bad", ["missing.db", ".", "text.db", "empty.db"])
def test_a_file_that_cannot_serve_is_refused_at_once(tmp_path, bad):
    (tmp_path / "text.db").write_text("This is no database at all. " * 100)
    (tmp_path / "empty.db").touch()
    with pytest.raises(ConfigError, match="there is no file|cannot be read as a SQLite database|holds no table"):
        Sql(tmp_path / bad)


@pytest.mark.parametrize("bad", [{"max_rows": 0}, {"timeout": "1"}, {"max_characters": 1.5}])
def test_bad_settings(path, bad):
    with pytest.raises(ConfigError, match="must be a positive number"):
        Sql(path, **bad)
