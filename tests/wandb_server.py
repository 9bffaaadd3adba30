"""As much of a W&B server as ``wandb sync`` talks to: runs and the lines of their histories."""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Server(ThreadingHTTPServer):
    """Run id -> the lines of its history, each where the client said that it belongs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.histories: dict[str, list[dict[str, Any] | None]] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """GraphQL's ``data``; an operation that is not known gets nothing."""
        owner = {"id": "e", "name": "me"}
        if operation == "UpsertBucket":
            lines = self.histories.setdefault(given["name"], [])
            bucket = {"id": given["name"], "name": given["name"], "displayName": given["name"]}
            bucket |= {"project": {"id": "p", "name": "longrope2", "entity": owner}}
            bucket |= {"config": "{}", "historyLineCount": len(lines)}
            return {"upsertBucket": {"bucket": bucket, "inserted": not lines}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/up"} for name in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        return {}

    def stream(self, run: str, files: dict[str, Any]) -> None:
        """Lines of a history, written over what stands there."""
        if (chunk := files.get("wandb-history.jsonl")) is None:
            return
        lines, offset = self.histories[run], chunk["offset"]
        lines += [None] * (offset + len(chunk["content"]) - len(lines))
        for number, line in enumerate(chunk["content"], offset):
            lines[number] = json.loads(line)


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, *_: object) -> None:
        """Silent."""

    def do_PUT(self) -> None:
        self._body()
        self._reply({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            found = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            operation = found[1] if found else ""
            self._reply({"data": self.server.answer(operation, asked.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            files = json.loads(body).get("files") or {}
            self.server.stream(self.path.split("/")[-2], files)
            self._reply({"limits": {}})
        else:
            self._reply({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def wandb_server() -> Iterator[_Server]:
    """A server that listens while open; ``url`` is where, ``histories`` what it was given."""
    server = _Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
