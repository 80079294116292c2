"""Repositories as sources: huggingface_hub's own client against a local stand-in for the Hub's HTTP interface."""

import hashlib
import http.server
import json
import re
import shutil
import threading
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from hf_moe.conversion import hub_store
from hf_moe.conversion.plan import Plan, copy_group
from hf_moe.conversion.quantization import plan_bf16
from hf_moe.conversion.run import convert
from hf_moe.conversion.source import open_source
from hf_moe.models.weights_safetensors import CheckpointError

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    """`GET /api/models/ID/revision/REVISION` and ranges of `GET /ID/resolve/COMMIT/FILE`."""

    def do_GET(self):
        server, path = self.server, self.path.split("?")[0]
        info = re.fullmatch(r"/api/models/org/model(/revision/(main|[0-9a-f]{40}))?", path)
        resolve = re.fullmatch(rf"/org/model/resolve/{COMMIT}/(.+)", path)
        if info:
            self.answer(200, json.dumps(self.describe()).encode())
        elif resolve and (server.folder / resolve[1]).is_file():
            content = (server.folder / resolve[1]).read_bytes()
            begin, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
            server.ranges.append((resolve[1], begin, end + 1))
            failure = server.failures.pop() if server.failures and begin else None
            if failure == "ignores ranges":
                self.answer(200, content)
            elif failure == "cut off":
                self.answer(206, content[begin : end + 1], cut=True)
            elif failure:
                self.answer(failure, b"busy")
            else:
                self.answer(206, content[begin : end + 1])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if "api" in path else "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def describe(self):
        """What the Hub says of a repository."""
        siblings = []
        for path in sorted(self.server.folder.rglob("*")):
            if path.is_file():
                content = path.read_bytes()
                sibling = {"rfilename": str(path.relative_to(self.server.folder)), "size": len(content)}
                if path.suffix == ".safetensors":
                    digest = hashlib.sha256(content).hexdigest()
                    sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
                siblings.append(sibling)
        return {"id": "org/model", "modelId": "org/model", "sha": COMMIT, "siblings": siblings, "tags": []}

    def answer(self, status, content, cut=False):
        """Sends a body, or half of the one that was promised."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    def log_message(self, *arguments):
        """Silent."""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server with a copy of a golden, whose folder, failures and requests a test can see."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder = tmp_path / "repository"
    shutil.copytree(GOLDENS / "v3_fp8", server.folder, ignore=shutil.ignore_patterns("expected*"))
    (server.folder / "tokenizer.json").write_text("{}")
    server.ranges, server.failures = [], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    template = huggingface_hub.constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_store, "_HEAD_BYTES", 60_000)
    monkeypatch.setattr(hub_store, "_SECONDS", 0.01)
    yield server
    server.shutdown()
    server.server_close()


def weights(folder):
    """Bytes of the weight files and the carried ones."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "conversion.json"}


def test_a_repository_gives_what_a_folder_gives(hub, tmp_path):
    opened = open_source("org/model")
    summary = convert(opened, plan_bf16(opened), tmp_path / "hub", workers=4, progress=False)
    local = open_source(hub.folder)
    convert(local, plan_bf16(local), tmp_path / "local", progress=False)
    assert weights(tmp_path / "hub") == weights(tmp_path / "local")
    described = summary.manifest["steps"][0]["source"]
    assert described["name"] == f"org/model@{COMMIT}"
    digest = hashlib.sha256((hub.folder / "model.safetensors").read_bytes()).hexdigest()
    assert described["files"]["model.safetensors"]["sha256"] == digest


def test_only_the_bytes_that_are_needed_are_read(hub, tmp_path):
    opened = open_source("org/model", revision="main")
    headers = sum(end - begin for name, begin, end in hub.ranges if name == "model.safetensors")
    assert headers <= 60_000
    hub.ranges.clear()
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    assert opened.entries[name].read().shape == (72, 192)
    assert opened.entries[name].read_rows(10, 12).shape == (2, 192)
    entry = opened.entries[name]
    expected = [(entry.begin, entry.begin + entry.nbytes), (entry.begin + 10 * 192, entry.begin + 12 * 192)]
    assert [(begin, end) for _, begin, end in hub.ranges] == expected
    hub.ranges.clear()
    plan = Plan("one tensor", [copy_group(opened, name)], opened.config, carried=())
    convert(opened, plan, tmp_path / "out", progress=False)
    assert sum(end - begin for file, begin, end in hub.ranges if file == "model.safetensors") == entry.nbytes


@pytest.mark.parametrize("failure", [503, 429, "cut off"])
def test_failing_answers_are_asked_for_again(hub, failure, tmp_path, monkeypatch):
    opened = open_source("org/model")
    hub.failures.extend([failure] * 2)
    entry = opened.entries["lm_head.weight"]
    monkeypatch.setattr(hub_store, "_WAIT", {"base_wait_time": 0.01, "max_wait_time": 0.02})
    content = (hub.folder / "model.safetensors").read_bytes()[entry.begin : entry.begin + entry.nbytes]
    assert entry.read().view(torch.uint8).numpy().tobytes() == content
    assert not hub.failures


@pytest.mark.parametrize(
    ("failure", "message"), [("ignores ranges", "answers no requests for ranges"), (403, "cannot be read")]
)
def test_answers_that_do_not_help_are_errors(hub, failure, message):
    opened = open_source("org/model")
    hub.failures.append(failure)
    with pytest.raises(CheckpointError, match=rf"hub:org/model@0123456789ab/model.safetensors: .*{message}"):
        opened.entries["lm_head.weight"].read()


def test_a_repository_that_is_not_there(hub):
    with pytest.raises(CheckpointError, match="org/other: is no folder, and no repository that can be read"):
        open_source("org/other")


def test_a_broken_repository_is_refused_like_a_folder(hub):
    path = hub.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="hub:org/model@0123456789ab/model.safetensors: truncated"):
        open_source("org/model")


def test_without_a_network_the_cache_is_read(tmp_path, monkeypatch):
    """`models--ORG--NAME/snapshots/COMMIT/FILE` are links to `blobs/`, as `huggingface_hub` lays them out."""
    cache = tmp_path / "hub" / "models--org--model"
    snapshot = cache / "snapshots" / COMMIT
    for folder in (snapshot, cache / "blobs", cache / "refs"):
        folder.mkdir(parents=True)
    (cache / "refs" / "main").write_text(COMMIT)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDENS / "v3_basic" / name, cache / "blobs" / f"blob-{name}")
        (snapshot / name).symlink_to(f"../../blobs/blob-{name}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    source = open_source("org/model")
    assert source.name == f"org/model@{COMMIT}"
    with pytest.raises(CheckpointError, match="org/other.*offline"):
        open_source("org/other")
