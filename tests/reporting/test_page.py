"""The report: what it says, what it does when pieces are missing, and that no text of a model can become markup."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hostile_run import DATASET, EVIL, byte_tokenizer, decode, make_rows, make_summary, result

from opdkit.errors import UserError
from opdkit.reporting import write_report
from opdkit.reporting.compare import comparison
from opdkit.reporting.page import page
from opdkit.reporting.run import read_run
from opdkit.run.rows import save_rows
from opdkit.types import Example

ALLOWED = {
    *("i", "g", "nav", "ol", "a", "script", "select", "option", "input", "output"),
    *("html", "head", "meta", "title", "style", "body", "main", "header", "section", "footer", "article", "div", "p"),
    *(
        "dl",
        "dt",
        "dd",
        "h1",
        "h2",
        "h3",
        "span",
        "b",
        "bdi",
        "pre",
        "ul",
        "li",
        "details",
        "summary",
        "figure",
        "figcaption",
    ),
    *("table", "thead", "tbody", "tr", "th", "td", "svg", "text", "line", "circle", "rect", "polygon", "polyline"),
}
VOID = {"meta", "input"}


class Page(HTMLParser):
    """Every element and attribute of a page, and its text; checks that elements close in the order they opened."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.targets: list[str] = []  # of links
        self.ids: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.targets += [value or "" for name, value in attrs if name == "href"]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += data


def read(folder: Path) -> Page:
    path = write_report(folder, decode)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_hostile_text_stays_text(run_folder: Path) -> None:
    """Names, prompts, answers, parsed answers, feedback, labels, warnings and metric names are shown, never parsed.

    Only elements of our own appear, no event handlers, no inline styles, one script, and links within the page alone.
    Does not prove what a browser does; the policy below is the second fence.
    """
    page = read(run_folder)
    assert page.tags <= ALLOWED, page.tags - ALLOWED
    assert not {name for name in page.attributes if name.startswith("on") or name in ("src", "style")}
    assert (run_folder / "report.html").read_text().count("<script") == 1
    assert len(set(page.ids)) == len(page.ids) and {target[:1] for target in page.targets} == {"#"}
    assert {target[1:] for target in page.targets} <= set(page.ids)
    assert page.text.count("<script>alert(1)</script>") > 20
    shown = EVIL.replace("\x00", "\u2400").replace("\u202e", "[U+202E]")
    for word in ("nswer 0", "question 0", "parsed", "feedback", "gold", "SFT", "2 rows cannot be used", "problem 0"):
        assert f"{word} {shown}" in page.text
    assert "custom/<script>" in page.text


def test_policy_allows_nothing_but_our_style_sheet_and_script(run_folder: Path) -> None:
    """One Content-Security-Policy, before anything else, with the digests of what is in the page; no address of what is
    outside the file."""
    html = write_report(run_folder, decode).read_text(encoding="utf-8")
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', html)
    assert policy and html.index("Content-Security-Policy") < html.index("<title>") < html.index("<style>")
    style, script = (re.findall(rf"<{name}>(.*?)</{name}>", html, re.DOTALL) for name in ("style", "script"))
    assert len(style) == len(script) == 1
    digests = [b64encode(sha256(text.encode()).digest()).decode() for text in (style[0], script[0])]
    assert unescape(policy[1]) == (
        f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; base-uri 'none'; "
        "form-action 'none'"
    )
    assert "innerHTML" not in script[0] and "eval" not in script[0] and "fetch" not in script[0]
    assert not re.search(r"https?://|url\(|@import", html)


