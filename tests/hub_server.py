"""A Hugging Face Hub on this machine: the endpoints that upload and download use, with tokens, branches and faults."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler

from file_server import LocalServer

TOKEN = "hf_writer"


class HubServer(LocalServer):
    """Serves while it is open; `repos` maps `org/name` to its privacy, branches and commits."""

    def __init__(self) -> None:
        self.repos: dict[str, dict] = {}
        self.stored: dict[str, bytes] = {}  # large files by SHA-256
        self.requests: list[str] = []  # "METHOD path", in order
        self.breaks: list[int] = []  # after how many bytes each of the next downloads breaks

    def handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                owner.requests.append(f"{self.command} {self.path}")
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if "chunked" in self.headers.get("Transfer-Encoding", ""):
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                owner.answer(self, self.path.partition("?")[0], body)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

        return Handler

    @property
    def url(self) -> str:
        return self.root

    def add(self, repo: str, private: bool = False, **files: bytes) -> str:
        """Create a repository, with a commit of files (`README__md=…` is README.md); return the hash of the commit."""
        empty = "0" * 40
        self.repos[repo] = {"private": private, "gated": False, "branches": {"main": empty}, "commits": {empty: {}}}
        return self.commit(repo, "main", {name.replace("__", "."): data for name, data in files.items()})

    def commit(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        own = self.repos[repo]
        files = own["commits"][own["branches"][branch]] | files
        digest = hashlib.sha1(repr((sorted(files.items()), len(own["commits"]))).encode()).hexdigest()
        own["commits"][digest] = files
        own["branches"][branch] = digest
        return digest

    def answer(self, request: BaseHTTPRequestHandler, path: str, body: bytes) -> None:
        writer = request.headers.get("Authorization") == f"Bearer {TOKEN}"

        def send(status: int, data: object = b"", error: str = "", **headers: object) -> None:
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            request.send_response(status)
            for name, value in {"Content-Length": len(data), **headers}.items():
                request.send_header(name.replace("_", "-"), str(value))
            if error:
                request.send_header("X-Error-Code", error)
            request.end_headers()
            if request.command != "HEAD":
                with contextlib.suppress(ConnectionError):
                    if request.command == "GET" and "/resolve/" in path and self.breaks:
                        request.wfile.write(data[: self.breaks.pop(0)])
                        request.wfile.flush()
                        request.connection.shutdown(2)
                        request.close_connection = True
                    else:
                        request.wfile.write(data)

        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if not writer:
                return send(401, {"error": "Invalid username or password."})
            if asked["organization"] == "others":
                return send(403, {"error": "You don't have the rights to create a model under this namespace"})
            if repo in self.repos:
                return send(409, {"url": f"{self.url}/{repo}"})
            self.add(repo, asked.get("visibility") == "private")
            return send(200, {"url": f"{self.url}/{repo}"})
        if path == "/api/validate-yaml":
            return send(200, {"errors": [], "warnings": []})
        if path.startswith("/lfs/"):
            self.stored[path.removeprefix("/lfs/")] = body
            return send(200)
        match = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+?)(\.git)?(?:/(.*))?", path)
        repo, rest = match[1], match[3] or ""
        own = self.repos.get(repo)
        if own is None or (own["private"] and not writer):
            return send(404 if writer else 401, {"error": "Repository not found"}, "RepoNotFound")
        if rest.startswith("resolve/"):
            _, revision, name = rest.split("/", 2)
            if own["gated"]:
                return send(403, {"error": "gated"}, "GatedRepo")
            commit = own["branches"].get(revision, revision)
            if commit not in own["commits"]:
                return send(404, {"error": "Invalid rev id"}, "RevisionNotFound")
            if name not in own["commits"][commit]:
                return send(404, {"error": "Entry not found"}, "EntryNotFound", X_Repo_Commit=commit)
            data = own["commits"][commit][name]
            etag = hashlib.sha256(data).hexdigest()
            headers = {"X_Repo_Commit": commit, "ETag": f'"{etag}"', "Accept_Ranges": "bytes"}
            if found := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")):
                start = int(found[1])
                headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                return send(206, data[start:], **headers)
            return send(200, data, **headers)
        if request.command == "GET" and not rest:
            return send(200, {"id": repo, "private": own["private"], "sha": own["branches"]["main"], "tags": []})
        if not writer:
            return send(401, {"error": "Unauthorized"})
        if rest.startswith("branch/"):
            branch = rest.removeprefix("branch/")
            if branch in own["branches"]:
                return send(409, {"error": "Reference already exists"})
            own["branches"][branch] = own["branches"]["main"]
            return send(200)
        if rest.startswith("preupload/"):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return send(200, {"files": files})
        if rest == "info/lfs/objects/batch":
            objects = [
                {**thing, "actions": {"upload": {"href": f"{self.url}/lfs/{thing['oid']}"}}}
                for thing in json.loads(body)["objects"]
            ]
            return send(200, {"transfer": "basic", "objects": objects})
        if rest.startswith("commit/"):
            files = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.stored[value["oid"]]
            oid = self.commit(repo, rest.removeprefix("commit/"), files)
            return send(200, {"commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}", "success": True})
        return send(404, {"error": f"nothing at {path}"})
