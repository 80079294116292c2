"""A stand-in for the Hub's HTTP interface, as far as pushing, reading and listing models needs it.

It keeps repositories in memory and answers `huggingface_hub`'s own client: create, preupload, LFS batch, single and
multi-part upload, commit, branches, info, tree, and files with byte ranges. It counts what was asked and can be told to
fail, so that tests see interrupted and refused uploads.

    with HubServer() as server:
        server.use(monkeypatch)             # this process
        subprocess.run(..., env=server.environment(tmp_path))  # another one
"""

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_test_token"
LICENCES = ("apache-2.0", "mit", "other")  # some of the Hub's
LFS_PATTERNS = (".safetensors", ".bin", "tokenizer.json")


@dataclass
class File:
    """Content of a file in a commit, and whether it is kept as a large one."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """As git names blobs; of large files that of the pointer, which nobody looks at."""
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repository:
    """Branches, and files by commit."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        oid = hashlib.sha1(f"{branch}{len(self.commits)}{sorted(files)}{time.time_ns()}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, File]]:
        """Commit and files of a branch or commit; raises `KeyError`."""
        oid = self.branches.get(revision, revision)
        return oid, self.commits[oid]


@dataclass
class Fault:
    """How requests of a kind fail: with an error answer, a lost connection (status 0) or after a wait."""

    method: str
    path: str
    status: int
    times: int
    skip: int = 0
    seconds: float = 0.0
    message: str = "told to fail"


@dataclass
class Request:
    method: str
    path: str
    status: int = 0
    received: int = 0
    sent: int = 0
    range: str | None = None


