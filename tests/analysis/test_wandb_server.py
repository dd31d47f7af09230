"""`wandb:ENTITY/PROJECT[/GROUP]` through W&B's own client, from a loopback server.

The server answers as W&B's does: the shapes are those of the client's GraphQL fragments.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from analysis.__main__ import main
from analysis.read import wandb
from analysis.read.saved import SourceError
from tests.forked import Forker

MakeRun = Callable[..., Path]
ONE = {"p": "one two three four five six", "q": "seven eight nine ten eleven"}
PAGE = 2  # the server gives fewer than it is asked for


@dataclass
class Server:
    """One project, `me/p`."""

    runs: list[dict[str, Any]] = field(default_factory=list)  # nodes, as GraphQL has them
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by run and name
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    url: str = ""

    def add(self, folder: Path | None, run_id: str, *, group: str, state: str = "finished") -> None:
        config = {"study": group, "feedback": {"kind": "log_prob", "strength": 0.5}}
        if folder is not None:
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            self.files[run_id] = {
                f"run_folder/{path.name}": path.read_bytes() for path in folder.iterdir()
            }
        self.runs.append(
            {
                "id": f"storage-{run_id}",
                "projectId": "1",
                "name": run_id,
                "displayName": run_id,
                "tags": [],
                "sweepName": None,
                "state": state,
                "config": json.dumps({k: {"value": v, "desc": None} for k, v in config.items()}),
                "group": group,
                "jobType": None,
                "commit": None,
                "readOnly": True,
                "createdAt": "2026-01-01T00:00:00",
                "heartbeatAt": "2026-01-01T00:00:00",
                "description": None,
                "notes": None,
                "systemMetrics": "{}",
                "summaryMetrics": json.dumps({"outcome": "settled", "nll": 4.3, "_step": 2}),
                "historyLineCount": 2,
                "user": {"name": "me", "username": "me"},
                "historyKeys": {},
            }
        )

    def answer(self, name: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        self.asked.append((name, variables))
        if name == "Viewer":
            viewer = {"id": "v", "entity": "me", "username": "me", "flags": "{}", "admin": False}
            return {"viewer": {**viewer, "teams": {"edges": []}, "apiKeys": {"edges": []}}}
        if name == "Runs":
            return {"project": self._page(variables) if variables["project"] == "p" else None}
        if name == "RunFiles":
            return {"project": {"internalId": "1", "run": self._files(variables)}}
        if name == "RunFullHistory":
            rows = [json.dumps(row) for row in self.history.get(variables["name"], [])]
            return {"project": {"run": {"history": rows}}}
        return None

    def _page(self, variables: dict[str, Any]) -> dict[str, Any]:
        group = json.loads(variables["filters"]).get("group")
        chosen = [run for run in self.runs if group in (None, run["group"])]
        begin = int(variables["cursor"] or 0)
        edges = [
            {"node": run, "cursor": str(number)}
            for number, run in enumerate(chosen[begin : begin + PAGE], start=begin + 1)
        ]
        more = begin + PAGE < len(chosen)
        info = {"endCursor": edges[-1]["cursor"] if edges else None, "hasNextPage": more}
        runs = {"edges": edges, "pageInfo": info}
        return {"internalId": "1", "runCount": len(chosen), "readOnly": True, "runs": runs}

    def _files(self, variables: dict[str, Any]) -> dict[str, Any]:
        run_id = variables["name"]
        stored = self.files.get(run_id, {})
        edges = [
            {
                "node": {
                    "id": name,
                    "name": name,
                    "url": f"{self.url}/files/{run_id}/{name}",
                    "directUrl": f"{self.url}/files/{run_id}/{name}",
                    "sizeBytes": str(len(content)),
                    "mimetype": "application/octet-stream",
                    "updatedAt": "2026-01-01T00:00:00",
                    "md5": str(hash(content)),
                },
                "cursor": name,
            }
            for name, content in stored.items()
            if name in variables["fileNames"]
        ]
        info = {"endCursor": None, "hasNextPage": False}
        return {"fileCount": len(edges), "files": {"edges": edges, "pageInfo": info}}


@pytest.fixture
def server() -> Iterator[Server]:
    project = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            query = json.loads(body) if self.path == "/graphql" else {"query": ""}
            name = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])
            data = project.answer(name[1] if name else "", query.get("variables") or {})
            answer = {"errors": [{"message": "unknown"}]} if data is None else {"data": data}
            self._reply(json.dumps(answer).encode())

        def do_GET(self) -> None:
            _, _, run_id, name = self.path.split("/", 3)
            project.fetched.append(f"{run_id}/{name}")
            self._reply(project.files[run_id][name])

        def _reply(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        project.url = f"http://127.0.0.1:{listening.server_address[1]}"
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        yield project
        listening.shutdown()


@pytest.fixture
def analysis(tmp_path: Path, forker: Forker) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python -m analysis` as somebody with this server and key, in a home of their own."""

    def run(url: str, *words: str, key: str | None = "0" * 40) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "XDG_"))}
        environment = {**kept, "HOME": str(tmp_path), "WANDB_BASE_URL": url}
        environment["STATEFUL_GPT_CACHE"] = str(tmp_path / "cache")
        if key is not None:
            environment["WANDB_API_KEY"] = key
        return forker.run(["-m", "analysis", *words], env=environment)

    return run