def test_says_what_happened(run_folder: Path) -> None:
    """The first lines carry the result in words, with numbers one can find in summary.json."""
    text = read(run_folder).text
    assert f"On {DATASET}, the student rose from 0.229 to 0.836; the 95 % intervals are apart." in text
    assert "The teacher stands at 0.930." in text
    assert "method opd · 30 steps · 7.2 s of training · 34,560 answer tokens · 48,000 teacher tokens" in text
    for warning in (
        "1 of 1,920 (< 0.1 %) training answers were cut at the length limit.",
        "Steps that changed nothing: the gradient was not finite, or nothing was counted: 1.",
        "1 of 1,920 (< 0.1 %) training answers were longer, with their context, than the teacher's positions",
        "Steps that a metrics service beside metrics.jsonl did not take: 3.",
        f"Student after opd, {DATASET}: 240 of 2,048 (12 %) answers were cut at the length limit.",
    ):
        assert warning in text
    for title in ("Loss", "Reward", f"Held-out: {DATASET}", "Recipe, resolved"):
        assert title in text
    assert "6 answers to 3 problems were saved at step 30." in text
    for number in range(6):  # the first token of each is not the model's, and stands by itself
        assert f"the student, {len(f'answer {number} {EVIL}') - 1} tokensnswer {number} " in text
    read_before = f"({len('context ' + EVIL)} tokens, the student 2, 4 cut to fit)context "
    for said in ("the teacher was shown answer 1", read_before):
        assert said in text
    for title in ("Along the answer", "by position in the answer", "KL(student || teacher), nats", "Token loss"):
        assert title in text


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("opd", "the student wrote answers, a teacher scored every token of them, and it learned from the scores."),
        ("grpo", "the student wrote answers, a grader rewarded them, and it learned from the rewards."),
        (
            "grpo_opd",
            "every token of them, a grader rewarded them, and it learned from the scores and the rewards.",
        ),
        ("sft", "the student learned from answers that came with the problems."),
        ("unheard-of", "Recipe, resolved"),
    ],
)
def test_says_what_a_step_is(run_folder: Path, method: str, said: str) -> None:
    """For a reader who has never seen the project; nothing is claimed of a method that this opdkit does not know."""
    recipe = run_folder / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('name = "opd"', f'name = "{method}"'))
    text = read(run_folder).text
    assert said in text and ("In each step" in text) == (method != "unheard-of")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ((0.5, 0.45, 0.55), (0.4, 0.38, 0.44), "the student fell from 0.500 to 0.400; the 95 % intervals are apart."),
        ((0.5, 0.45, 0.55), (0.53, 0.5, 0.56), "overlap, so this run alone does not settle that it changed."),
        ((0.5, None, None), (1.0, None, None), "too few to tell whether that is chance."),
        ((None, None, None), (0.5, 0.4, 0.6), "the student's answers could not be graded."),
    ],
)
def test_claims_no_more_than_the_intervals(run_folder: Path, before: tuple, after: tuple, said: str) -> None:  # type: ignore[type-arg]
    summary = make_summary(
        eval={
            "student_before": {DATASET: result(*before)},
            "student_after": {DATASET: result(*after)},
            "teacher": None,
        }
    )
    (run_folder / "summary.json").write_text(json.dumps(summary))
    assert said in read(run_folder).text


MISSING = {
    "summary.json": "summary.json is not there: the run has not finished.",
    "metrics.jsonl": "metrics.jsonl is not there: there are no curves.",
    "rows": "No rows were saved, so there are no answers to show",
    "recipe.toml": "recipe.toml is not there: the recipe cannot be shown.",
    "environment.json": "environment.json is not there: versions and hardware are unknown.",
}


@pytest.mark.parametrize("piece", MISSING)
def test_a_missing_piece_is_a_sentence(run_folder: Path, piece: str) -> None:
    """The rest of the report is there all the same."""
    path = run_folder / piece
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = read(run_folder).text
    assert MISSING[piece] in text
    assert f"On {DATASET}, the student" in text


@pytest.mark.parametrize("piece", ["summary.json", "metrics.jsonl", "environment.json", "recipe.toml"])
@pytest.mark.parametrize("content", ["", "{", "[]", '{"eval": 3}', '{"step": null}\n', "\x00"])
def test_a_damaged_piece_is_a_sentence(run_folder: Path, piece: str, content: str) -> None:
    """Half-written and foreign files; the page names the file or shows nothing of it, and is well formed."""
    (run_folder / piece).write_text(content)
    assert DATASET in read(run_folder).text


