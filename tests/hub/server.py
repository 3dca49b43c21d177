"""A small Hub for tests: the endpoints that huggingface_hub calls to create, push, pull and guard model repositories.

Everything lives in memory and is served over HTTP on loopback. Files named in ``LFS`` go the LFS way (batch, PUT,
commit by hash), all others come inline in the commit. ``faults`` makes chosen requests fail.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".bin")
OWNER_TOKEN = "token-of-me"  # what the owner of every repository shows
OTHER_TOKEN = "token-of-someone-else"


@dataclass
class Repo:
    """Branches point at commits; a commit is a whole tree."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def tree(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None

    def commit(self, branch: str, tree: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(tree)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = tree, sha
        return sha


@dataclass
class Fault:
    """The next ``times`` requests with this method and path get this status; 0 cuts the connection."""

    method: str
    path: str
    status: int
    times: int = 1


class HubServer:
    """Serves on a free port of 127.0.0.1 from ``start`` to ``stop``."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        hub = self
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def start(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repos[repo].tree(revision)
        assert found is not None, f"{repo} has no revision {revision}"
        return found[1]


def oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request. Routes are (method, pattern, function); the first match counts."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    routes: list[tuple[str, re.Pattern[str], Callable]] = []

    def log_message(self, *args: object) -> None:
        pass

    def handle_any(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, path):
                fault.times -= 1
                if fault.status:
                    return self.reply(fault.status, {"error": "made to fail"})
                self.close_connection = True
                return self.connection.close()
        for method, pattern, function in self.routes:
            if method == self.command and (match := pattern.fullmatch(path)):
                return function(self, **match.groupdict())
        return self.reply(404, {"error": f"no route {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def reply(self, status: int, content: object = b"", **headers: str) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(raw))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def readable(self, name: str, files: bool = True) -> Repo | None:
        """The repository, or None once a refusal has been sent, as the Hub does it.

        To a stranger a private repository looks as if it were not there. A gated one can be seen, not downloaded.
        """
        repo, token = self.hub.repos.get(name), self.token()
        if repo is None or (repo.private and token != OWNER_TOKEN):
            status = 401 if token is None else 404
            self.reply(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        if repo.gated and files and token != OWNER_TOKEN:
            status = 401 if token is None else 403
            self.reply(status, {"error": "Access is restricted"}, X_Error_Code="GatedRepo")
            return None
        return repo

    def writable(self, name: str) -> Repo | None:
        if self.token() == OWNER_TOKEN:
            return self.readable(name)
        self.reply(401 if self.token() is None else 403, {"error": "You may not write here"})
        return None

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if self.token() != OWNER_TOKEN:
            return self.reply(401 if self.token() is None else 403, {"error": "You may not create here"})
        if name in self.hub.repos:
            return self.reply(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        repo = self.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit("main", {})
        return self.reply(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def whoami(self) -> None:
        known = self.token() == OWNER_TOKEN
        self.reply(200 if known else 401, {"name": "me", "type": "user", "orgs": []} if known else {"error": "who?"})

    def yaml(self) -> None:
        self.reply(200, {"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        if self.writable(repo):
            modes = [
                {"path": path, "uploadMode": "lfs" if path.endswith(LFS) else "regular", "shouldIgnore": False}
                for path in (file["path"] for file in json.loads(self.body)["files"])
            ]
            self.reply(200, {"files": modes})

    def batch(self, repo: str) -> None:
        if self.writable(repo):
            objects = []
            for o in json.loads(self.body)["objects"]:
                upload = {"actions": {"upload": {"href": f"{self.hub.url}/objects/{o['oid']}"}}}
                objects.append(o if o["oid"] in self.hub.objects else o | upload)
            self.reply(200, {"transfer": "basic", "objects": objects})

    def put(self, sha256: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            return self.reply(422, {"error": "wrong hash"})
        self.hub.objects[sha256] = self.body
        return self.reply(200)

    def commit(self, repo: str, revision: str) -> None:
        target = self.writable(repo)
        if target is None:
            return None
        base = target.tree(revision)
        if base is None:
            return self.reply(404, {"error": "no such branch"}, X_Error_Code="RevisionNotFound")
        tree = dict(base[1])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.reply(400, {"error": f"{value['path']} was never uploaded"})
                tree[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                tree.pop(value["path"], None)
        sha = target.commit(revision, tree)
        url = f"{self.hub.url}/{repo}/commit/{sha}"
        return self.reply(200, {"success": True, "commitOid": sha, "commitUrl": url, "pullRequestUrl": None})

    def settings(self, repo: str) -> None:
        target = self.writable(repo)
        if target is not None:
            target.gated = bool(json.loads(self.body).get("gated"))
            self.reply(200, {})

    def order_faults(self) -> None:
        """What the Hub does not have: the client under test says what shall fail next."""
        self.hub.faults = [Fault(**fault) for fault in json.loads(self.body)]
        self.reply(200)

    def branch(self, repo: str, revision: str) -> None:
        target = self.writable(repo)
        if target is not None:
            target.branches.setdefault(revision, target.branches["main"])
            self.reply(200, {})

    def info(self, repo: str, revision: str = "main") -> None:
        target = self.readable(repo, files=False)
        if target is None:
            return None
        found = target.tree(revision)
        if found is None:
            return self.reply(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        siblings = [{"rfilename": path} for path in found[1]]
        facts = {"id": repo, "modelId": repo, "sha": found[0], "private": target.private, "gated": target.gated}
        return self.reply(200, {**facts, "siblings": siblings, "tags": [], "downloads": 0})

    def listing(self, repo: str, revision: str) -> None:
        target = self.readable(repo)
        found = target and target.tree(revision)
        if found:
            self.reply(200, [{"type": "file", "path": p, "size": len(c), "oid": oid(c)} for p, c in found[1].items()])
        elif target is not None:
            self.reply(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")

    def resolve(self, repo: str, revision: str, path: str) -> None:
        target = self.readable(repo)
        if target is None:
            return None
        found = target.tree(revision)
        if found is None:
            return self.reply(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        sha, tree = found
        if path not in tree:
            return self.reply(404, {"error": "no such file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        content = tree[path]
        etag = hashlib.sha256(content).hexdigest() if path.endswith(LFS) else oid(content)
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        if path.endswith(LFS):
            headers |= {"X_Linked_Etag": f'"{etag}"', "X_Linked_Size": str(len(content))}
        return self.reply(200, content, **headers)


REPO, REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
Handler.routes = [
    (method, re.compile(pattern), function)
    for method, pattern, function in (
        ("POST", "/api/repos/create", Handler.create),
        ("GET", "/api/whoami-v2", Handler.whoami),
        ("POST", "/api/validate-yaml", Handler.yaml),
        ("POST", f"/api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
        ("POST", f"/{REPO}\\.git/info/lfs/objects/batch", Handler.batch),
        ("PUT", "/objects/(?P<sha256>[0-9a-f]{64})", Handler.put),
        ("POST", f"/api/models/{REPO}/commit/{REVISION}", Handler.commit),
        ("POST", f"/api/models/{REPO}/branch/{REVISION}", Handler.branch),
        ("PUT", f"/api/models/{REPO}/settings", Handler.settings),
        ("POST", "/tests/faults", Handler.order_faults),
        ("GET", f"/api/models/{REPO}", Handler.info),
        ("GET", f"/api/models/{REPO}/revision/{REVISION}", Handler.info),
        ("GET", f"/api/models/{REPO}/tree/{REVISION}", Handler.listing),
        ("HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
        ("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
    )
]