def test_a_group_of_runs_is_paged_fetched_once_and_gives_the_table_of_its_run_folders(
    make_run: MakeRun,
    server: Server,
    analysis: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    for number, strength in enumerate((0.1, 0.5, 1.0)):
        name = f"run{number}"
        folder = tmp_path / "runs" / name
        make_run(folder, study="sweep", prompts=ONE, feedback__strength=strength)
        server.add(folder, name, group="sweep")
    server.add(None, "going", group="sweep", state="running")
    server.add(None, "older", group="sweep")
    server.add(make_run(tmp_path / "elsewhere" / "x"), "x", group="other")
    assert main(["table", str(tmp_path / "runs"), "--csv", str(tmp_path / "a.csv")]) == 0
    words = ("table", "wandb:me/p/sweep", "--csv", str(tmp_path / "b.csv"))
    first = analysis(server.url, *words)
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert first.stderr.splitlines() == [
        "Left out 2 runs that are not finished and whole: going (running), older (no run_folder "
        "among its files, and no history of iterations)."
    ]
    pages = [variables["cursor"] for name, variables in server.asked if name == "Runs"]
    assert pages == [None, "2", "4"]
    assert len(server.fetched) == 3 * 5
    about = json.loads((tmp_path / "b.csv.json").read_text(encoding="utf-8"))
    assert about["runs"] == ["run0", "run1", "run2"]
    redraw = f"python -m analysis table wandb:me/p/sweep --csv {tmp_path / 'b.csv'}"
    assert about["redraw"] == redraw

    again = analysis(server.url, *words)
    assert again.stdout == first.stdout
    assert len(server.fetched) == 3 * 5, "what was fetched is kept"
    assert not list((tmp_path / "cache" / "wandb").glob(".fetching-*"))

    # one of which a tidy disk has thrown away
    for lost in sorted((tmp_path / "cache" / "wandb").glob("*/run_folder/summary.json")):
        lost.unlink()
    assert analysis(server.url, *words).stdout == first.stdout
    assert sorted(server.fetched[3 * 5 :]) == [f"run{n}/run_folder/summary.json" for n in range(3)]
    server.fetched[3 * 5 :] = []

    # a run from before there were copies, and one whose copy was changed on the server
    server.history["older"] = [{"iteration": 1, "nll": 4.0}, {"iteration": 2, "nll": 4.3}]
    server.files["run0"]["run_folder/summary.json"] += b"\n"
    later = analysis(server.url, "table", "wandb:me/p")
    assert later.returncode == 0, later.stderr
    assert "1 run has only W&B's history, which does not tell prompts apart: older" in later.stderr
    assert len(server.fetched) == 3 * 5 + 5 + 5, "the changed one, and that of the other group"


def test_what_keeps_a_server_from_answering_is_one_sentence(
    server: Server, analysis: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    with socket.socket() as taken:  # a port where nothing listens
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        cases = [
            (server.url, "wandb:me/p", None, "No API key configured. Use `wandb login` to log in"),
            (server.url, "wandb:me/absent", "0" * 40, "Could not find project absent"),
            (server.url, "wandb:me/p", "0" * 40, "there is no run in it"),
            (nobody, "wandb:me/p", "0" * 40, "connection refused"),
        ]
        for url, source, key, words in cases:
            done = analysis(url, "table", source, key=key)
            assert done.returncode == 2
            assert words in done.stderr
            assert done.stderr.startswith(f"{source}: ")
            assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("source", ["wandb:", "wandb:me", "wandb:me/", "wandb:/p", "wandb:me/p/"])
def test_an_address_without_a_project_says_what_it_must_be(source: str) -> None:
    with pytest.raises(SourceError, match="give wandb:ENTITY/PROJECT or"):
        wandb.read_address(source)
