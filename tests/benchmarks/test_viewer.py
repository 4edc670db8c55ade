"""`swirl view` without a browser: a real process on the loopback, asked with httpx."""

import json
import os
import re
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from swirl_benchmarks.viewer import pages
from swirl_benchmarks.viewer.index import SORTS, Index, Selection, files_of
from swirl_benchmarks.viewer.tokens import Speller, cells

from swirl_env.errors import ConfigError
from swirl_env.io import Writer, dumps
from swirl_env.types import Action, Step, Tokens

EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'\"&amp;\u202e"


def write(path, trajectories):
    with Writer(path) as out:
        for one in trajectories:
            out.write(one)
    return path


def keys(page):
    """The keys of the rows of a list, in order."""
    links = re.findall(r'class="question"><a href="([^"]+)"', page)
    return [parse_qs(urlsplit(link.replace("&amp;", "&")).query)["key"][0] for link in links]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, made):
    """Two runs of the same questions, in a run folder and in a file."""
    folder = tmp_path_factory.mktemp("runs")
    first = [
        made("1", outcome=1.0, scores=(1.0, 0.5)),
        made("1", 1, outcome=0.0, scores=(0.0,), answer="Ridley Scott", reason="repeats an earlier query"),
        made(
            "2",
            question="How many moons has Mars?",
            scores=(None,),
            error="tool_error",
            outcome=None,
            stop="step_limit",
        ),
        made(
            "3", question="Wo liegt Köln?", malformed="Am Rhein, oder?", scores=(), outcome=0.0, stop="malformed_limit"
        ),
    ]
    write(folder / "first" / "judged.jsonl", first)
    write(folder / "other.jsonl", [made("1", policy="tiny", scores=(0.25,), outcome=0.5, result="A film of 2003.")])
    return folder


@pytest.fixture(scope="module")
def page(runs, viewer):
    """Gets an address of the viewer of both runs."""
    with viewer(runs / "first", runs / "other.jsonl") as process, httpx.Client(base_url=process.address) as client:
        yield client.get


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", ["1/0/0", "1/1/0", "2/0/0", "3/0/0", "1/0/0"]),
        ("run=first", ["1/0/0", "1/1/0", "2/0/0", "3/0/0"]),
        ("run=other.jsonl", ["1/0/0"]),
        ("stage=judged&policy=oracle&stop=answered", ["1/0/0", "1/1/0"]),
        ("env=swirl/GSM8K-v0", []),
        ("task=1", ["1/0/0", "1/1/0", "1/0/0"]),
        ("process_from=0.25&process_to=0.75", ["1/0/0", "1/0/0"]),  # 0.75 and 0.25; unknown is not in a range
        ("outcome_to=0.5", ["1/1/0", "3/0/0", "1/0/0"]),
        ("errors=1", ["2/0/0"]),
        ("malformed=1", ["3/0/0"]),
        ("unknown=1", ["2/0/0"]),
        ("q=ridley", ["1/1/0"]),  # of an answer
        ("q=MOON+mars", ["2/0/0"]),  # beginnings of words, any case, all of them
        ("q=koln", ["3/0/0"]),  # without the dots
        ("q=repeats", ["1/1/0"]),  # of a reason
        ("q=2003+film", ["1/0/0"]),  # of a result
        ("q=oder%3F", ["3/0/0"]),  # of a malformed action
        ("q=nowhere", []),
        ("q=3+rhein", ["3/0/0"]),  # a question's id is a word too
        ("sort=process&run=first", ["1/1/0", "1/0/0", "2/0/0", "3/0/0"]),  # unknown last
        ("sort=-outcome", ["1/0/0", "1/0/0", "1/1/0", "3/0/0", "2/0/0"]),
        ("sort=-steps&run=first", ["1/0/0", "1/1/0", "2/0/0", "3/0/0"]),
    ],
)
def test_filters(page, query, expected):
    text = page(f"/?{query}").text
    assert keys(text) == expected
    assert f"<b>{len(expected)}</b> of 5 trajectories" in text
    lines = page(f"/export?{query}").text.splitlines()
    assert [
        f"{(data := json.loads(line))['task']['id']}/{data['sample']}/{data['round']}" for line in lines
    ] == expected


