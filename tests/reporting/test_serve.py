"""The served folder of runs: what is answered, to whom, and what a stranger's folder cannot do."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from hostile_run import EVIL, write_run
from test_page import ALLOWED, Page
from typer.testing import CliRunner

from opdkit.cli import app
from opdkit.errors import UserError
from opdkit.reporting.serve import runs as module
from opdkit.reporting.serve.server import Server, open_server

SERVED = {"form", "button"}
SECRET = "the password is swordfish"
NAME = "a <b>&'\" %2e\u202e"  # of a run folder


class Client:
    """Asks the server as a browser would, or as somebody else would."""

    def __init__(self, server: Server) -> None:
        self.server, self.port = server, server.server_port

    def ask(
        self, path: str, *, method: str = "GET", host: str | None = None, token: bool = True
    ) -> tuple[int, str, str]:
        """(status, text, mark)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        address = f"/{self.server.token}/{path}" if token else path
        connection.putrequest(method, address, skip_host=True)
        connection.putheader("Host", host if host is not None else f"127.0.0.1:{self.port}")
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.headers["Cache-Control"] == "no-store" and answer.headers["X-Frame-Options"] == "DENY"
        text = answer.read().decode()
        connection.close()
        return answer.status, text, answer.headers.get("ETag", "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs, a pipeline's stage below its own folder, and what is no run."""
    for name in ("served/one", f"served/{NAME}", "served/pipeline/stage"):
        write_run(tmp_path / name)
    (tmp_path / "served" / "notes").mkdir()
    (tmp_path / "secret.txt").write_text(SECRET)
    return tmp_path / "served"


@pytest.fixture
def client(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr(module, "REST", 0.0)
    with open_server(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield Client(server)
        server.shutdown()
        thread.join()


def test_every_run_has_a_page_and_the_list_leads_there(client: Client) -> None:
    """Also one whose folder's name is hostile, and one below another folder; several are compared."""
    status, text, _ = client.ask("")
    page = Page(text)
    assert status == 200 and page.tags <= ALLOWED | SERVED
    links = [target for target in page.targets if not target.startswith("#")]
    assert sorted(links) == sorted(f"run/{quote(name, safe='')}/" for name in ("one", NAME, "pipeline/stage"))
    for link in links:
        status, text, _ = client.ask(link)
        page = Page(text)
        assert status == 200 and page.tags <= ALLOWED and "30 steps" in page.text and "../../" in page.targets
        assert "connect-src" in text and "<script>alert" not in text and f"answer {EVIL[:4]}" not in text
    status, text, _ = client.ask(f"compare?run=one&run={quote('pipeline/stage')}")
    assert status == 200 and "Problem by problem" in Page(text).text


def test_who_is_not_answered(client: Client) -> None:
    """Without the token or with another, under a foreign name, by another method; loopback is all there is."""
    assert client.server.server_address[0] == "127.0.0.1"
    for path in ("/", "/x/", "", "//", "*", "http:", f"/{client.server.token[:-1]}/", "/é/"):
        assert client.ask(quote(path, safe="/:*"), token=False)[0] == 403, path
    for host in (
        "evil.example",
        f"evil.example:{client.port}",
        "127.0.0.1",
        f"127.0.0.1.evil.example:{client.port}",
        "",
    ):
        assert client.ask("", host=host)[0] == 421, host
    assert client.ask("", host=f"localhost:{client.port}")[0] == 200
    assert {client.ask("", method=method)[0] for method in ("POST", "PUT", "DELETE", "OPTIONS")} == {501}


@pytest.mark.parametrize(
    "path",
    ["..", "../", "run/../../secret.txt", "run/..%2f..%2fsecret.txt/", "run/%2e%2e/", "run//etc/passwd/",
     "run/one/rows/", "run/one/recipe.toml", "run/one%00/", "run/notes/", "run/pipeline/", "run/one",
     "compare?run=../one", "compare",
     "run/" + "a" * 5000 + "/", "run/%ff%fe/"],
)  # fmt: skip
def test_no_path_leads_out(client: Client, path: str) -> None:
    status, text, _ = client.ask(path)
    assert status == 404 and text == "there is no such page\n"


def test_links_and_pipes_of_a_hostile_run(client: Client, folder: Path, tmp_path: Path) -> None:
    """A file that is a link out of the folder, a folder of rows that is one, a run that is one, a pipe for a file:
    nothing of it is shown, nothing hangs, and the other runs are served."""
    for name in ("file", "rows", "pipe"):
        write_run(folder / name)
    (folder / "file" / "recipe.toml").unlink()
    (folder / "file" / "recipe.toml").symlink_to(tmp_path / "secret.txt")
    (folder / "rows" / "eval").rename(tmp_path / "eval")
    (folder / "rows" / "eval").symlink_to(tmp_path / "eval")
    write_run(tmp_path / "elsewhere")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "pipe" / "metrics.jsonl").unlink()
    os.mkfifo(folder / "pipe" / "metrics.jsonl")
    write_run(folder / "locked")
    (folder / "locked" / ".lock").write_text(f"process {'9' * 30} on {socket.gethostname()} since then\n")
    write_run(folder / "far")
    (folder / "far" / ".lock").write_text("process 1 on elsewhere since then\n")
    (folder / "far" / "nowhere").symlink_to(tmp_path / "nowhere")
    for name in ("file", "rows"):
        status, text, _ = client.ask(f"run/{name}/")
        assert status == 200 and "is a link that leads out of" in text and SECRET not in text and "30 steps" not in text
    assert client.ask("run/linked/")[0] == 404
    assert "metrics.jsonl is no file" in client.ask("run/pipe/")[1]
    text = client.ask("")[1]
    assert SECRET not in text and "is a link that leads out of" in text and "run/one/" in text
    assert client.ask("compare?run=one&run=file")[1].count("is a link that leads out of") == 1


def test_a_page_follows_its_run(client: Client, folder: Path) -> None:
    """The mark changes with the files, and with nothing else; HEAD gives it without the page."""
    _, text, mark = client.ask("run/one/")
    assert f"data-mark={mark}" in text and client.ask("run/one/", method="HEAD") == (200, "", mark)
    with (folder / "one" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 31, "train/loss": 123.0}) + "\n")
    _, text, later = client.ask("run/one/")
    assert later != mark and "→ 123" in text
    assert client.ask("run/one/")[2] == later


