"""The report in a real browser: it opens, says nothing on the console, asks for nothing, runs nothing, fits a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium import BROWSER, Chromium
from hostile_run import decode, write_run

from opdkit.reporting import write_comparison, write_report

NONE = "no Chromium on this machine (Debian: apt-get install chromium)"
pytestmark = [pytest.mark.browser, pytest.mark.skipif(BROWSER is None, reason=NONE)]

DESK, PHONE = (1280, 900), (390, 800)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture
def opened(browser: Chromium, run_folder: Path) -> Path:
    browser.said.clear()
    return write_report(run_folder, decode)


@pytest.mark.parametrize("size", [DESK, PHONE])
def test_opens_in_silence(browser: Chromium, opened: Path, size: tuple[int, int]) -> None:
    """No console message, no error, no dialog, no request beside the file; no script; nothing wider than the window.

    Every string of the run tries to run a script or to load a picture: a browser that obeyed one would say so here.
    """
    browser.open(opened, *size)
    assert browser.run("document.readyState") == "complete" and browser.run("document.title").endswith("opdkit")
    assert browser.run("document.querySelectorAll('img,iframe,object,link,a:not([href^=\"#\"])').length") == 0
    assert browser.run("document.documentElement.scrollWidth") <= size[0]
    browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.run("document.documentElement.scrollWidth") <= size[0]
    assert browser.said == []


@pytest.mark.parametrize("size", [DESK, PHONE])
def test_a_comparison_opens_in_silence(
    browser: Chromium, run_folder: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    write_run(tmp_path / "other")
    browser.said.clear()
    browser.open(write_comparison([run_folder, tmp_path / "other"], tmp_path / "page.html"), *size)
    browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.run("document.documentElement.scrollWidth") <= size[0]
    assert browser.run("document.querySelectorAll('img').length") == 0 and browser.said == []


def test_the_browser_would_have_said_so(browser: Chromium, tmp_path: Path) -> None:
    """The test above can fail: a page that runs a script and asks for a picture is heard."""
    (tmp_path / "bad.html").write_text("<script>console.log('ran')</script><img src='http://127.0.0.1:9/x.png'>")
    browser.said.clear()
    browser.open(tmp_path / "bad.html", *DESK)
    assert any("ran" in words for words in browser.said) and any("127.0.0.1" in words for words in browser.said)
    browser.said.clear()


def note(browser: Chromium) -> str:
    """What is shown at the foot of the window for the token that is pointed at; "none" if nothing is."""
    shown = "document.querySelector('.heat i:hover') || document.querySelector('.heat i:focus')"
    style = f"getComputedStyle({shown} || document.body, '::after')"
    return str(browser.run(f"{style}.content"))


def middle(browser: Chromium, selector: str) -> tuple[float, float]:
    browser.run(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
    box = f"document.querySelector({selector!r}).getBoundingClientRect()"
    return browser.run(f"{box}.x + {box}.width / 2"), browser.run(f"{box}.y + {box}.height / 2")


def test_a_note_on_hover_and_on_tap(browser: Chromium, opened: Path) -> None:
    """The mouse on a token, a finger on another: student and teacher probability at the foot of the window."""
    browser.open(opened, *DESK)
    browser.hover(5, 5)
    assert note(browser) == "none"
    browser.hover(*middle(browser, ".heat i.x"))
    assert "student 50.0 % · teacher 75.0 %" in note(browser) and "clipped" in note(browser)
    browser.open(opened, *PHONE)
    browser.tap(*middle(browser, ".heat i.d5"))
    assert "student 50.0 % · teacher 25.0 %" in note(browser)
    where = "getComputedStyle(document.querySelector('.heat i:focus'), '::after')"
    assert browser.run(f"{where}.position") == "fixed" and browser.run(f"{where}.bottom") == "0px"
    assert browser.said == []


def test_it_looks_right(browser: Chromium, opened: Path, tmp_path: Path) -> None:
    """Pixels, not markup: dark text on a light page, both colours of the heat-map and of the headline are there, and a
    reader who prefers dark gets a dark page. Does not prove that it is beautiful: somebody has to look."""
    from PIL import Image

    browser.open(opened, *DESK)
    browser.run("document.querySelector('.heat').scrollIntoView({block: 'center'})")
    light = np.asarray(Image.open(browser.screenshot(tmp_path / "light.png")).convert("RGB")).astype(int)
    assert light.shape == (900, 1280, 3) and np.median(light) > 240
    red, green = light[..., 0], light[..., 1]
    assert (light.sum(-1) < 200).sum() > 500, "no text"
    assert (green - red > 60).sum() > 200 and (red - green > 60).sum() > 200, "no colours"
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    dark = np.asarray(Image.open(browser.screenshot(tmp_path / "dark.png")).convert("RGB"))
    browser.call("Emulation.setEmulatedMedia", features=[])
    assert np.median(dark) < 40


def test_curves_are_drawn(browser: Chromium, opened: Path) -> None:
    """Every panel has a drawing with a height, and its line is as wide as the panel: nothing collapsed to a point."""
    browser.open(opened, *DESK)
    widths = browser.run(
        "[...document.querySelectorAll('.curve polyline.mean')].map(e => e.getBoundingClientRect().width)"
    )
    panels = browser.run("[...document.querySelectorAll('.curve')].map(e => e.getBoundingClientRect().width)")
    assert len(panels) > 5 and max(widths) > 0.7 * min(panels) > 100