def test_counts_stand_under_the_other_filters(page):
    text = page("/?stop=answered&run=first").text
    assert "answered (2)" in text and "step_limit (1)" in text  # of the run, whatever the stop reason
    assert "first (2)" in text and "other.jsonl (1)" in text  # of the stop reason, whatever the run
    assert '<option value="gone" selected>gone (0)' in page("/?policy=gone").text


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("sort=sideways", "No order is called &#39;sideways&#39;"),
        ("process_from=much", "process from: expected a number such as 0.5, got &#39;much&#39;"),
        ("outcome_to=nan", "outcome to: expected a number"),
        ("q=%22%2B%22", "Free text finds words and numbers"),
        ("page=-1", "page: expected a whole number, got &#39;-1&#39;"),
    ],
)
def test_what_means_nothing_is_told(page, query, sentence):
    answer = page(f"/?{query}")
    assert answer.status_code == 400 and sentence in answer.text


def shown(key, at, **more):
    return f"/show?{urlencode({'at': at, 'key': key, **more})}"


def test_a_trajectory_as_a_conversation(page):
    text = page(shown("1/0/0", "first/judged", stop="answered")).text
    for part in ("Who directed Big Fish?", "gold: <b>Tim Burton</b>", "call of <b>search</b>", "Big Fish film", "a new query", "GOOD",
                 "&lt;search&gt;Big Fish film&lt;/search&gt;", "1 of 3", "Compare with 2 others"):  # fmt: skip
        assert part in text, part
    assert page(shown("9/0/0", "first/judged")).status_code == 404
    assert "not in this selection" in page(shown("2/0/0", "first/judged", stop="answered")).text


def test_next_and_previous_follow_the_selection(page):
    seen, address = [], shown("1/0/0", "first/judged", sort="-outcome", run="first")
    while address:
        text = page(address).text
        seen.append(re.search(r'<dt>file</dt><dd class="name">([^<]+)', text).group(1))
        onward = re.search(r'href="([^"]+)" data-key="j"', text)
        address = onward and onward.group(1).replace("&amp;", "&")
    assert seen == ["first/judged:1", "first/judged:2", "first/judged:4", "first/judged:3"]


def test_comparison_begins_with_another_run(page):
    text = page(shown("1/0/0", "first/judged").replace("show", "compare")).text
    assert re.findall(r'<section aria-label="([^"]+)', text) == ["first/judged", "other.jsonl"]
    token = "first/judged|1/1/0|2"
    text = page(shown("1/0/0", "first/judged", **{"with": token}).replace("show", "compare")).text
    assert re.findall(r'<dt>file</dt><dd class="name">([^<]+)', text) == ["first/judged:1", "first/judged:2"]
    assert "No other trajectory" in page(shown("2/0/0", "first/judged").replace("show", "compare")).text


