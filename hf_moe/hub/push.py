"""`hf-moe push`: a checkpoint folder to the Hub, with the code, the card and the licence that it needs there.

Nothing is written into the folder: what is added to it exists in memory. Large files go up first, a few at a time; one
commit at the end makes all of them visible at once, so that nobody ever downloads half a checkpoint. A push that was
interrupted is repeated as it was: files whose content the Hub has already are not sent again, with Xet not even chunks
of them. The way to the Hub is `huggingface_hub` alone.
"""

import fnmatch
import importlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import get_session, validate_repo_id
from yaml import YAMLError

from ..conversion.source import PICKLES
from ..units import bytes_text
from .bundle import PROCESSOR_FILES, code_bundle, knows_model_type
from .card import LICENCE_FILE, CardOptions, is_ours, known_licence, read_checkpoint, render_card
from .manifest import MANIFEST, with_manifest

README = "README.md"
# Left behind: what nobody should load, and what training leaves in a folder.
LEFT_FILES = (*PICKLES, ".part", ".tmp", ".incomplete", ".lock", ".pyc")
LEFT_FOLDERS = ("__pycache__", "checkpoint-*", "runs")
# Files that are a checkpoint together: what is left there of an earlier one would be loaded in place of the new one.
REPLACED = re.compile(r"model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors|model\d+-mp\d+\.\w+")
FILES_AT_ONCE = 5  # what the client sends side by side


class PushError(ValueError):
    """A push that was refused or failed; the message says what to do."""


@dataclass(frozen=True)
class PushOptions:
    """How to push.

    - `public`: whether the repository that is created is; a public one that exists is filled only if this is set.
    - `revision`: branch to push to, made where it is missing.
    - `code`: add the modules of the model. `card`: `None` writes a card where there is none but ours; `True` always.
    - `exclude`: patterns of names that stay behind.
    """

    public: bool = False
    revision: str | None = None
    message: str | None = None
    token: str | None = None
    code: bool = True
    card: bool | None = None
    exclude: tuple[str, ...] = ()
    about: CardOptions = field(default_factory=CardOptions)


@dataclass(frozen=True)
class Upload:
    """A file as it will be in the repository: a path of the folder, or bytes that are made for it."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def operation(self) -> CommitOperationAdd:
        """As the client takes it."""
        return CommitOperationAdd(self.name, self.content if isinstance(self.content, bytes) else str(self.content))


@dataclass
class Plan:
    """What a push will send, and what it will not. `card`: whether README.md is ours to write."""

    repo: str
    uploads: list[Upload]
    left: list[str]
    notes: list[str]
    card: bool

    @property
    def size(self) -> int:
        return sum(upload.size for upload in self.uploads)


def plan_push(folder: Path, repo: str, options: PushOptions = PushOptions()) -> Plan:
    """Reads the folder and makes what is added to it; the network is not asked.

    Raises:
        PushError, ValueError: for a bad name of a repository, a folder without `config.json`, links out of the folder,
            and a model that hf_moe has no code for.
    """
    check_repo(repo)
    if not (folder / "config.json").is_file():
        raise PushError(f"{folder} is no checkpoint folder: it has no config.json.")
    found, left = collect_files(folder, options.exclude)
    if "config.json" not in found:
        raise PushError(f"{folder / 'config.json'} would stay behind by --exclude, and nothing loads without it.")
    notes: list[str] = []
    made: dict[str, bytes] = {}
    checkpoint = read_checkpoint(folder, repo, code=_has_code(folder, options))
    if options.code and not checkpoint.ranks:
        small = {name: found[name].read_bytes() for name in ("config.json", *PROCESSOR_FILES) if name in found}
        made |= code_bundle(small, str(folder))
        replaced = [name for name in made if name.endswith(".py") and name in found]
        if any(found[name].read_bytes() != made[name] for name in replaced):
            notes.append("Modules of the folder that differ from those of this hf_moe are replaced by the latter.")
    card, card_note = _card_is_ours(folder, options)
    if card and not options.card and not knows_model_type(checkpoint.config):
        card, card_note = False, "There is no card for this model type."
    notes += [card_note] if card_note else []
    if not any(LICENCE_FILE.fullmatch(name) for name in found):
        licence = known_licence(checkpoint, options.about)
        if licence is not None:
            made["LICENSE"] = licence.read()
            checkpoint = replace(checkpoint, files=checkpoint.files | {"LICENSE"})
        elif not options.about.licence:
            notes.append("No licence is known: name the release with --base-model, or give --license.")
    if card:
        made[README] = render_card(checkpoint, options.about).encode("utf-8")
    if MANIFEST in found:  # its checksums are of the folder's files: let them be those of the repository's
        made = with_manifest(folder, made)
    uploads = [Upload(name, made.get(name, found.get(name))) for name in sorted({*found, *made})]
    return Plan(repo, uploads, left, notes, card)


def check_repo(repo: str) -> None:
    """Raises `PushError` unless `repo` is `owner/name` as the Hub allows it."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PushError(f"{repo!r} is no name of a repository: {error}") from error
    if "/" not in repo:
        raise PushError(f"{repo!r} lacks the owner: give owner/name.")


