"""`swirl view` in Debian's chromium: `make test-browser`.

With SWIRL_PICTURES=docs/pictures the pictures of the documentation are taken anew.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from swirl_env.io import Writer, dumps

pytestmark = pytest.mark.browser
CHROMIUM = "/usr/bin/chromium"
PAINT = """new Promise((done) => new PerformanceObserver((list) => {
  for (const entry of list.getEntriesByName("first-contentful-paint")) done(entry.startTime);
}).observe({ type: "paint", buffered: true }))"""
EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def chromium():
    if not Path(CHROMIUM).exists():
        pytest.fail(f"{CHROMIUM} is missing: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A page that must leave no word in the console."""
    context = chromium.new_context(viewport={"width": 1400, "height": 900}, accept_downloads=True)
    page = context.new_page()
    said = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: said.append(request.url) if "127.0.0.1" not in request.url else None)
    yield page
    context.close()
    assert said == []


@pytest.fixture(scope="module")
def address(tmp_path_factory, made, viewer):
    """A viewer of two runs of three questions; the second has markup wherever text can be."""
    folder = tmp_path_factory.mktemp("runs")
    with Writer(folder / "first" / "judged.jsonl") as out:
        out.write(made("1", scores=(1.0, 0.0)))
        out.write(made("2", question="How many moons has Mars?", answer="two", error="tool_error", outcome=0.0))
        out.write(made("3", question="Who wrote it?", malformed="He did.", stop="malformed_limit", outcome=0.0))
    with Writer(folder / "second" / "judged.jsonl") as out:
        out.write(made("1", policy="tiny", answer="Ridley Scott", outcome=0.0))
        out.write(
            made("x", question=EVIL, query=EVIL, result=EVIL, answer=EVIL, reason=EVIL, policy=EVIL, meta={"m": EVIL})
        )
    with viewer(folder / "first", folder / "second") as process:
        yield process.address


def questions(page):
    return page.locator(".rows .question a").all_inner_texts()


def test_filter(page, address):
    page.goto(address)
    assert len(questions(page)) == 5
    page.get_by_label("stop reason").select_option("malformed_limit")  # applies by itself
    page.wait_for_url("**stop=malformed_limit**")
    assert questions(page) == ["Who wrote it?"] and page.url == f"{address}/?stop=malformed_limit"  # a short address
    page.get_by_role("link", name="Clear").first.click()
    page.get_by_label("a tool error").check()
    page.wait_for_url("**errors=1**")
    assert questions(page) == ["How many moons has Mars?"]
    page.goto(address)
    page.get_by_role("searchbox").fill("directed fish")
    page.keyboard.press("Enter")
    page.wait_for_url("**q=directed**")
    assert questions(page) == ["Who directed Big Fish?"] * 2
    page.get_by_label("outcome from").fill("0.5")
    page.keyboard.press("Enter")
    page.wait_for_url("**outcome_from**")
    assert len(questions(page)) == 1 and "1 of 5 trajectories" in page.locator(".count").inner_text()
    page.go_back()
    assert len(questions(page)) == 2 and page.get_by_role("searchbox").input_value() == "directed fish"


def test_open_and_deep_link(page, chromium, address):
    page.goto(f"{address}/?run=first")
    page.get_by_role("link", name="Who directed Big Fish?").click()
    page.get_by_role("heading", name="Step 3").wait_for()
    assert (
        page.locator(".verdict").count() == 2 and "GOOD 1.0 by rules@2" in page.locator(".verdict").first.inner_text()
    )
    text, link = page.inner_text("main"), page.url
    elsewhere = chromium.new_context()
    other = elsewhere.new_page()
    other.goto(link + "#step-2")
    assert other.inner_text("main") == text and "1 of 3" in other.inner_text("header")
    elsewhere.close()
    page.get_by_text("exactly as sampled").first.click()
    assert page.get_by_text("<search>Big Fish film</search>").first.is_visible()


def test_compare(page, address):
    page.goto(f"{address}/?run=first&task=1")
    page.locator(".rows .question a").click()
    page.get_by_role("link", name="Compare with 1 other").click()
    sides = page.locator(".sides section")
    assert sides.count() == 2
    left, right = (sides.nth(i).bounding_box() for i in (0, 1))
    assert left["y"] == right["y"] and right["x"] > left["x"] + left["width"] - 1
    assert "Tim Burton" in sides.nth(0).inner_text() and "Ridley Scott" in sides.nth(1).inner_text()
    page.set_viewport_size({"width": 390, "height": 800})
    left, right = (sides.nth(i).bounding_box() for i in (0, 1))
    assert right["y"] >= left["y"] + left["height"]


