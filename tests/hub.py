"""A Hub on the loopback interface: the endpoints that huggingface_hub asks for, kept in memory."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


TOKEN = "hf_good"


@dataclass
class Repository:
    """Files as they were after every commit, and branches by name."""

    snapshots: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    branches: dict[str, int] = field(default_factory=lambda: {"main": 0})
    is_private: bool = False
    is_gated: bool = False

    @property
    def files(self) -> dict[str, bytes]:
        """Those of main."""
        return self.snapshots[self.branches["main"]]


class LoopbackHub:
    """
    Repositories by name. Writing needs the token `hf_good`; large files come through LFS.

    Attributes:
        broken: Paths that start with one of these are answered by closing the connection.
        requests: Every request's method and path.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.broken: list[str] = []
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self, status: int, body=b"", **headers):
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def is_broken(self) -> bool:
                hub.requests.append(f"{self.command} {self.path}")
                if any(self.path.startswith(path) for path in hub.broken):
                    self.close_connection = True
                    self.connection.close()
                    return True
                return False

            def may(self, name: str | None = None, is_write: bool = False) -> bool:
                """Whether the request's token is good enough; answers if not."""
                is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                if is_write and not is_known:
                    self.answer(401, {"error": "Invalid username or password."})
                    return False
                if name is None:
                    return True
                if is_write and not name.startswith("user/"):
                    self.answer(403, {"error": f"You don't have the rights to write to {name}"})
                    return False
                repository = hub.repositories.get(name)
                if repository is None or (repository.is_private and not is_known):
                    status = 404 if is_known else 401
                    self.answer(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                    return False
                return True

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.is_broken():
                    return None
                if self.path.startswith("/api/validate-yaml"):
                    return self.answer(200, {"errors": [], "warnings": []})
                if self.path == "/api/repos/create":
                    values = json.loads(body)
                    name = "/".join(filter(None, [values.get("organization", "user"), values["name"]]))
                    if not self.may(is_write=True):
                        return None
                    if not name.startswith("user/"):
                        return self.answer(403, {"error": f"You don't have the rights to create {name}"})
                    if name in hub.repositories:
                        about = {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}
                        return self.answer(409, about)
                    is_private = bool(values.get("private")) or values.get("visibility") == "private"
                    hub.repositories[name] = Repository(is_private=is_private)
                    return self.answer(200, {"url": f"{hub.url}/{name}", "id": name})
                if match := re.match(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.path):
                    if not self.may(match[1], is_write=True):
                        return None
                    asked = json.loads(body)["objects"]
                    actions = [
                        item | {"actions": {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}} for item in asked
                    ]
                    return self.answer(200, {"transfer": "basic", "objects": actions})
                match = re.match(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/([^/?]+)", self.path)
                name, action, revision = match.groups()
                if not self.may(name, is_write=True):
                    return None
                repository = hub.repositories[name]
                if action == "branch":
                    repository.branches[revision] = repository.branches["main"]
                    return self.answer(200, {})
                if revision not in repository.branches:
                    return self.answer(404, {"error": "no such branch"}, X_Error_Code="RevisionNotFound")
                if action == "preupload":
                    files = [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                            "shouldIgnore": False,
                            "oid": None,
                        }
                        for file in json.loads(body)["files"]
                    ]
                    return self.answer(200, {"files": files})
                new = dict(repository.snapshots[repository.branches[revision]])
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        new[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                    elif entry["key"] == "lfsFile":
                        new[entry["value"]["path"]] = hub.objects[entry["value"]["oid"]]
                repository.snapshots.append(new)
                repository.branches[revision] = len(repository.snapshots) - 1
                sha = hub.sha(name, revision)
                return self.answer(200, {"commitUrl": f"{hub.url}/{name}/commit/{sha}", "commitOid": sha})

            def do_PUT(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.is_broken():
                    return None
                oid = self.path.removeprefix("/lfs/")
                if hashlib.sha256(body).hexdigest() != oid:
                    return self.answer(400, {"error": "wrong content"})
                hub.objects[oid] = body
                return self.answer(200)

            def do_GET(self):
                if self.is_broken():
                    return None
                if match := re.match(r"/api/models/([^/]+/[^/?]+)(?:/revision/([^/?]+))?(\?|$)", self.path):
                    name, revision = match[1], match[2] or "main"
                    if not self.may(name):
                        return None
                    files = hub.files(name, revision)
                    if files is None:
                        return self.answer(404, {}, X_Error_Code="RevisionNotFound")
                    siblings = [{"rfilename": file} for file in files]
                    about = {"id": name, "sha": hub.sha(name, revision), "siblings": siblings, "private": False}
                    return self.answer(200, about)
                if match := re.match(r"/api/models/([^/]+/[^/]+)/tree/([^/?]+)(\?|$)", self.path):
                    name, revision = match[1], match[2]
                    if not self.may(name):
                        return None
                    files = hub.files(name, revision)
                    if files is None:
                        return self.answer(404, {}, X_Error_Code="RevisionNotFound")
                    tags = {file: hashlib.sha1(content).hexdigest() for file, content in files.items()}
                    return self.answer(
                        200,
                        [
                            {"type": "file", "path": file, "size": len(content), "oid": tags[file]}
                            for file, content in files.items()
                        ],
                    )
                if match := re.match(r"/api/models/([^/]+/[^/]+)/tree/", self.path):
                    return self.answer(404, {}, X_Error_Code="EntryNotFound")
                match = re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)", self.path)
                if match is None:
                    return self.answer(404, {}, X_Error_Code="RepoNotFound")
                name, revision, file = match.groups()
                if not self.may(name):
                    return None
                if hub.repositories[name].is_gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.answer(403, {"error": "Access is restricted"}, X_Error_Code="GatedRepo")
                files = hub.files(name, revision)
                if files is None:
                    return self.answer(404, {}, X_Error_Code="RevisionNotFound")
                sha = hub.sha(name, revision)
                if file not in files:
                    return self.answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
                tag = hashlib.sha1(files[file]).hexdigest()
                return self.answer(200, files[file], ETag=f'"{tag}"', X_Repo_Commit=sha)

            do_HEAD = do_GET  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def sha(self, name: str, revision: str = "main") -> str:
        """The commit that a branch or a commit's own name stands for."""
        repository = self.repositories[name]
        number = repository.branches.get(revision)
        return revision if number is None else hashlib.sha1(f"{name}{number}".encode()).hexdigest()

    def files(self, name: str, revision: str) -> dict[str, bytes] | None:
        """Files at a branch or commit; `None` if there is no such."""
        repository = self.repositories[name]
        if revision in repository.branches:
            return repository.snapshots[repository.branches[revision]]
        shas = {hashlib.sha1(f"{name}{n}".encode()).hexdigest(): n for n in range(len(repository.snapshots))}
        return repository.snapshots[shas[revision]] if revision in shas else None

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
