"""Repositories on the Hub as sources: byte ranges of files at one commit, through `huggingface_hub`'s own client."""

import threading
import time
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from ..models.weights_safetensors import CheckpointError
from .source import Store

_REQUEST_BYTES = 16 << 20  # of one answer, which is in memory beside the tensor that it becomes a part of
_HEAD_BYTES = 256 << 10  # fetched with a file's first bytes: most headers are shorter
_ATTEMPTS = 5
_SECONDS = 1.0  # before an answer that was too short is asked for again; doubled each time
_WAIT: dict[str, float] = {}  # the client's own waits, where they are to be others
# What the client raises when there is no answer. Which library it is made of changes with huggingface_hub's version,
# but its errors are among the bases of huggingface_hub's.
_CLIENT_ERRORS = (*HfHubHTTPError.__bases__, OfflineModeIsEnabled)


class HubStore(Store):
    """Files of a repository at one commit. Any number of threads may read."""

    def __init__(self, repo_id: str, commit: str, sizes: dict[str, int], hashes: dict[str, str], token: str | None):
        self.repo_id, self.commit, self.token = repo_id, commit, token
        self.sizes, self.hashes = sizes, hashes
        self.name = f"{repo_id}@{commit}"
        self.place = f"hub:{repo_id}@{commit[:12]}"
        self.heads: dict[str, bytes] = {}
        self.lock = threading.Lock()

    def files(self) -> dict[str, int]:
        return dict(self.sizes)

    def folders(self) -> list[str]:
        names = {name.partition("/")[0] for name in self.sizes if "/" in name}
        return sorted(name for name in names if not name.startswith("."))

    def read_file(self, filename: str) -> bytes:
        content = bytearray(self.sizes[filename])
        self.read_into(filename, 0, memoryview(content), "the file")
        return bytes(content)

    def identity(self, filename: str) -> dict[str, Any]:
        return {"size": self.sizes[filename], "sha256": self.hashes.get(filename)}  # and the commit, by the place

    def checksum(self, filename: str) -> str | None:
        return self.hashes.get(filename)

    def read_into(self, filename: str, begin: int, buffer: memoryview, what: str) -> None:
        end = begin + len(buffer)
        if begin < _HEAD_BYTES and filename.endswith(".safetensors"):
            head = self._head(filename)
            if end <= len(head):
                buffer[:] = head[begin:end]
                return
        for start in range(begin, end, _REQUEST_BYTES):
            stop = min(start + _REQUEST_BYTES, end)
            buffer[start - begin : stop - begin] = self._range(filename, start, stop, what)

    def _head(self, filename: str) -> bytes:
        with self.lock:
            head = self.heads.get(filename)
        if head is None:
            head = self._range(filename, 0, min(_HEAD_BYTES, self.sizes[filename]), "the header")
            with self.lock:
                self.heads[filename] = head
        return head

    def forget_heads(self) -> None:
        """Frees what was read ahead of headers."""
        with self.lock:
            self.heads = {}

    def _range(self, filename: str, begin: int, end: int, what: str) -> bytes:
        if begin >= end:
            return b""
        url = hf_hub_url(self.repo_id, filename, revision=self.commit)
        headers = {**build_hf_headers(token=self.token), "Range": f"bytes={begin}-{end - 1}"}
        # The answer is to be these bytes, not a compressed form of them.
        headers["Accept-Encoding"] = "identity"
        for attempt in range(_ATTEMPTS):
            try:
                answer = http_backoff("GET", url, headers=headers, max_retries=_ATTEMPTS, **_WAIT)
                hf_raise_for_status(answer)
            except _CLIENT_ERRORS as error:
                raise CheckpointError(f"{self.path(filename)}: {what} cannot be read: {error}") from error
            content = answer.content
            whole = answer.status_code == 200 and begin == 0 and end == self.sizes[filename]
            if answer.status_code != 206 and not whole:
                raise CheckpointError(f"{self.path(filename)}: the server answers no requests for ranges of bytes.")
            if len(content) == end - begin:
                return content
            time.sleep(min(2**attempt, 8) * _SECONDS)
        raise CheckpointError(f"{self.path(filename)}: {len(content)} of {end - begin} bytes of {what} arrived.")


def cached_snapshot(repo_id: str, revision: str | None = None) -> Path | None:
    """Folder of a repository in the Hub's cache, if `HF_HUB_OFFLINE` is set and there is one."""
    if not constants.HF_HUB_OFFLINE:
        return None
    try:
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def open_hub_store(repo_id: str, revision: str | None = None, token: str | None = None) -> HubStore:
    """The files of a repository, at the commit that the revision names now.

    Raises:
        CheckpointError: where there is no such folder and no such repository, or it cannot be reached.
    """
    try:
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, token=token)
    except (*_CLIENT_ERRORS, HFValidationError) as error:
        raise CheckpointError(f"{repo_id}: is no folder, and no repository that can be read: {error}") from error
    sizes, hashes = {}, {}
    for sibling in info.siblings or []:
        sizes[sibling.rfilename] = sibling.size or 0
        if sibling.lfs is not None:
            hashes[sibling.rfilename] = sibling.lfs.sha256
    return HubStore(repo_id, info.sha, sizes, hashes, token)