class Refusal(Exception):
    """An error answer."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HubServer:
    """The server and what it holds. `part_size`: uploads larger than that are asked for in parts."""

    def __init__(self, part_size: int | None = None, token: str = TOKEN):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.part_size, self.token = part_size, token
        self.lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    # --- for tests ---

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Environment of a process that takes this for the Hub, logged in, with a cache of its own."""
        values = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            **more,
        }
        offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        return {**{key: value for key, value in os.environ.items() if key not in offline}, **values}

    def use(self, monkeypatch, home: Path) -> None:
        """Makes the client of this process take this for the Hub; its constants are read when it is imported."""
        from huggingface_hub import constants

        monkeypatch.setenv("HF_TOKEN", self.token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        # Newer releases of Transformers keep a client, which knows the constants of when it was made.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)

    def add(self, repo: str, files: dict[str, bytes], private: bool = False, branch: str = "main") -> str:
        """Puts files into a repository, as a commit; returns the commit."""
        with self.lock:
            repository = self.repositories.setdefault(repo, Repository(private))
            before = repository.commits.get(repository.branches.get(branch, ""), {})
            added = {name: File(data, name.endswith(LFS_PATTERNS)) for name, data in files.items()}
            self.objects |= {file.sha256: file.data for file in added.values() if file.lfs}
            return repository.commit(branch, {**before, **added}, "added")

    def add_folder(self, repo: str, folder: Path, **options) -> str:
        """The files of a folder as a repository."""
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        return self.add(repo, {name: path.read_bytes() for name, path in files.items()}, **options)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Names and content of the files of a revision."""
        return {name: file.data for name, file in self.repositories[repo].at(revision)[1].items()}

    def fail(self, method: str, path: str, status: int, times: int = 10**9, **more) -> None:
        """Lets requests of `method` whose path matches the pattern fail `times` times, after letting `skip` through."""
        self.faults.append(Fault(method, path, status, times, **more))

    def asked(self, method: str, path: str) -> list[Request]:
        """Requests that came, of a method and with a path that matches."""
        return [request for request in self.requests if request.method == method and re.search(path, request.path)]


class Handler(BaseHTTPRequestHandler):
    """One connection of the client."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    ROUTES: tuple[tuple[str, str, str], ...] = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>.+)", "branch"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>.+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>.+)", "commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>.+)", "paths"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<path>.*))?", "tree"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>.+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", "info"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "verify"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", "complete"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})(/(?P<part>\d+))?", "put"),
        ("HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.request_log = Request(self.command, unquote(url.path), range=self.headers.get("Range"))
        with self.hub.lock:
            self.hub.requests.append(self.request_log)
        self.body = self.read_body()
        self.request_log.received = len(self.body)
        try:
            if self.fault():
                return
            for method, pattern, name in self.ROUTES:
                found = re.fullmatch(pattern, url.path)
                if method == self.command and found:
                    arguments = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                    with self.hub.lock:
                        reply = getattr(self, name)(**arguments)
                    return self.send(*reply)
            raise Refusal(404, f"no such address: {self.command} {url.path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.send(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while length := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def fault(self) -> bool:
        with self.hub.lock:
            path = self.request_log.path
            hits = [f for f in self.hub.faults if f.method == self.command and re.search(f.path, path) and f.times > 0]
            fault = hits[0] if hits else None
            if fault and fault.skip > 0:
                fault.skip, fault = fault.skip - 1, None
            if fault:
                fault.times -= 1
        if fault is None:
            return False
        if fault.seconds:
            time.sleep(fault.seconds)
            return False
        if fault.status == 0:
            self.close_connection = True
            self.connection.close()
            return True
        raise Refusal(fault.status, fault.message)

    def send(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None, length: int | None = None):
        self.request_log.status, self.request_log.sent = status, len(data)
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # --- who may what ---

    def logged_in(self) -> bool:
        given = self.headers.get("Authorization")
        if given and given != f"Bearer {self.hub.token}":
            raise Refusal(401, "Invalid username or password.")
        return given is not None

    def writer(self) -> None:
        if not self.logged_in():
            raise Refusal(401, "Invalid username or password.")

    def repository(self, repo: str) -> Repository:
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not self.logged_in()):
            self.logged_in()
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return found

    def revision(self, repo: str, revision: str) -> tuple[str, dict[str, File]]:
        try:
            return self.repository(repo).at(revision)
        except KeyError:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None

    # --- addresses ---

    def create(self):
        self.writer()
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        reply = {"url": f"{self.hub.url}/{repo}", "name": repo}
        if repo in self.hub.repositories:
            return 409, json.dumps({"error": "You already created this model repo", **reply}).encode()
        private = wanted.get("private", False) or wanted.get("visibility") == "private"
        repository = self.hub.repositories[repo] = Repository(private)
        repository.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        return 200, json.dumps(reply).encode()

    def validate(self):
        content = json.loads(self.body)["content"]
        metadata = content.startswith("---\n")
        stated = re.search(r"^license: (.*)$", content, re.MULTILINE)
        if stated and stated[1] not in LICENCES:
            problem = f'"license" must be one of [{", ".join(LICENCES)}]'
            return 400, json.dumps({"errors": [{"message": problem}], "warnings": []}).encode()
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata"}]
        return 200, json.dumps({"errors": [], "warnings": warnings}).encode()

    def whoami(self):
        self.writer()
        return 200, json.dumps({"name": "me", "type": "user", "orgs": []}).encode()

    def branch(self, repo: str, revision: str):
        self.writer()
        repository = self.repository(repo)
        if revision in repository.branches:
            raise Refusal(409, f"Reference already exists: {revision}")
        repository.branches[revision] = repository.branches["main"]
        return 200, b"{}"

    def preupload(self, repo: str, revision: str):
        self.writer()
        _, files = self.revision(repo, revision)
        reply = []
        for entry in json.loads(self.body)["files"]:
            name, present = entry["path"], files.get(entry["path"])
            large = name.endswith(LFS_PATTERNS) or entry["size"] > 10 * 1024 * 1024
            oid = {} if present is None else {"oid": present.sha256 if present.lfs else present.oid}
            reply.append({"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **oid})
        return 200, json.dumps({"files": reply}).encode()

    def batch(self, repo: str):
        self.writer()
        self.repository(repo)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            oid, size = entry["oid"], entry["size"]
            reply = {"oid": oid, "size": size}
            address = f"{self.hub.url}/lfs/{oid}"
            if oid not in self.hub.objects:
                upload = {"href": address}
                if self.hub.part_size and size > self.hub.part_size:
                    count = -(-size // self.hub.part_size)
                    parts = {str(number): f"{address}/{number}" for number in range(1, count + 1)}
                    upload = {"href": f"{address}/complete", "header": {"chunk_size": str(self.hub.part_size), **parts}}
                reply["actions"] = {"upload": upload, "verify": {"href": f"{address}/verify"}}
            objects.append(reply)
        return 200, json.dumps({"transfer": "basic", "objects": objects}).encode()

    def put(self, oid: str, part: str | None = None):
        if part is not None:
            self.hub.parts[oid, int(part)] = self.body
            return 200, b"", {"ETag": f'"{hashlib.sha256(self.body).hexdigest()[:16]}"'}
        self.keep(oid, self.body)
        return 200, b""

    def complete(self, oid: str):
        numbers = [entry["partNumber"] for entry in json.loads(self.body)["parts"]]
        self.keep(oid, b"".join(self.hub.parts.pop((oid, number)) for number in numbers))
        return 200, b"{}"

    def keep(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, "the content is not that of the checksum")
        self.hub.objects[oid] = data

    def verify(self, oid: str):
        if len(self.hub.objects.get(oid, b"")) != json.loads(self.body)["size"]:
            raise Refusal(400, "the object is not there")
        return 200, b"{}"

    def commit(self, repo: str, revision: str):
        self.writer()
        repository = self.repository(repo)
        parent, files = self.revision(repo, revision)
        files, message = dict(files), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif entry["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = File(self.hub.objects[value["oid"]], True)
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"unknown operation {entry['key']}")
        oid = repository.commit(revision, files, message)
        address = f"{self.hub.url}/{repo}/commit/{oid}"
        return 200, json.dumps({"commitUrl": address, "commitOid": oid, "success": True}).encode()

    def info(self, repo: str, revision: str = "main"):
        repository = self.repository(repo)
        oid, files = self.revision(repo, revision)
        reply = {
            "_id": "0" * 24,
            "id": repo,
            "modelId": repo,
            "author": repo.split("/")[0],
            "sha": oid,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [self.sibling(name, file) for name, file in sorted(files.items())],
        }
        return 200, json.dumps(reply).encode()

    def sibling(self, name: str, file: File) -> dict:
        entry = {"rfilename": name}
        if "blobs" in self.query:
            entry |= {"size": len(file.data), "blobId": file.oid}
            entry |= {"lfs": {"sha256": file.sha256, "size": len(file.data), "pointerSize": 135}} if file.lfs else {}
        return entry

    def refs(self, repo: str):
        branches = self.repository(repo).branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches]
        return 200, json.dumps({"branches": listed, "tags": [], "converts": []}).encode()

    def entry(self, name: str, file: File) -> dict:
        entry = {"type": "file", "path": name, "size": len(file.data), "oid": file.oid}
        if file.lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": 135}
        return entry

    def tree(self, repo: str, revision: str, path: str = ""):
        _, files = self.revision(repo, revision)
        below = {name: file for name, file in sorted(files.items()) if not path or name.startswith(f"{path}/")}
        folders = {str(parent) for name in below for parent in Path(name).parents if str(parent) != "."}
        recursive = self.query.get("recursive", "").lower() == "true"
        depth = path.count("/") + 1 if path else 0
        listed: Iterable[dict] = [
            *({"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)),
            *(self.entry(name, file) for name, file in below.items()),
        ]
        return 200, json.dumps([entry for entry in listed if recursive or entry["path"].count("/") == depth]).encode()

    def paths(self, repo: str, revision: str):
        _, files = self.revision(repo, revision)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            wanted = json.loads(self.body)["paths"]
        else:
            wanted = parse_qs(self.body.decode())["paths"]
        return 200, json.dumps([self.entry(name, files[name]) for name in wanted if name in files]).encode()

    def resolve(self, repo: str, revision: str, path: str):
        oid, files = self.revision(repo, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        file = files[path]
        etag = f'"{file.sha256 if file.lfs else file.oid}"'
        headers = {"X-Repo-Commit": oid, "ETag": etag, "Accept-Ranges": "bytes"}
        headers |= {"Content-Type": "application/octet-stream"}
        if file.lfs:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(file.data))}
        data, status = file.data, 200
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if wanted and any(wanted.groups()):
            first = int(wanted[1]) if wanted[1] else max(len(data) - int(wanted[2]), 0)
            last = min(int(wanted[2]), len(data) - 1) if wanted[1] and wanted[2] else len(data) - 1
            if first >= len(data):
                headers["Content-Range"] = f"bytes */{len(data)}"
                return 416, b"", headers
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        return status, data, headers, len(data)
