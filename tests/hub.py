"""A Hub on the loopback interface: the endpoints that huggingface_hub asks for small repositories, kept in memory."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LoopbackHub:
    """Repositories as `{repo_id: {file: bytes}}`; every commit replaces what it names."""

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, int] = {}
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

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path == "/api/repos/create":
                    values = json.loads(body)
                    name = "/".join(filter(None, [values.get("organization", "user"), values["name"]]))
                    hub.repositories.setdefault(name, {})
                    return self.answer(200, {"url": f"{hub.url}/{name}", "id": name})
                if self.path.startswith("/api/validate-yaml"):
                    return self.answer(200, {"errors": [], "warnings": []})
                match = re.match(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/", self.path)
                name = match[1]
                if match[2] == "preupload":
                    files = [
                        file | {"uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
                    ]
                    return self.answer(200, {"files": files})
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        hub.repositories[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                hub.commits[name] = hub.commits.get(name, 0) + 1
                commit = {"commitUrl": f"{hub.url}/{name}/commit/{hub.sha(name)}", "commitOid": hub.sha(name)}
                return self.answer(200, commit)

            def do_GET(self):
                if match := re.match(r"/api/models/([^/]+/[^/?]+)(/revision/[^/?]+)?(\?|$)", self.path):
                    name = match[1]
                    if name not in hub.repositories:
                        return self.answer(404, {}, X_Error_Code="RepoNotFound")
                    files = [{"rfilename": file} for file in hub.repositories[name]]
                    return self.answer(200, {"id": name, "sha": hub.sha(name), "siblings": files, "private": False})
                if match := re.match(r"/api/models/([^/]+/[^/]+)/tree/", self.path):
                    return self.answer(404, {}, X_Error_Code="EntryNotFound")
                match = re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)$", self.path)
                if match is None or match[1] not in hub.repositories:
                    return self.answer(404, {}, X_Error_Code="RepoNotFound")
                data = hub.repositories[match[1]].get(match[2])
                if data is None:
                    return self.answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=hub.sha(match[1]))
                tag = hashlib.sha1(data).hexdigest()
                return self.answer(200, data, ETag=f'"{tag}"', X_Repo_Commit=hub.sha(match[1]))

            do_HEAD = do_GET  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def sha(self, name: str) -> str:
        return hashlib.sha1(f"{name}{self.commits.get(name, 0)}".encode()).hexdigest()

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
