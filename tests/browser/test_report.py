"""The report in a real browser: no request, no error, no sideways scrolling, light and dark."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.browser
SWIRL = [sys.executable, "-m", "swirl_benchmarks.cli"]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    smoke = ["bench", "smoke", "--limit", "3", "--model", "oracle", "--model", "random"]
    for command in (smoke, ["report", "runs/bench-smoke"]):
        subprocess.run([*SWIRL, *command], cwd=folder, check=True, capture_output=True)
    return folder / "report.html"


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize(("scheme", "back"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(21, 25, 30)")])
def test_report(page_file, scheme, back, width):
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file.as_uri())
        assert asked == [page_file.as_uri()]
        assert said == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == back
        assert page.locator("figure svg").count() == 3
        browser.close()
