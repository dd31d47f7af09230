"""A W&B server on the loopback, good enough for the real client to upload runs to.

It answers the part of W&B's GraphQL that the client of 0.29 to 0.31 uses for runs, their history,
files and artifacts, and keeps what arrives. It says nothing of how the real server shows it.
"""

import base64
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789" * 4


@dataclass
class StoredRun:
    """What the server has of one run."""

    fields: dict[str, Any] = field(default_factory=dict)  # as last told: config, groupName …
    streams: dict[str, dict[int, str]] = field(default_factory=dict)  # file to lines by number
    files: dict[str, bytes] = field(default_factory=dict)
    artifacts: dict[str, dict[str, bytes]] = field(default_factory=dict)
    exit_code: int | None = None  # None while it runs

    @property
    def history(self) -> list[dict[str, Any]]:
        lines = self.streams.get("wandb-history.jsonl", {})
        return [json.loads(lines[number]) for number in sorted(lines)]


class WandbServer:
    """Runs and requests; set ``die`` to have it hang from a certain request on."""

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.operations: list[str] = []
        self.die: Callable[[str], bool] = lambda operation: False
        self.dead = threading.Event()
        self.closing = threading.Event()
        self.key = KEY
        self.code = 200  # of every answer, if it is another
        self.url = ""
        self._uploads: dict[str, Callable[[bytes], None]] = {}
        self._artifacts: list[tuple[str, dict[str, Any], dict[str, bytes]]] = []
        self._lock = threading.Lock()

    def run(self, name: str) -> StoredRun:
        return self.runs.setdefault(name, StoredRun())

    def place(self, keep: Callable[[bytes], None]) -> str:
        """The address where a file can be put."""
        name = f"/upload/{len(self._uploads)}"
        self._uploads[name] = keep
        return self.url + name

    def answer(self, method: str, path: str, body: bytes, key: str | None) -> tuple[int, Any]:
        with self._lock:
            if self.code != 200:
                return self.code, {}
            if path == "/graphql":
                if key != self.key:
                    return 401, {"errors": [{"message": "user is not logged in"}]}
                request = json.loads(body)
                found = re.search(r"(?:query|mutation)\s*(\w*)", request["query"])
                operation = found[1] if found else ""
                self.operations.append(operation)
                known = getattr(self, f"_{operation}", None)
                return 200, {"data": known(request.get("variables") or {}) if known else {}}
            if path.startswith("/upload/"):
                self._uploads[path](body)
            elif found := re.fullmatch(r"/files/[^/]*/[^/]*/([^/]+)/file_stream", path):
                self.operations.append("file_stream")
                self._stream(self.run(found[1]), json.loads(body))
            return 200, {}

    def _stream(self, run: StoredRun, told: dict[str, Any]) -> None:
        for name, part in (told.get("files") or {}).items():
            lines = run.streams.setdefault(name, {})
            for number, line in enumerate(part["content"], start=part["offset"]):
                lines[number] = line
        if told.get("complete"):
            run.exit_code = told.get("exitcode")

    def _UpsertBucket(self, told: dict[str, Any]) -> dict[str, Any]:
        run = self.run(told["name"])
        new = not run.fields
        run.fields |= {key: value for key, value in told.items() if value is not None}
        bucket = {
            **{"id": told["name"], "name": told["name"], "displayName": told["displayName"]},
            **{"description": "", "config": told["config"], "sweepName": None},
            "project": {"id": "p", "name": told["project"], "entity": {"id": "e", "name": "team"}},
            "historyLineCount": len(run.history),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def _RunResumeStatus(self, told: dict[str, Any]) -> dict[str, Any]:
        team = {"id": "e", "name": "team"}
        run = self.runs.get(told["name"])
        if run is None:
            return {"model": {"id": "p", "name": told["project"], "entity": team, "bucket": None}}
        lines = run.streams.get("wandb-history.jsonl", {})
        tail = [lines[max(lines)]] if lines else []
        summary = run.streams.get("wandb-summary.json", {})
        bucket = {
            **{"id": told["name"], "name": told["name"], "displayName": "", "notes": None},
            **{"summaryMetrics": summary.get(0, "{}"), "config": run.fields.get("config", "{}")},
            **{"historyLineCount": len(lines), "historyTail": json.dumps(tail)},
            **{"logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]"},
            **{"tags": [], "wandbConfig": '{"t": 1}'},
        }
        return {"model": {"id": "p", "name": told["project"], "entity": team, "bucket": bucket}}

    def _CreateRunFiles(self, told: dict[str, Any]) -> dict[str, Any]:
        files = self.run(told["run"]).files

        def keep(name: str) -> str:
            return self.place(lambda body: files.__setitem__(name, body))

        names = [{"name": name, "uploadUrl": keep(name)} for name in told["files"]]
        return {"createRunFiles": {"runID": told["run"], "uploadHeaders": [], "files": names}}

    def _ArtifactType(self, told: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _CreateArtifact(self, told: dict[str, Any]) -> dict[str, Any]:
        told = told["input"]
        files: dict[str, bytes] = {}
        self._artifacts.append((told["runName"], told, files))
        number = str(len(self._artifacts) - 1)
        artifact = {
            "id": number,
            "state": "PENDING",
            "artifactSequence": {"id": "s", "latestArtifact": None},
        }
        return {"createArtifact": {"artifact": artifact}}

    def _CreateArtifactManifest(self, told: dict[str, Any]) -> dict[str, Any]:
        url = self.place(lambda body: None)
        upload = {
            "id": "f",
            "name": told["name"],
            "displayName": told["name"],
            "uploadUrl": url,
            "uploadHeaders": [],
        }
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": upload}}}

    def _CreateArtifactFiles(self, told: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for wanted in told["input"]["artifactFiles"]:
            files = self._artifacts[int(wanted["artifactID"])][2]
            name = wanted["name"]
            url = self.place(lambda body, files=files, name=name: files.__setitem__(name, body))
            edges.append(
                {
                    "node": {
                        "id": name,
                        "name": name,
                        "displayName": name,
                        "uploadUrl": url,
                        "uploadHeaders": [],
                        "uploadMultipartUrls": None,
                        "storagePath": name,
                        "artifact": {"id": wanted["artifactID"]},
                    }
                }
            )
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CommitArtifact(self, told: dict[str, Any]) -> dict[str, Any]:
        run, made, files = self._artifacts[int(told["artifactID"])]
        self.run(run).artifacts[made["artifactCollectionName"]] = files
        return {
            "commitArtifact": {"artifact": {"id": told["artifactID"], "digest": made["digest"]}}
        }

    def _Viewer(self, told: dict[str, Any]) -> dict[str, Any]:
        return {
            "viewer": {
                "id": "u",
                "email": "",
                "entity": "team",
                "username": "user",
                "flags": "{}",
                "teams": {"edges": []},
            }
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_HTTPServer"

    def log_message(self, *arguments: Any) -> None:
        pass

    def _handle(self) -> None:
        wandb = self.server.wandb
        body = self._body()
        operation = self.path + " " + body[:300].decode(errors="replace")
        if wandb.die(operation):
            wandb.dead.set()
        if wandb.dead.is_set():
            wandb.closing.wait()  # hangs
            return
        word = (self.headers.get("Authorization") or "").removeprefix("Basic ")
        key = base64.b64decode(word).decode().partition(":")[2] if word else None
        code, content = wandb.answer(self.command, self.path, body, key)
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    do_GET = do_POST = do_PUT = _handle


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    wandb: WandbServer

    def handle_error(self, *arguments: Any) -> None:
        pass  # a client that went away


@contextmanager
def serving() -> Iterator[WandbServer]:
    server = _HTTPServer(("127.0.0.1", 0), _Handler)
    server.wandb = wandb = WandbServer()
    wandb.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield wandb
    finally:
        wandb.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
