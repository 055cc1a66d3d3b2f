"""The report in a real browser: it opens, says nothing on the console, asks for nothing, runs nothing, fits a phone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chromium import BROWSER, Chromium
from hostile_run import decode, make_rows, write_run

from opdkit.reporting import write_comparison, write_report
from opdkit.reporting.serve.server import open_server
from opdkit.run.rows import save_rows
from opdkit.types import Signal

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


def said(browser: Chromium) -> str:
    return str(browser.run("document.querySelector('.said')?.textContent ?? ''"))


def focused(browser: Chromium, what: str) -> str:
    return str(browser.run(f"document.activeElement.{what} ?? ''"))


def test_a_curve_says_its_values(browser: Chromium, opened: Path) -> None:
    """By the mouse, by a finger, and by the arrow keys; each is also what a screen reader is told."""
    browser.open(opened, *DESK)
    x, y = middle(browser, ".curve svg:nth-child(2)")
    browser.hover(x, y)
    assert said(browser).startswith("step 10: 0.4 [0.38, 0.42]"), "the held-out curve's middle"
    browser.hover(5, 5)
    assert said(browser) == ""
    browser.run("document.querySelectorAll('.curve')[1].focus()")
    assert said(browser) == "step 30: 0.06667"
    for key, step in {"ArrowLeft": 29, "Home": 1, "ArrowRight": 2, "PageUp": 12, "PageDown": 2, "End": 30}.items():
        browser.press(key)
        assert said(browser).startswith(f"step {step}: ") and focused(browser, "ariaValueText") == said(browser)
    browser.press("Escape")
    assert said(browser) == ""
    browser.open(opened, *PHONE)
    browser.tap(*middle(browser, ".curve svg:nth-child(2)"))
    assert said(browser).startswith("step 10: 0.4") and browser.said == []


def test_tokens_are_reached_by_tab_and_arrow_keys(browser: Chromium, opened: Path) -> None:
    """One stop of Tab for the tokens of an answer, whatever their number; the arrows move among them, Page Down to the
    next deep colour; the note is shown."""
    browser.open(opened, *DESK)
    browser.run("document.querySelector('.group[open] .heat').previousElementSibling.setAttribute('tabindex', 0)")
    browser.run("document.querySelector('.group[open] .heat').previousElementSibling.focus()")
    presses = 0
    while focused(browser, "tagName") != "I":
        browser.press("Tab")
        presses += 1
        assert presses < 4
    assert "token 1 of" in note(browser)
    browser.press("ArrowRight", 2)
    assert "token 3 of" in note(browser) and "token 3 of" in focused(browser, "ariaLabel")
    browser.press("PageDown")
    assert browser.run("/[udn][456]/.test(document.activeElement.className)")
    browser.press("Home")
    assert "token 1 of" in note(browser)
    browser.press("Tab")
    assert focused(browser, "tagName") != "I" or browser.run("document.activeElement.closest('article').id") == "g0a1"


def search(browser: Chromium, words: str, only: str = "") -> str:
    """What the page says it found."""
    browser.run(
        "(() => { const bar = document.querySelector('.controls'); bar.querySelector('input').value = "
        f"{words!r}; bar.querySelector('select').value = {only!r}; bar.querySelector('output').textContent = ''; "
        "bar.querySelector('input').dispatchEvent(new Event('input', {bubbles: true})) })()"
    )
    browser.wait("document.querySelector('.controls output').textContent")
    return str(browser.run("document.querySelector('.controls output').textContent"))


def test_answers_are_found(browser: Chromium, opened: Path) -> None:
    """By a word of the question (all its answers), of the answer (that one), and by outcome; nothing is lost."""
    browser.open(opened, *DESK)
    assert search(browser, "") == "6 of 6 answers"
    assert search(browser, "QUESTION 1") == "2 of 6 answers"
    assert search(browser, "nswer 4") == "1 of 6 answers"
    assert browser.run("document.querySelectorAll('.group:not([hidden])').length") == 1
    assert search(browser, "", "wrong") == "3 of 6 answers" and search(browser, "no such word") == "0 of 6 answers"
    assert search(browser, "") == "6 of 6 answers" and browser.said == []


@pytest.fixture
def long_answer(run_folder: Path) -> Path:
    """The first answer has 4,000 tokens."""
    row, *rows = make_rows()
    text = ("Twelve of x. " * 400)[:4000]
    ones = np.ones((1, 4000), dtype=np.float32)
    assert row.taught
    growing = ones * np.arange(1, 4001, dtype=np.float32)
    taught = replace(row.taught, coef_ST=ones, loss_ST=growing, student_entropy_T=ones[0], student_logprob_T=-ones[0],
                     clipped_T=np.zeros(4000, bool))  # fmt: skip
    rollout = replace(row.rollout, answer_ids=tuple(map(ord, text)), answer_mask=np.ones(4000, bool))
    row = replace(row, rollout=rollout, taught=taught, signals={"teacher": Signal(sampled_logprob_T=-ones[0] / 2)})
    save_rows(run_folder / "rows" / "step_000030.parquet", [row, *rows])
    return write_report(run_folder, decode)


@pytest.mark.parametrize("size", [DESK, PHONE])
def test_a_long_answer_stays_usable(browser: Chromium, long_answer: Path, size: tuple[int, int]) -> None:
    """Its sentences are one stop of Tab and a bar each; a bar opens its sentence and brings it into view; the arrows go
    from sentence to sentence and into one."""
    browser.said.clear()
    browser.open(long_answer, *size)
    browser.run("document.querySelector('.minimap').closest('.group').open = true")
    assert browser.run("document.querySelectorAll('.heat summary').length") > 250
    assert browser.run("document.querySelectorAll(\".heat summary[tabindex='0']\").length") == 1
    browser.run("document.querySelectorAll('.minimap a')[150].dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    browser.wait("document.querySelectorAll('.heat details')[150].open")
    box = "document.querySelectorAll('.heat details')[150].getBoundingClientRect()"
    browser.wait(f"{box}.top >= 0 && {box}.bottom <= innerHeight")
    browser.run("document.querySelectorAll('.heat summary')[150].focus()")
    browser.press("ArrowDown", 2)
    assert browser.run("[...document.querySelectorAll('.heat summary')].indexOf(document.activeElement)") == 152
    browser.press("ArrowRight")
    assert focused(browser, "tagName") == "I" and browser.run("document.activeElement.closest('details').open")
    browser.press("Escape")
    assert focused(browser, "tagName") == "SUMMARY"
    assert browser.run("document.documentElement.scrollWidth") <= size[0] and browser.said == []


def test_on_paper(browser: Chromium, opened: Path) -> None:
    """The contents and the controls are not printed, boxes that scroll are whole, and paper is light in the dark."""
    browser.open(opened, *DESK)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.call("Emulation.setEmulatedMedia", media="print", features=dark)
    hidden = "[...document.querySelectorAll('nav, .controls')].every(e => getComputedStyle(e).display === 'none')"
    assert browser.run(hidden)
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("getComputedStyle(document.querySelector('.heat')).maxHeight") == "none"
    assert len(browser.call("Page.printToPDF", printBackground=True)["data"]) > 50_000
    browser.call("Emulation.setEmulatedMedia", media="", features=[])


def test_a_served_page_follows_its_run(browser: Chromium, run_folder: Path) -> None:
    """A new step appears without a reload; what was opened, searched for and focused stays so; the end is said."""
    with open_server(run_folder.parent, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        browser.said.clear()
        browser.open(f"{server.address}run/{run_folder.name}/", *DESK)
        browser.run("window.same = true; document.querySelectorAll('details')[1].open = true")
        search(browser, "question 1")
        browser.run("document.querySelector('.controls input').focus()")
        with (run_folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 31, "train/loss": 123.0}\n')
        browser.wait("document.body.textContent.includes('→ 123')")
        assert browser.run("window.same && document.querySelectorAll('details')[1].open")
        assert browser.run("document.activeElement.value") == "question 1"
        assert browser.run("document.querySelector('.controls output').textContent") == "2 of 6 answers"
        browser.open(server.address, *PHONE)
        assert browser.run("document.documentElement.scrollWidth") <= PHONE[0]
        assert [words for words in browser.said if not words.startswith(f"asked for {server.address}")] == []
        server.shutdown()
        thread.join()
    browser.wait("document.body.textContent.includes('The server has ended')")
    browser.said.clear()
