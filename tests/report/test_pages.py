"""Every report in headless Chromium: no message, no request, no sideways scroll on a phone.

``make test-reports`` installs the browser that ``tests/report/browser.txt`` pins.
"""

import importlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.report.conftest import Reports
from tests.report.test_headlines import HEADLINES

BROWSER = Path(__file__).resolve().parents[2] / "build" / "browser"
PHONE, DESKTOP = 390, 1200


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if not (BROWSER / ".installed").is_file():
        pytest.skip("headless Chromium is not installed: make test-reports")
    sys.path.insert(0, str(BROWSER / "python"))
    try:
        api = importlib.import_module("playwright.sync_api")
    finally:
        sys.path.remove(str(BROWSER / "python"))
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(BROWSER / "chromium" / "lib"),
        "FONTCONFIG_FILE": str(BROWSER / "chromium" / "fonts.conf"),
    }
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER / "chromium" / "headless-shell",
            args=["--no-sandbox", "--disable-gpu"],
            env=environment,
        )
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", [*HEADLINES, "plan-on-counts"])
def test_a_report_in_a_browser(
    name: str, width: int, scheme: str, chromium: Any, reports: Reports
) -> None:
    reports.json(name)
    page = chromium.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    told: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    url = reports.page(name).as_uri()
    page.goto(url)
    for fold in page.query_selector_all("summary"):
        fold.click()
    assert told == []
    assert [one for one in asked if not one.startswith("data:")] == [url]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back)[:3])) < 384) == (scheme == "dark")
    # The first pixel of each image as the browser decodes it: a colour of the palette.
    seen = page.evaluate(
        """() => Promise.all([...document.querySelectorAll('svg.figure image')].map(
            async image => {
                const one = new Image();
                one.src = image.getAttribute('href');
                await one.decode();
                const canvas = new OffscreenCanvas(one.width, one.height);
                const context = canvas.getContext('2d');
                context.drawImage(one, 0, 0);
                return [...context.getImageData(0, 0, 1, 1).data];
            }))"""
    )
    assert {alpha for *_, alpha in seen} <= {0, 51, 102, 153, 204, 255}
    # Text that is drawn over the edge of its figure would be cut off.
    cut = page.evaluate(
        """() => [...document.querySelectorAll('svg.figure')].flatMap(figure => {
            const box = figure.getBoundingClientRect();
            return [...figure.querySelectorAll('text')].filter(text => {
                const one = text.getBoundingClientRect();
                return one.left < box.left - 2 || one.right > box.right + 2
                    || one.bottom > box.bottom + 2;
            }).map(text => text.textContent);
        })"""
    )
    assert cut == []
    page.close()