def test_damaged_metrics_are_counted_and_the_rest_is_drawn(run_folder: Path) -> None:
    """Two foreign lines and half a last one, which nobody is writing: said, with a number; the curves are there."""
    path = run_folder / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(f'[]\n{whole}{{"step": NaN}}\n{{"step": 31, "train/lo')
    text = read(run_folder).text
    assert "2 lines of metrics.jsonl are not metrics and are left out (the first is line 1)" in text
    assert "metrics.jsonl ends in the middle of a line, which is left out." in text and "Loss" in text
    path.write_text(whole + '{"step": 31')
    (run_folder / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()} since now\n")
    assert "middle of a line" not in read(run_folder).text, "its writer lives: the rest will come"


def test_a_pipe_in_place_of_a_file_does_not_hang(run_folder: Path) -> None:
    for name in ("metrics.jsonl", "recipe.toml"):
        (run_folder / name).unlink()
        os.mkfifo(run_folder / name)
    assert "recipe.toml is no file" in read(run_folder).text


def test_warnings_are_sorted_by_weight_and_never_twice(run_folder: Path) -> None:
    """Skipped steps come before cut answers before a metrics service; what the run said of the same faults is joined to
    the counts, its shares are not repeated; what it said of others stands alone."""
    said = ["5% of the answers ran into sampling.max_answer_tokens", "step 4: the step taught nothing and changed "
            "nothing: no answer could be graded", "2 rows cannot be used", "2 rows cannot be used"]  # fmt: skip
    (run_folder / "summary.json").write_text(json.dumps(make_summary(warnings=said)))
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 31, "train/num_steps_without_gradient": 1.0}) + "\n")
    text = read(run_folder).text
    order = ["Steps that changed nothing", "counted): 1. First, step 4: the step taught nothing", "answers were cut "
             "at the length limit", "2 rows cannot be used", "Steps that a metrics service"]  # fmt: skip
    assert [text.count(words) for words in order] == [1, 1, 2, 1, 1]  # cut answers: in training, and in an evaluation
    assert sorted(map(text.index, order)) == [text.index(words) for words in order]
    assert "ran into sampling" not in text


def test_no_value_of_a_summary_breaks_the_page(run_folder: Path) -> None:
    """Leaves that a page reads, with what no such leaf is; the page and a comparison are made all the same."""
    shutil.rmtree(run_folder / "rows")
    summary = make_summary(best={"step": 20, "chosen_on": "x", "value": 0.5, "model": "m", "eval": {}}, warnings=["w"])
    places = [("seconds",), ("tokens", "answer"), ("best",), ("best", "value"), ("warnings",),
              ("eval", "student_after", DATASET, "num_truncated")]  # fmt: skip
    for place in places:
        for value in (10**400, "x", [1]):
            broken = copy.deepcopy(summary)
            where = broken
            for name in place[:-1]:
                where = where[name]
            where[place[-1]] = value
            (run_folder / "summary.json").write_text(json.dumps(broken))
            run = read_run(run_folder)
            assert DATASET in page(run, None) and DATASET in comparison([run, run]), (place, value)


def test_damaged_rows_and_evaluations_are_sentences(run_folder: Path) -> None:
    (run_folder / "rows" / "step_000030.parquet").write_bytes(b"PAR1")
    (run_folder / "eval" / "step_000010.json").write_text(json.dumps({DATASET: {"problems": 3}}))
    text = read(run_folder).text
    assert "step_000030.parquet is not a complete Parquet file" in text
    assert "step_000010.json cannot be read" in text


def test_interrupted_before_anything_was_measured(tmp_path: Path) -> None:
    """Only a recipe: one page that says what is missing."""
    (tmp_path / "recipe.toml").write_text('name = "short"\n[train]\nsteps = 5\n[method]\nname = "opd"\n')
    text = read(tmp_path).text
    assert "method opd · stopped or still running at step 0 · 5 planned" in text
    assert "Nothing was evaluated" in text and "No rows were saved" in text


def test_an_unfinished_run_shows_the_evaluations_so_far(run_folder: Path) -> None:
    (run_folder / "summary.json").unlink()
    text = read(run_folder).text
    assert "Student at step 0" in text and "Student at step 30" in text and "Student at step 10" not in text
    assert "method opd · stopped or still running at step 30 · 30 planned" in text