def test_a_page_that_takes_long_is_not_made_again_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = module.Runs(folder)
    first = served.run("one")
    (folder / "one" / "metrics.jsonl").write_text("")
    monkeypatch.setattr(module, "REST", 1e6)
    assert first is not None and served.run("one") is first
    monkeypatch.setattr(module, "REST", 0.0)
    assert served.run("one") is not first
    monkeypatch.setattr(module, "REST", 1e6)
    assert served.several(["one"]) is not served.run("one")  # the same runs, another page


def test_a_run_that_breaks_the_page_is_a_sentence(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise ZeroDivisionError(EVIL)

    monkeypatch.setattr(module, "page", broken)
    status, text, _ = client.ask("run/one/")
    assert status == 200 and "this run cannot be shown (ZeroDivisionError" in text and "<script>alert" not in text


def test_what_cannot_be_served_is_refused(folder: Path, tmp_path: Path) -> None:
    """No folder, a folder without runs, a port that is taken; and --serve beside what it does not go with."""
    for path, words in ((tmp_path / "nope", "is no folder"), (folder / "notes", "holds no run")):
        with pytest.raises(UserError, match=words):
            open_server(path, 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=f"--port {taken.getsockname()[1]}: .* give another"):
            open_server(folder, taken.getsockname()[1])
    for words in (["--serve", str(folder), str(folder)], ["--serve", str(folder), "--out", "x.html"]):
        with pytest.raises(UserError, match="--serve takes one folder"):
            CliRunner().invoke(app, ["report", *words], catch_exceptions=False)


def test_one_run_is_served_alone_and_tokens_differ(folder: Path) -> None:
    with open_server(folder / "one", 0) as one, open_server(folder, 0) as other:
        assert list(one.runs.found()) == ["one"] and len(one.token) >= 32 and one.token != other.token
        assert re.fullmatch(rf"http://127\.0\.0\.1:{one.server_port}/{re.escape(one.token)}/", one.address)


def test_half_a_request_holds_nobody_up(client: Client) -> None:
    with socket.create_connection(("127.0.0.1", client.port)) as silent:
        silent.sendall(b"GET / HTTP/1.1\r\nHost:")
        start = time.monotonic()
        assert client.ask("")[0] == 200 and time.monotonic() - start < 20
