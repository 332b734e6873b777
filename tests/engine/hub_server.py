"""A local stand-in for the Hugging Face Hub: creates repositories, takes commits and LFS uploads, serves files."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SHA = "1" * 40
"""Every commit has this name."""
TOKEN = "hf_test"


@dataclass
class Hub:
    """What the server holds. repositories: files by path. blobs: uploads by SHA-256. log: requests that came."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A server on a free local port."""
    hub = Hub()

    class Handler(_Handler):
        content = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    content: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._get(body=True)

    def do_HEAD(self) -> None:
        self._get(body=False)

    def _get(self, *, body: bool) -> None:
        hub, path = self.content, self.path.partition("?")[0]
        hub.log.append(f"{self.command} {path}")
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        found = info or tree or file
        if found is None or found[1] not in hub.repositories:
            self._answer(404, {"error": "Repository not found"}, body, {"X-Error-Code": "RepoNotFound"})
            return
        if hub.private.get(found[1]) and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Repository not found"}, body, {"X-Error-Code": "RepoNotFound"})
            return
        files = hub.repositories[found[1]]
        if info:
            if info[2] not in (None, "main", SHA):
                self._answer(404, {"error": "Invalid rev"}, body, {"X-Error-Code": "RevisionNotFound"})
                return
            siblings = [{"rfilename": name} for name in files]
            about = {"_id": "1", "id": found[1], "sha": SHA, "private": False, "tags": [], "downloads": 0, "likes": 0}
            self._answer(200, {**about, "siblings": siblings}, body)
        elif tree:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            self._answer(200, entries, body)
        elif file is not None and file[2] in files:
            data = files[file[2]]
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            headers = {"ETag": etag, "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
            self._answer(200, data, body, headers)
        else:
            self._answer(404, {"error": "Entry not found"}, body, {"X-Error-Code": "EntryNotFound"})

    def do_PUT(self) -> None:
        hub = self.content
        hub.log.append(f"PUT {self.path}")
        data = self._body()
        hub.blobs[hashlib.sha256(data).hexdigest()] = data
        self._answer(200, {}, True)

    def do_POST(self) -> None:
        hub, path = self.content, self.path.partition("?")[0]
        hub.log.append(f"POST {path}")
        data = self._body()
        if not path.endswith("/verify") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid token"}, True)
            return
        if path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            hub.repositories.setdefault(name, {})
            hub.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            self._answer(200, {"url": f"{hub.url}/{name}", "id": name, "name": name}, True)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {"path": each["path"], "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False, "oid": None}
                for each in json.loads(data)["files"]
            ]  # fmt: skip
            self._answer(200, {"files": files}, True)
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = [
                {**each, "authenticated": True, "actions": {"upload": {"href": f"{hub.url}/lfs/{each['oid']}"}}}
                for each in json.loads(data)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects}, True)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in data.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    hub.repositories[found[1]][value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    hub.repositories[found[1]][value["path"]] = hub.blobs[value["oid"]]
            url = f"{hub.url}/{found[1]}/commit/{SHA}"
            self._answer(200, {"success": True, "commitUrl": url, "commitOid": SHA, "hookOutput": ""}, True)
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []}, True)
        else:
            self._answer(404, {"error": f"unknown request {path}"}, True)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, value: Any, body: bool, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/octet-stream" if isinstance(value, bytes) else "application/json")
        for name, content in (headers or {}).items():
            self.send_header(name, content)
        self.end_headers()
        if body:
            self.wfile.write(data)