def _has_code(folder: Path, options: PushOptions) -> bool:
    if options.code:
        return True
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    modules = {str(value).rpartition("--")[2].split(".")[0] for value in (config.get("auto_map") or {}).values()}
    return bool(modules) and all((folder / f"{module}.py").is_file() for module in modules)


def _card_is_ours(folder: Path, options: PushOptions) -> tuple[bool, str]:
    """Whether the push writes README.md, and what the user should know about it."""
    path = folder / README
    if options.card is not None or not path.is_file():
        return options.card is not False, ""
    if is_ours(path.read_text(encoding="utf-8", errors="replace")):
        return True, ""
    return False, "README.md of the folder is kept as it is; --card replaces it by a card of ours."


def collect_files(folder: Path, exclude: Iterable[str] = ()) -> tuple[dict[str, Path], list[str]]:
    """Files to push by name in the repository, and names of those that are left behind.

    Raises:
        PushError: for a link that leads out of the folder (other than into the Hub cache that the folder belongs to).
    """
    found: dict[str, Path] = {}
    left: list[str] = []

    def excluded(relative: str) -> bool:
        names = (relative, relative.rpartition("/")[2])
        return any(fnmatch.fnmatch(name, pattern.rstrip("/")) for name in names for pattern in exclude)

    for root, folders, files in os.walk(folder):
        here = Path(root).relative_to(folder)
        for name in sorted(folders):
            if excluded((here / name).as_posix()):
                folders.remove(name)
                left.append(f"{(here / name).as_posix()}/")
            elif name.startswith(".") or any(fnmatch.fnmatch(name, pattern) for pattern in LEFT_FOLDERS):
                folders.remove(name)
                left += [] if name.startswith(".") or name == "__pycache__" else [f"{(here / name).as_posix()}/"]
            elif (folder / here / name).is_symlink():
                raise PushError(
                    f"{folder / here / name} is a link to a folder, which is not followed: copy it or --exclude it."
                )
        for name in sorted(files):
            relative = (here / name).as_posix()
            if excluded(relative):
                left.append(relative)
            elif name.startswith(".") and name != ".gitattributes":
                continue
            elif name.endswith(LEFT_FILES):
                left.append(relative)
            else:
                _check_link(folder, folder / here / name)
                found[relative] = folder / here / name
    return found, left


def _check_link(folder: Path, path: Path) -> None:
    root, real = folder.resolve(), path.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":  # of the Hub cache: snapshots/COMMIT/FILE is a link to blobs/HASH
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise PushError(f"{path} is a link out of its folder, to {real}: copy the file here.")


# --- the push ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pushed:
    """Where a push went: the repository's address, the commit, bytes that it holds, and whether anything changed."""

    url: str
    commit: str
    files: int
    size: int


def verify_before_push(folder: Path, progress: bool = False) -> None:
    """Raises `PushError` with the first problems that `hf-moe verify` finds in a folder."""
    from ..conversion.verify import verify_folder

    problems = verify_folder(folder, progress=progress).problems
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        told = "; ".join(str(problem).rstrip(".") for problem in problems[:3])
        raise PushError(f"{folder} is not pushed, since `hf-moe verify` rejects it: {told}{more}.")