def test_keys(page, address):
    press = page.keyboard.press

    def arrived(address, heading):
        """The page is there, its script too."""
        page.wait_for_url(address, wait_until="load")
        assert page.locator("h1").inner_text() == heading

    page.goto(address)
    press("j"), press("j")
    assert page.locator(":focus").inner_text() == "How many moons has Mars?"
    press("k"), press("Enter")
    arrived("**/show**key=1*", "Who directed Big Fish?")
    press("j")
    arrived("**/show**key=2*", "How many moons has Mars?")
    press("k")
    arrived("**/show**key=1*", "Who directed Big Fish?")
    press("c")
    arrived("**/compare**key=1*", "Who directed Big Fish?")
    assert page.locator(".sides section").count() == 2
    press("Escape")
    arrived("**/show**key=1*", "Who directed Big Fish?")
    press("Escape")
    arrived("**/?page=1", "Trajectories")
    press("/")
    assert page.locator(":focus").get_attribute("name") == "q"
    page.keyboard.type("moons?")  # keys are letters in a field
    assert page.get_by_role("searchbox").input_value() == "moons?"
    press("Escape")
    assert page.locator(":focus").count() == 0
    press("?")
    assert page.get_by_role("dialog").is_visible()
    press("Escape")
    assert not page.get_by_role("dialog").is_visible()
    page.goto(f"{address}/?q=moons")
    with page.expect_download() as download:
        page.keyboard.press("e")
    assert download.value.suggested_filename == "selection.jsonl"
    page.locator(".rows .question a").click()
    arrived("**/show**key=2*", "How many moons has Mars?")
    press("/")
    page.wait_for_url("**q=moons#q", wait_until="load")
    assert page.locator(":focus").get_attribute("name") == "q"


def test_export(page, address, tmp_path):
    page.goto(f"{address}/?run=first&malformed=1")
    with page.expect_download() as download:
        page.get_by_role("link", name="Export 1 as JSONL").click()
    download.value.save_as(tmp_path / "selection.jsonl")
    (line,) = (tmp_path / "selection.jsonl").read_text().splitlines()
    assert json.loads(line)["task"]["id"] == "3"


def test_markup_stays_text(page, address):
    page.goto(f"{address}/?task=x")
    assert questions(page) == [EVIL]
    page.locator(".rows .question a").click()
    page.get_by_role("heading", name="Step 1").wait_for()
    for summary in page.locator("summary").all():
        summary.click()
    text = page.inner_text("main")
    assert text.count(EVIL) >= 8 and page.locator("main img, main script").count() == 0
    assert "owned" not in page.title().partition("<")[0] and page.evaluate("document.title") != "owned"
    page.goto(f"{address}/?q={EVIL}&run={EVIL}")
    assert page.locator("main img, main script").count() == 0 and page.title() != "owned"


def memory(process):
    """Megabytes of memory that a process holds."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024


def test_ten_thousand_trajectories(page, tmp_path, made, viewer):
    """First paint within a second; a full walk over the pages adds at most 60 MB to the server and to the page's heap."""
    base = dumps(made("TASK", scores=(1.0, 0.0, 0.5), result="a paragraph of some words " * 40))
    with (tmp_path / "many.jsonl").open("w") as file:
        for n in range(10_000):
            file.write(base.replace('"TASK"', f'"{n}"') + "\n")
    with viewer(tmp_path / "many.jsonl") as process:
        page.goto(process.address)
        paint = page.evaluate(PAINT) / 1000
        assert "10,000 of 10,000" in page.locator(".count").inner_text()
        devtools = page.context.new_cdp_session(page)
        devtools.send("Performance.enable")

        def heap():
            devtools.send("HeapProfiler.collectGarbage")
            metrics = devtools.send("Performance.getMetrics")["metrics"]
            return next(one["value"] for one in metrics if one["name"] == "JSHeapUsedSize") / 1e6

        server_before, heap_before = memory(process), heap()
        for number in range(2, 101):
            page.get_by_role("link", name="Next page").click()
            page.wait_for_url(f"**page={number}")
        assert page.locator(".rows .question a").count() == 100
        server, used = memory(process) - server_before, heap() - heap_before
    print(
        f"first paint {paint:.3f} s; over 100 pages the server grew by {server:.1f} MB, the page's heap by {used:.1f} MB"
    )
    assert paint < 1.0 and server < 60 and used < 60


@pytest.fixture(scope="module")
def real(tmp_path_factory, viewer):
    """A viewer of two real runs: the gold path and a random policy on the same questions, judged by the rules."""
    folder = tmp_path_factory.mktemp("real")
    for model in ("oracle", "random"):
        for command in (
            [
                "generate",
                "swirl/HotPotQA-v0",
                "--model",
                model,
                "--tasks",
                "40",
                "--samples",
                "1",
                "--out",
                folder / model,
            ],
            ["judge", folder / model, "--judge", "rules"],
        ):
            subprocess.run(
                [sys.executable, "-m", "swirl_benchmarks.cli", *map(str, command)], check=True, capture_output=True
            )
    with viewer(folder / "oracle", folder / "random") as process:
        yield process.address


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_pictures(chromium, real, tmp_path, width, theme):
    """Nothing is wider than the window, and the theme is the reader's; the pictures are for people to look at."""
    folder = Path(os.environ.get("SWIRL_PICTURES", tmp_path))
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
    page = context.new_page()
    page.goto(f"{real}/?stage=judged-rules@2&sort=task")
    addresses = {"list": page.url}
    page.locator(".rows .question a").first.click()
    page.wait_for_url("**/show**")
    addresses["show"] = page.url
    addresses["compare"] = page.url.replace("/show", "/compare")
    for name, address in addresses.items():
        page.goto(address)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", ground))) < 128) == (theme == "dark")
        picture = folder / f"view-{name}-{width}-{theme}.png"
        page.screenshot(path=picture)
        Image.open(picture).quantize().save(picture, optimize=True)  # small enough for the repository
    context.close()