def test_only_get_only_by_its_own_name_only_on_the_loopback(page):
    address = str(page("/").url)
    port = urlsplit(address).port
    assert page("/", headers={"Host": f"localhost:{port}"}).status_code == 200
    for host in (f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", "evil.example", ""):
        for path in ("/", "/export", "/static/view.js"):
            answer = page(path, headers={"Host": host})
            assert answer.status_code == 400 and "Big Fish" not in answer.text
    for method in ("POST", "PUT", "DELETE"):
        assert httpx.request(method, address).status_code == 405
    policy = page("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    with pytest.raises(ConnectionRefusedError):  # bound to one address, not to all
        socket.create_connection(("127.0.0.2", port), timeout=5)
    assert page("/static/../pages.py").status_code == 404 and page("/static/%2e%2e/pages.py").status_code == 404


def test_markup_is_text(tmp_path, made, viewer):
    evil = made(EVIL, question=EVIL, query=EVIL, result=EVIL, answer=EVIL, reason=EVIL, policy=EVIL, error=EVIL, env=EVIL,
                meta={EVIL: EVIL})  # fmt: skip
    worse = made(EVIL, 1, question=EVIL, malformed=EVIL)
    path = write(tmp_path / "<b>evil</b>.jsonl", [evil, worse])
    with path.open("a") as file:
        file.write(EVIL + "\n" + json.dumps({EVIL: EVIL, "schema": 1}) + "\n")
    with viewer(path) as process:
        text = httpx.get(process.address).text
        links = [link.replace("&amp;", "&") for link in re.findall(r'class="question"><a href="([^"]+)"', text)]
        pages = [text, *(httpx.get(process.address + link).text for link in links)]
        pages += [httpx.get(process.address + link.replace("show", "compare")).text for link in links]
        pages += [httpx.get(process.address, params={"q": EVIL, "run": EVIL, "task": EVIL}).text]
        pages += [httpx.get(process.address + "/show", params={"at": EVIL, "key": EVIL}).text]
        raw = httpx.get(process.address + "/line", params={"at": path.name, "line": 3})
    assert len(links) == 2
    for one in pages:
        assert "&lt;script&gt;" in one and "<b>evil" not in one
        assert re.findall(r"<script[^>]*>", one) == ['<script src="/static/view.js" defer>'] and "<img" not in one
        assert not re.search(r"<[^>]*\son\w+=", re.sub(r'"[^"]*"', '""', one))
    assert raw.text == EVIL and raw.headers["content-type"].startswith("text/plain")
    assert raw.headers["x-content-type-options"] == "nosniff"


def test_export_is_byte_for_byte(tmp_path, made, viewer):
    lines = [dumps(made(str(n), answer="\ud83d half")).encode() for n in range(3)]
    lines[1] = lines[1].replace(b'","', b'" , "', 1).replace(b'{"task"', b' {  "task"', 1)
    (tmp_path / "run.jsonl").write_bytes(b"\n".join([lines[0], b"", lines[1], b"not a trajectory", lines[2], b""]))
    with viewer(tmp_path / "run.jsonl") as process:
        answer = httpx.get(process.address + "/export")
        assert httpx.get(process.address + shown("1/0/0", "run.jsonl")).status_code == 200
    assert answer.content == b"".join(line + b"\n" for line in lines)
    assert "attachment" in answer.headers["content-disposition"]


def test_a_run_in_progress(tmp_path, made, viewer):
    run = tmp_path / "run"
    path = write(run / "trajectories.jsonl", [made("1"), made("2")])
    with viewer(run) as process, httpx.Client(base_url=process.address) as client:

        def now():
            return keys(client.get("/").text)

        line = dumps(made("3")).encode() + b"\n"
        with path.open("ab") as file:
            file.write(line[:100])
            file.flush()
            assert now() == ["1/0/0", "2/0/0"]  # torn
            file.write(line[100:])
        assert now() == ["1/0/0", "2/0/0", "3/0/0"]
        assert client.get("/export").content == path.read_bytes()

        part = write(run / "trajectories.jsonl.part", [made("2"), made("4", answer="anew")])
        part.replace(path)  # as `swirl generate` does after an error
        assert now() == ["2/0/0", "4/0/0"]
        assert keys(client.get("/?q=anew").text) == ["4/0/0"]
        text = client.get(shown("2/0/0", "run/trajectories", line=2)).text  # an old address: the line is another now
        assert "run/trajectories:1" in text

        write(run / "eval" / "base.unjudged.jsonl", [made("5")])
        assert now() == ["2/0/0", "4/0/0", "5/0/0"]
        write(run / "eval" / "base.jsonl", [made("5")])
        (run / "eval" / "base.failures.jsonl").write_text("{}\n")
        assert keys(client.get("/?stage=eval/base").text) == ["5/0/0"] and len(now()) == 3
        path.unlink()
        assert now() == ["5/0/0"]


def test_an_older_and_a_newer_schema(tmp_path, made, viewer):
    good = json.loads(dumps(made("1")))
    old = json.loads(dumps(made("old")))
    old["steps"][0]["score"] = old["steps"][0].pop("verdict")["score"]
    lines = [good, good | {"schema": 2}, old, {"task": "x"}, [1]]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{torn\n" + '{"half": ')
    with viewer(path) as process:
        text = httpx.get(process.address).text
        assert keys(text) == ["1/0/0", "old/0/0"]
        told = re.search(r'<details class="note".*?</details>', text, re.S).group()
        assert "4 lines are no trajectories" in told
        for part in ("mixed.jsonl:2</a> schema 2 is newer than 1: update swirl-env", "mixed.jsonl:4", "older schema", "mixed.jsonl:5",
                     "expected a JSON object, got list", "mixed.jsonl:6</a> not JSON"):  # fmt: skip
            assert part in told, part
        old_page = httpx.get(process.address + shown("old/0/0", "mixed.jsonl")).text
        assert "not of the present schema" in old_page and "mixed.jsonl:3: steps.0.score" in old_page
        assert "Tim Burton" in old_page
        newer = httpx.get(process.address + "/line", params={"at": "mixed.jsonl", "line": 2}).json()
        assert newer["schema"] == 2
    assert "4 lines cannot be shown, such as mixed.jsonl:2: schema 2" in process.said


def paths(data, path=()):
    """Every place in a JSON value."""
    yield path
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from paths(value, (*path, key))


def test_any_value_at_any_place_breaks_nothing(tmp_path, made, viewer):
    tokens = Tokens(np.array([1], "int32"), np.array([1], bool), np.array([-1], "float32"))
    whole = dumps(made(malformed="hm", tokens=tokens, meta={"hops": 2}))
    lines = []
    for path in paths(json.loads(whole)):
        for value in (None, 10**30, -1, 10**400, float("inf"), "\ud800", [], {}, [[[]]], True):
            data = {"": json.loads(whole)}
            place = data
            for key in ("", *path)[:-1]:
                place = place[key]
            place[("", *path)[-1]] = value
            lines.append(json.dumps(data[""]))
    (tmp_path / "all.jsonl").write_text("\n".join(lines) + "\n")
    index = Index([tmp_path / "all.jsonl"])
    assert index.count(Selection()) + index.bad()[0] == len(lines) and index.bad()[0] > 100
    assert b"".join(index.export(Selection())).count(b"\n") == index.count(Selection())
    with viewer(tmp_path / "all.jsonl") as process, httpx.Client(base_url=process.address) as client:
        assert client.get("/").status_code == 200
        for row in index.page(Selection(), 0, 10_000)[::7]:
            answer = client.get("/show", params=row.place)
            assert answer.status_code == 200, (answer.text, row)


@pytest.mark.slow
def test_ten_megabytes(tmp_path, made, viewer):
    long = made("long", result="word " * 2_000_000)
    many = made("many", scores=(1.0,) * 5_000, result="w" * 2_000)
    path = write(tmp_path / "large.jsonl", [made("1"), long, many])
    assert path.stat().st_size > 20_000_000
    with viewer(path) as process, httpx.Client(base_url=process.address, timeout=20) as client:
        assert keys(client.get("/").text) == ["1/0/0", "long/0/0", "many/0/0"]
        text = client.get(shown("long/0/0", "large.jsonl")).text
        assert len(text) < 200_000 and "9,980,000 more characters" in text
        text = client.get(shown("many/0/0", "large.jsonl")).text
        assert len(text) < 500_000 and "The next steps, from 51 of 5001" in text
        text = client.get(shown("many/0/0", "large.jsonl", step=4_951)).text
        assert "Step 5000" in text and "The next steps, from 5001" in text
        assert len(client.get("/line", params={"at": "large.jsonl", "line": 2}).content) > 10_000_000


def test_nothing_to_show_is_a_sentence(tmp_path, runs, swirl):
    empty = tmp_path / "empty"
    empty.mkdir()
    said = swirl("view", empty, code=2)
    assert f"There is no trajectory yet in {empty}" in said and "trajectories.jsonl" in said
    assert f"There is no {tmp_path / 'nowhere'}." in swirl("view", runs / "first", tmp_path / "nowhere", code=2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = swirl("view", runs / "first", "--port", port, code=2)
    assert f"Port {port} of 127.0.0.1 is in use. Give another --port" in said
    swirl("view", runs / "first", "--port", 70000, code=2)


def test_what_can_be_shown_is_shown_beside_an_empty_run(tmp_path, runs, viewer):
    (tmp_path / "empty").mkdir()
    with viewer(tmp_path / "empty", runs / "first") as process:
        text = httpx.get(process.address).text
        assert "empty holds no trajectories" in text and len(keys(text)) == 4
    assert "empty holds no trajectories" in process.said


def test_ctrl_c_ends_it_cleanly(runs, viewer):
    with viewer(runs / "first") as process, httpx.Client(base_url=process.address) as client:
        client.get("/")  # a kept connection does not hold it up
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    assert process.said == ""


def resident(process):
    """Megabytes of memory that a process holds."""
    with open(f"/proc/{process.pid}/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1)) / 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
@pytest.mark.slow
def test_ten_thousand_trajectories_take_little_memory(tmp_path, made, viewer):
    base = dumps(made("TASK", scores=(1.0, 0.0, 0.5), result="a paragraph of some words " * 40))
    with (tmp_path / "many.jsonl").open("w") as file:
        for n in range(10_000):
            file.write(base.replace('"TASK"', f'"{n // 4}"').replace('"sample":0', f'"sample":{n % 4}') + "\n")
    write(tmp_path / "few.jsonl", [made()])
    assert (tmp_path / "many.jsonl").stat().st_size > 30_000_000
    with viewer(tmp_path / "few.jsonl") as process:
        httpx.get(process.address)
        few = resident(process)
    with viewer(tmp_path / "many.jsonl") as process, httpx.Client(base_url=process.address) as client:
        client.get("/")
        many = resident(process)
        start = time.monotonic()
        text = client.get("/?page=7").text
        assert time.monotonic() - start < 1.0
        assert keys(text)[0] == "150/0/0" and "page 7 of 100" in text
        for page in range(1, 101, 4):
            assert len(keys(client.get(f"/?page={page}").text)) == 100
            assert client.get(shown(f"{page}/1/0", "many.jsonl")).status_code == 200
        assert len(client.get("/export?q=paragraph").content) == (tmp_path / "many.jsonl").stat().st_size
        grown = resident(process)
    assert many - few < 40  # the index and SQLite's cache, not 30 MB of text
    assert grown - many < 60


values = st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, made):
    """An index and, beside it, the trajectories."""
    draw = np.random.default_rng(0)
    trajectories = []
    for n in range(200):
        scores = [None if draw.random() < 0.1 else float(draw.integers(3)) / 2 for _ in range(draw.integers(4))]
        trajectories.append(
            made(
                str(n % 40), n // 40, scores=scores, outcome=[None, 0.0, 0.5, 1.0][draw.integers(4)],
                stop=["answered", "step_limit"][draw.integers(2)], policy=["a", "b"][draw.integers(2)],
                error=[None, "crash"][draw.integers(2)], malformed=[None, "hm"][draw.integers(2)],
                answer=["red", "green tea"][draw.integers(2)],
            )
        )  # fmt: skip
    path = write(tmp_path_factory.mktemp("mixed") / "all.jsonl", trajectories)
    return Index([path]), trajectories


@given(
    stop=st.sampled_from(["", "answered", "step_limit"]), policy=st.sampled_from(["", "a", "b"]), low=values, high=values,
    best=values, errors=st.booleans(), malformed=st.booleans(), unknown=st.booleans(), q=st.sampled_from(["", "tea", "GRE", "red"]),
    sort=st.sampled_from(sorted(SORTS)),
)  # fmt: skip
def test_any_selection_is_what_plain_python_selects(
    mixed, stop, policy, low, high, best, errors, malformed, unknown, q, sort
):
    index, trajectories = mixed
    selection = Selection(
        stop=stop, policy=policy, process_from=low, process_to=high, outcome_to=best, errors=errors, malformed=malformed,
        unknown=unknown, q=q, sort=sort,
    )  # fmt: skip
    assert Selection.of(selection.parameters()) == selection

    def fits(one):
        verdicts = [step.verdict for step in one.steps if step.verdict]
        known = [verdict.score for verdict in verdicts if verdict.score is not None]
        process = sum(known) / len(known) if known else None
        return (
            stop in ("", one.stop)
            and policy in ("", one.policy)
            and (low is None or (process is not None and process >= low))
            and (high is None or (process is not None and process <= high))
            and (best is None or (one.outcome is not None and one.outcome <= best))
            and (not errors or any(result.error for step in one.steps for result in step.results))
            and (not malformed or any(step.action.malformed for step in one.steps))
            and (not unknown or len(known) < len(verdicts))
            and (not q or any(word.startswith(q.lower()) for word in re.findall(r"\w+", dumps(one).lower())))
        )

    expected = [one for one in trajectories if fits(one)]
    rows = index.page(selection, 0, 1000)
    assert sorted(row.key for row in rows) == sorted(one.id for one in expected)
    assert index.count(selection) == len(expected)
    if sort == "file":
        assert [row.key for row in rows] == [one.id for one in expected]
    assert b"".join(index.export(selection)) == b"".join(index.read(row) + b"\n" for row in rows)
    for place, row in enumerate(rows[:3]):
        position, before, after = index.around(selection, row)
        assert position == place and (before or row) == rows[max(0, place - 1)]
        assert (after or row) == rows[min(place + 1, len(rows) - 1)]


def test_names_tell_runs_apart(tmp_path, made):
    for name in ("a/run", "b/run", "c"):
        write(tmp_path / name / "kept.jsonl", [made()])
    index = Index([tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"])
    assert list(index.runs) == ["a/run", "b/run", "c"]
    assert index.facet(Selection(), "stage") == [("kept", 3)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no trajectory yet"):
        Index([tmp_path / "empty"])
    assert files_of(tmp_path / "c") == [tmp_path / "c" / "kept.jsonl"]


def test_files_of_a_suite_and_of_a_ledger_are_there_and_a_run_in_a_run_is_not(tmp_path, made):
    seen = ["eval/base.jsonl", "eval/hotpotqa-v0/base.jsonl", "gsm8k/oracle.jsonl", "gsm8k/random.unjudged.jsonl"]
    for name in (
        *seen,
        "gsm8k/oracle.unjudged.jsonl",
        "gsm8k/oracle.failures.jsonl",
        "questions/gsm8k.jsonl",
        "inner/judged.jsonl",
    ):
        write(tmp_path / "bench" / name, [made()])
    (tmp_path / "bench" / "inner" / "run.json").write_text("{}")
    assert [str(path.relative_to(tmp_path / "bench")) for path in files_of(tmp_path / "bench")] == seen


def test_a_tokenizer_that_cannot_be_read_spells_nothing(tmp_path):
    (tmp_path / "swirl").mkdir()
    (tmp_path / "swirl" / "tokenizer.json").write_text('{"half')
    assert Speller().of(tmp_path) is None


def test_log_probs_are_shades(made):
    tokens = Tokens(
        np.array([9, 1, 2, 3], "int32"), np.array([0, 1, 1, 1], bool), np.array([0, -0.01, -0.6, -9], "float32")
    )
    step = Step(Action("Kölñ"), tokens=tokens)
    found = cells(step, None)
    assert [(cell.text, cell.level) for cell in found.shown] == [(None, 0), (None, 3), (None, 8)]
    assert (found.count, round(found.mean, 3), found.lowest) == (3, -3.203, -9.0)
    pieces = {1: b"K\xc3", 2: b"\xb6l", 3: "ñ<|im_end|>".encode()}

    def spell(ids):
        return b"".join(pieces[i] for i in ids).decode(errors="replace")

    assert [cell.text for cell in cells(step, spell).shown] == ["K", "öl", "ñ<|im_end|>"]
    other = replace(step, action=Action("Bonn"))
    assert [cell.text for cell in cells(other, spell).shown] == [None] * 3  # another model's tokenizer
    assert cells(Step(Action("x")), spell) is None


def test_a_models_own_tokenizer_spells_its_tokens(tmp_path, made, viewer):
    from swirl_agents.testing import tiny_tokenizer

    tokenizer = tiny_tokenizer("<search>x</search>")
    ids = tokenizer("<search>x</search>y").input_ids
    assert len(ids) == 2
    tokens = Tokens(np.array(ids, "int32"), np.ones(2, bool), np.array([-0.3, -4.0], "float32"))
    one = made(query="x", tokens=tokens)
    one = replace(
        one,
        steps=(replace(one.steps[0], action=replace(one.steps[0].action, text="<search>x</search>y")), *one.steps[1:]),
    )
    write(tmp_path / "run" / "kept.jsonl", [one])
    tokenizer.save_pretrained(tmp_path / "run" / "swirl")
    with viewer(tmp_path / "run") as process:
        text = httpx.get(process.address + shown("1/0/0", "run/kept")).text
    assert (
        '<span class="p2" title="-0.300">&lt;search&gt;x&lt;/search&gt;</span><span class="p6" title="-4.000">y</span>'
        in text
    )
    assert "2 sampled tokens, log-prob mean -2.15, lowest -4.00 nats" in text


def test_colours_can_be_read():
    """WCAG's contrast of 4.5 for each text on its ground, in light and dark."""
    css = (Path(pages.__file__).parent / "static" / "view.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", css, re.S)
    deepest = max(float(alpha) for alpha in re.findall(r"var\(--shade\), ([\d.]+)", css))
    for block in (light, dark):
        colours = {
            name: [int(code[i : i + 2], 16) for i in (0, 2, 4)]
            for name, code in re.findall(r"--([\w-]+): #(\w{6})", block)
        }
        shade = [int(one) for one in re.search(r"--shade: ([\d, ]+)", block).group(1).split(",")]
        colours["shaded"] = [deepest * a + (1 - deepest) * b for a, b in zip(shade, colours["card"], strict=True)]
        pairs = [
            (text, ground) for text in ("ink", "soft", "link", "good", "bad", "flag") for ground in ("page", "card")
        ]
        pairs += [
            ("good", "good-back"),
            ("bad", "bad-back"),
            ("flag", "flag-back"),
            ("ink", "mark"),
            ("ink", "shaded"),
            ("soft", "mark"),
        ]
        for text, ground in pairs:
            high, low = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def luminance(colour):
    red, green, blue = ((c / 255 / 12.92) if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