def push(
    folder: Path,
    repo: str,
    options: PushOptions = PushOptions(),
    report: Callable[[str], None] = lambda line: None,
    plan: Plan | None = None,
    progress: bool = False,
) -> Pushed:
    """Verifies a folder and uploads it as one commit.

    `report` is given lines of what happens; `progress` shows on standard error how far the verification is.

    Raises:
        PushError: for a folder that `verify` rejects, and for every refusal or failure of the Hub.
    """
    plan = plan or plan_push(folder, repo, options)
    api = HfApi(token=options.token)
    with clear_errors(repo):  # a wrong token or licence should not show after hours of reading and sending weights
        exists = _look(api, repo, options, report)
        _check_card(api, plan)
    report(f"verifying {folder} ...")
    verify_before_push(folder, progress)
    with clear_errors(repo):
        if not exists:
            api.create_repo(repo, private=not options.public, exist_ok=True)
            report(f"created {repo} ({'public' if options.public else 'private'})")
        if options.revision not in (None, "main") and not options.revision.startswith("refs/"):
            api.create_branch(repo, branch=options.revision, exist_ok=True)
        uploads = [upload for upload in plan.uploads if not (upload.name == README and _theirs(api, plan, options))]
        if len(uploads) < len(plan.uploads):
            report("README.md of the repository was edited there, and is kept; --card replaces it.")
        operations = _upload_large(api, uploads, repo, options, report)
        operations += _remove_stale(api, plan, options, report)
        commit = api.create_commit(
            repo,
            operations,
            commit_message=options.message or f"Upload {plan.repo.rpartition('/')[2]} with hf-moe",
            revision=options.revision,
        )
    return Pushed(f"{api.endpoint}/{repo}", commit.oid, len(uploads), sum(upload.size for upload in uploads))


def _look(api: HfApi, repo: str, options: PushOptions, report: Callable[[str], None]) -> bool:
    """Whether the repository exists; refuses to fill a public one unless so told."""
    try:
        private = bool(api.repo_info(repo).private)
    except RepositoryNotFoundError as error:
        if getattr(getattr(error, "response", None), "status_code", 404) == 401:
            raise  # not "no such repository" but "no such token"
        return False
    if not private and not options.public:
        raise PushError(f"{repo} exists and is public, so that all would see the files: give --public if they may.")
    if private and options.public:
        report(f"{repo} exists and is private; it stays so. Its settings on the Hub can make it public.")
    return True