def test_a_run_that_was_not_measured_before_still_says_where_it_ended(run_folder: Path) -> None:
    """As the baselines of the quickstart: the evaluation at the start is switched off."""
    summary = make_summary()
    summary["eval"]["student_before"] = None
    (run_folder / "summary.json").write_text(json.dumps(summary))
    text = read(run_folder).text
    assert f"On {DATASET}, the student ended at 0.836; it was not measured before. The teacher stands at 0.930." in text


def test_the_best_step_stands_beside_the_last(run_folder: Path) -> None:
    """With what chose it; that a choice by the reported set flatters is said; where it is the last step, once."""
    best = {"step": 20, "chosen_on": f"eval/{DATASET}/avg_at_n", "value": 0.9, "model": "checkpoints/step_000020/model",
            "eval": {DATASET: result(0.9, 0.88, 0.92)}}  # fmt: skip
    (run_folder / "summary.json").write_text(json.dumps(make_summary(best=best)))
    text = read(run_folder).text
    assert "Best, step 200.900[0.880, 0.920]" in text and "the student rose from 0.229 to 0.836" in text
    assert f"The best step is 20, chosen by eval/{DATASET}/avg_at_n (0.9): checkpoints/step_000020/model." in text
    assert "Its numbers on that set flatter it." in text
    (run_folder / "summary.json").write_text(
        json.dumps(make_summary(best=best | {"step": 30, "chosen_on": "eval/x/y"}))
    )
    text = read(run_folder).text
    assert "Best, step" not in text and "The best step is 30" in text and "flatter" not in text


def test_one_problem_is_not_both_the_best_and_the_worst(run_folder: Path) -> None:
    rows = make_rows()
    better = [replace(rows[0], rollout=replace(rows[0].rollout, reward=0.25)), *rows[1:]]  # or no mean is the best
    save_rows(run_folder / "rows" / "step_000030.parquet", better)
    assert "several graded answers" in read(run_folder).text
    rows = [row for row in rows if row.problem.id.startswith("problem 1")]
    assert len(rows) == 2
    save_rows(run_folder / "rows" / "step_000030.parquet", rows)
    assert "several graded answers" not in read(run_folder).text


def test_answers_of_a_megabyte_do_not_fill_the_page(run_folder: Path) -> None:
    """Answer, question, feedback and what was read of it: each to a limit, and the rest is counted."""
    (row, *others), long = make_rows(), "<b>x" * 250_000
    rollout = replace(
        row.rollout, answer_ids=(120,) * 1_000_000, answer_mask=np.ones(1_000_000, bool), feedback=long, parsed=long
    )
    problem = replace(row.problem, messages=({"role": "user", "content": long},))
    big = Example(problem=problem, rollout=replace(rollout, reward=1.0))
    rows = [big, *(replace(other, rollout=replace(other.rollout, reward=0.0)) for other in others)]
    save_rows(run_folder / "rows" / "step_000030.parquet", rows)
    page = write_report(run_folder, decode).read_text()
    assert page.count("[950,000 more characters are not shown]") == 3  # question, feedback, what was read of it
    assert page.count("[944,000 more characters are not shown]") == 1 and len(page) < 3_000_000


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="is not a run folder"):
        write_report(tmp_path / "nowhere")


def test_decodes_with_the_tokenizer_of_the_run(run_folder: Path) -> None:
    """tokenizer.json of the checkpoint, special tokens included; without one, token ids and a sentence about it."""
    assert "They are shown as token ids" in Page(write_report(run_folder).read_text(encoding="utf-8")).text
    model = run_folder / "checkpoints" / "step_000030" / "model"
    model.mkdir(parents=True)
    byte_tokenizer().save(str(model / "tokenizer.json"))
    html = write_report(run_folder).read_text(encoding="utf-8")
    assert "token ids" not in Page(html).text
    assert Page(html).tags <= ALLOWED


def test_needs_no_torch(run_folder: Path) -> None:
    """A report is written on a laptop in a second."""
    code = (
        "import sys; from pathlib import Path; from opdkit.reporting import write_report\n"
        "write_report(Path(sys.argv[1]))\n"
        "bad = {'torch', 'transformers', 'matplotlib'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run_folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