def _check_card(api: HfApi, plan: Plan) -> None:
    """Asks the Hub about the metadata of README.md, such as the licence, as it would itself before the commit."""
    content = next((upload.content for upload in plan.uploads if upload.name == README), None)
    if content is None:
        return
    text = (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8", errors="replace")
    try:
        ModelCard(text, ignore_metadata_errors=True)
        problems = _metadata_problems(api, text)
    except (ValueError, YAMLError) as error:
        problems = str(error)
    if problems:
        raise PushError(
            f"The Hub would refuse the metadata of README.md: {problems}. Give --license in the Hub's spelling, or "
            "mend the README.md of the folder."
        )


def _metadata_problems(api: HfApi, card: str) -> str:
    """What the Hub finds wrong with a card. `ModelCard.validate` asks huggingface.co, wherever the push goes, before
    huggingface_hub 2. Any answer but a refusal is left to the commit, which asks again."""
    body = {"content": card, "repoType": "model"}
    answer = get_session().post(f"{api.endpoint}/api/validate-yaml", json=body)
    errors = answer.json().get("errors", []) if answer.status_code == 400 else []
    return "; ".join(error["message"] for error in errors)


def _theirs(api: HfApi, plan: Plan, options: PushOptions) -> bool:
    """Whether the repository has a card that is not ours, and we were not told to replace it."""
    if not plan.card or options.card:
        return False
    if not api.file_exists(plan.repo, README, revision=options.revision):
        return False
    path = api.hf_hub_download(plan.repo, README, revision=options.revision)
    return not is_ours(Path(path).read_text(encoding="utf-8", errors="replace"))


def _remove_stale(api: HfApi, plan: Plan, options: PushOptions, report: Callable[[str], None]) -> list:
    """Takes weight files of an earlier checkpoint out of the repository, where its history keeps them."""
    sent = {upload.name for upload in plan.uploads}
    if not any(REPLACED.fullmatch(name) for name in sent):
        return []
    there = api.list_repo_files(plan.repo, revision=options.revision)
    stale = [name for name in there if REPLACED.fullmatch(name) and name not in sent and name not in plan.left]
    for name in stale:
        report(f"removed from the repository, as of an earlier checkpoint: {name}")
    return [CommitOperationDelete(name) for name in stale]


def _upload_large(
    api: HfApi, uploads: list[Upload], repo: str, options: PushOptions, report: Callable[[str], None]
) -> list[CommitOperationAdd]:
    """Sends the content of large files, smallest name first; returns the operations of the commit for all files."""
    operations, sent, total = [], 0, sum(upload.size for upload in uploads)
    started = time.monotonic()
    how = {"revision": options.revision, "num_threads": FILES_AT_ONCE, "free_memory": False}
    for batch in _batches(uploads):
        group = [upload.operation() for upload in batch]
        try:
            api.preupload_lfs_files(repo, group, **how)
        except (OSError, RuntimeError) as error:
            if isinstance(error, HfHubHTTPError) or not _xet_in_use():
                raise
            # Its storage is another server, which a firewall may not let through, and a mirror of the Hub may not have.
            report(f"Xet storage cannot be reached, so that files are sent whole: {error}")
            without_xet()
            group = [upload.operation() for upload in batch]
            api.preupload_lfs_files(repo, group, **how)
        operations += group
        sent += sum(upload.size for upload in batch)
        elapsed = max(time.monotonic() - started, 1e-3)
        left = (total - sent) / max(sent / elapsed, 1e-3)
        report(
            f"{len(operations)} of {len(uploads)} files, {bytes_text(sent)} of {bytes_text(total)}, "
            f"{bytes_text(sent / elapsed)}/s, {left:.0f} s left"
        )
    return operations


def without_xet() -> None:
    """Switches the client to plain uploads, until the process ends; it reads the switch at every upload."""
    constants.HF_HUB_DISABLE_XET = True


def _xet_in_use() -> bool:
    return not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None


def _batches(uploads: list[Upload]) -> Iterator[list[Upload]]:
    """Large files a few at a time, so that an interruption costs little; all small ones at the end."""
    large = [upload for upload in uploads if upload.size > 10 * 1024 * 1024 or upload.name.endswith(".safetensors")]
    small = [upload for upload in uploads if upload not in large]
    for start in range(0, len(large), FILES_AT_ONCE):
        yield large[start : start + FILES_AT_ONCE]
    if small:
        yield small


@contextmanager
def clear_errors(repo: str) -> Iterator[None]:
    """Turns what the client raises into one `PushError` that says what to do."""
    try:
        yield
    except PushError:
        raise
    except HfHubHTTPError as error:
        raise PushError(explain(error, repo)) from error
    except RuntimeError as error:  # of one file among several: the reason stands behind it
        reason = error.__cause__
        if isinstance(reason, HfHubHTTPError):
            raise PushError(f"{error} {explain(reason, repo)}") from error
        raise PushError(f"{error} {reason or ''} What was sent is kept: run the same command again.") from error
    except (OSError, ValueError, _network_error()) as error:
        raise PushError(f"the push to {repo} failed: {error}. Run the same command again to go on.") from error


def _network_error() -> type[Exception]:
    """What the client's HTTP library raises without an answer; which library that is depends on the release."""
    return importlib.import_module(type(get_session()).__module__.partition(".")[0]).HTTPError


ADVICE = {
    401: "the token is missing or not valid: log in with `hf auth login`, or give --token",
    403: "the token may not write there: use one with write access to this owner",
    404: "there is no such repository or branch, or the token may not see it",
    409: "the Hub reports a conflict: another push may be under way",
    412: "the branch has moved meanwhile: run the same command again",
    413: "the Hub refuses files of this size",
    429: "too many requests: wait a few minutes and run the same command again",
}


def explain(error: HfHubHTTPError, repo: str) -> str:
    """One sentence for an error answer of the Hub."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    advice = ADVICE.get(status, "")
    if not advice:
        advice = "what was sent is kept: run the same command again" if status is None or status >= 500 else ""
    said = (getattr(error, "server_message", None) or str(error)).strip().splitlines()
    detail = f" The Hub says: {said[0].strip().rstrip('.')}." if said else ""
    return f"the push to {repo} failed with status {status}: {advice or 'the Hub refuses it'}.{detail}"
