"""`hf-moe push` against a stand-in for the Hub, through huggingface_hub's own client."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import HfApi, hf_hub_download
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hf_moe
from hf_moe.cli import app
from hf_moe.hub.card import is_ours
from hf_moe.hub.push import PushError, PushOptions, collect_files, plan_push, push

MODELS = Path(hf_moe.__file__).parent / "models"
REPO = "someone/tiny"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint as a conversion leaves it: upstream names, several shards, no code, no card."""
    folder = tmp_path_factory.mktemp("original") / "tiny"
    tiny_model("deepseek_v3").save_pretrained(folder, max_shard_size="40KB")
    for path in folder.glob("*.py"):
        path.unlink()
    config = json.loads((folder / "config.json").read_text())
    config.pop("auto_map")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    assert len(list(folder.glob("*.safetensors"))) > 6
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "tiny"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "home")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between its retries
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


# --- what arrives -----------------------------------------------------------------------------------------------------


def test_push_brings_weights_code_and_card_and_leaves_the_folder_alone(hub, folder):
    before = contents(folder)
    code, output = command("push", folder, REPO, "-m", "first version")
    assert code == 0, output
    assert contents(folder) == before
    repository, files = hub.repositories[REPO], hub.files(REPO)
    assert repository.private and repository.messages[1:] == ["first version"], "one commit makes all visible at once"
    for name, data in before.items():
        if name != "config.json":
            assert files[name] == data, name
    modules = {name for name in files if name.endswith(".py")}
    assert {"modeling_deepseek_v3.py", "configuration_deepseek_v3.py", "layer_mla.py"} <= modules
    assert not modules & {"modeling_step3_vl.py", "modeling_longcat_flash.py"}
    assert all(files[name] == (MODELS / name).read_bytes() for name in modules)
    pushed, local = json.loads(files["config.json"]), json.loads(before["config.json"])
    assert pushed.pop("auto_map")["AutoModelForCausalLM"] == "modeling_deepseek_v3.DeepseekV3ForCausalLM"
    assert pushed == local
    assert is_ours(files["README.md"].decode()) and f'name = "{REPO}"' in files["README.md"].decode()
    assert f"{hub.url}/{REPO}" in output and repository.branches["main"] in output


def test_a_second_push_changes_nothing(hub, folder):
    push(folder, REPO)
    first = hub.repositories[REPO].branches["main"]
    hub.requests.clear()
    done = push(folder, REPO)
    assert done.commit == first == hub.repositories[REPO].branches["main"]
    assert not hub.asked("PUT", ".*")


def test_weights_of_an_earlier_checkpoint_do_not_stay_beside_the_new_ones(hub, folder, tmp_path):
    single = tmp_path / "single"
    other = tiny_model("deepseek_v3", seed=1)
    other.save_pretrained(single)
    assert (single / "model.safetensors").is_file()
    push(single, REPO)
    hub.add(REPO, {"figure.safetensors": b"theirs"})
    code, output = command("push", folder, REPO)
    assert code == 0 and "earlier checkpoint: model.safetensors" in output, output
    assert {*contents(folder), "figure.safetensors"} <= set(hub.files(REPO)) and "model.safetensors" not in hub.files(
        REPO
    )
    loaded, local = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (REPO, folder))
    assert [name for name in local if not torch.equal(loaded[name], local[name])] == []
    code, output = command("push", single, REPO, "--exclude", "model-00001-of-*")
    assert {"model.safetensors", "figure.safetensors"} <= set(hub.files(REPO))
    assert not [name for name in hub.files(REPO) if name.endswith(".index.json") or name.startswith("model-0000")]


def test_public_only_when_told(hub, folder):
    push(folder, REPO, PushOptions(public=True))
    assert not hub.repositories[REPO].private
    with pytest.raises(PushError, match="exists and is public.*--public"):
        push(folder, REPO)
    push(folder, REPO, PushOptions(public=True))
    push(folder, "someone/other")
    assert hub.repositories["someone/other"].private


def test_branch(hub, folder):
    push(folder, REPO, PushOptions(revision="fp8"))
    repository = hub.repositories[REPO]
    assert set(hub.files(REPO, "main")) == {".gitattributes"} and "config.json" in hub.files(REPO, "fp8")
    (folder / "generation_config.json").write_text("{}")
    push(folder, REPO, PushOptions(revision="fp8"))
    assert hub.files(REPO, "fp8")["generation_config.json"] == b"{}" and set(repository.branches) == {"main", "fp8"}


def test_without_code_and_card_the_folder_arrives_as_it_is(hub, folder):
    code, output = command("push", folder, REPO, "--no-code", "--no-card")
    assert code == 0, output
    assert {**contents(folder), ".gitattributes": hub.files(REPO)[".gitattributes"]} == hub.files(REPO)


def test_multi_part_uploads(monkeypatch, tmp_path, folder):
    with HubServer(part_size=10_000) as server:
        server.use(monkeypatch, tmp_path / "home")
        push(folder, REPO)
        assert server.asked("PUT", r"/lfs/\w+/3$") and server.asked("POST", "/complete")
        for path in folder.glob("*.safetensors"):
            assert server.files(REPO)[path.name] == path.read_bytes()


def test_without_the_storage_of_xet_files_are_sent_whole(hub, folder, monkeypatch):
    pytest.importorskip("hf_xet")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    code, output = command("push", folder, REPO)
    assert code == 0 and "sent whole" in output, output
    assert len(hub.asked("GET", "/xet-write-token/")) == 1, "asked once, not for every file"
    for path in folder.glob("*.safetensors"):
        assert hub.files(REPO)[path.name] == path.read_bytes()


def test_dry_run_asks_nothing(hub, folder):
    code, output = command("push", folder, REPO, "--dry-run")
    assert code == 0 and "nothing was sent" in output and "modeling_deepseek_v3.py" in output, output
    assert not hub.requests


# --- whose card -------------------------------------------------------------------------------------------------------


def test_a_readme_of_the_user_is_never_replaced_unless_told(hub, folder):
    (folder / "README.md").write_text("# Mine\n")
    code, output = command("push", folder, REPO)
    assert code == 0 and "README.md of the folder is kept" in output
    assert hub.files(REPO)["README.md"] == b"# Mine\n"
    push(folder, REPO, PushOptions(card=True))
    assert is_ours(hub.files(REPO)["README.md"].decode()) and (folder / "README.md").read_text() == "# Mine\n"


def test_a_card_that_was_edited_on_the_hub_stays(hub, folder):
    push(folder, REPO)
    edited = hub.files(REPO)["README.md"].replace(b"# tiny", b"# Our tiny model")
    hub.add(REPO, {"README.md": edited})
    code, output = command("push", folder, REPO)
    assert code == 0 and "was edited there, and is kept" in output and hub.files(REPO)["README.md"] == edited
    code, output = command("push", folder, REPO, "--card", "--title", "Renamed")
    assert code == 0 and b"# Renamed" in hub.files(REPO)["README.md"]
    push(folder, REPO)
    assert b"# tiny" in hub.files(REPO)["README.md"], "ours again, and kept up to date"


def test_licence_goes_with_the_weights_of_a_known_release(hub, folder):
    code, output = command("push", folder, REPO)
    assert "No licence is known" in output and "LICENSE" not in hub.files(REPO)
    command("push", folder, REPO, "--base-model", "deepseek-ai/DeepSeek-V3")
    files = hub.files(REPO)
    assert files["LICENSE"].startswith(b"DEEPSEEK LICENSE AGREEMENT")
    assert (
        b"license_name: deepseek" in files["README.md"] and b"base_model: deepseek-ai/DeepSeek-V3" in files["README.md"]
    )
    (folder / "LICENSE").write_text("My own")
    command("push", folder, REPO, "--license", "mit")
    assert hub.files(REPO)["LICENSE"] == b"My own" and b"license: mit" in hub.files(REPO)["README.md"]


# --- what stays behind ------------------------------------------------------------------------------------------------


def test_leftovers_of_training_stay_behind(folder):
    for name in ("optimizer.pt", "training_args.bin", ".cache/x", "checkpoint-5/model.safetensors", "a.part", "runs/e"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "figures").mkdir()
    (folder / "figures" / "a.png").write_bytes(b"x")
    found, left = collect_files(folder, exclude=("*.txt", "generation_*"))
    assert "figures/a.png" in found and "config.json" in found
    assert set(left) == {
        "optimizer.pt",
        "training_args.bin",
        "checkpoint-5/",
        "a.part",
        "runs/",
        "generation_config.json",
    }
    assert not any(name in found for name in left) and not any(name.startswith(".cache") for name in found)


@pytest.mark.parametrize("pattern", ["notes", "notes/", "no*"])
def test_folders_are_excluded_by_name(folder, tmp_path, pattern):
    """Links to folders, too, as the message that refuses them says."""
    (tmp_path / "secret").mkdir()
    (folder / "notes").symlink_to(tmp_path / "secret")
    (folder / "more" / "notes").mkdir(parents=True)
    (folder / "more" / "notes" / "a.txt").write_text("x")
    found, left = collect_files(folder, exclude=(pattern,))
    assert left == ["notes/", "more/notes/"] and not any("notes" in name for name in found)


@pytest.mark.parametrize("directory", [False, True], ids=["file", "folder"])
def test_links_out_of_the_folder_are_refused(hub, folder, tmp_path, directory):
    secret = tmp_path / "secret"
    secret.mkdir() if directory else secret.write_text("password")
    (folder / "notes").symlink_to(secret)
    code, output = command("push", folder, REPO)
    assert code == 2 and "notes" in output and "link" in output and not hub.requests


def test_a_snapshot_of_the_cache_is_pushed_through_its_links(hub, folder, tmp_path):
    hub.add_folder("upstream/model", folder)
    from huggingface_hub import snapshot_download

    snapshot = Path(snapshot_download("upstream/model"))
    assert (snapshot / "config.json").is_symlink()
    push(snapshot, REPO)
    assert {name: data for name, data in contents(folder).items() if name != "config.json"}.items() <= hub.files(
        REPO
    ).items()


# --- refusals ---------------------------------------------------------------------------------------------------------


def nan(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def truncated(folder):
    path = sorted(folder.glob("*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:-10])


def missing(folder):
    sorted(folder.glob("*.safetensors"))[0].unlink()


@pytest.mark.parametrize("damage", [nan, truncated, missing])
def test_a_folder_that_verify_rejects_is_refused(hub, folder, damage):
    damage(folder)
    code, output = command("push", folder, REPO)
    assert code == 2 and "verify" in output and ".safetensors" in output, output
    assert not hub.repositories and not hub.asked("POST", "/api/(repos|models)")
    assert command("push", folder, REPO, "--dry-run")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-owner",), "owner"),
        (("a/b/c",), "no name of a repository"),
        (("someone/bad name",), "no name of a repository"),
        ((REPO, "--license", "Not A Licence"), "--license"),
        ((REPO, "--base-model", "DeepSeek-V3"), "--base-model"),
        ((REPO, "--exclude", "*.json"), "config.json would stay behind by --exclude"),
    ],
)
def test_bad_arguments(hub, folder, arguments, message):
    code, output = command("push", folder, *arguments)
    assert code == 2 and message in output and not hub.requests, output


def test_a_licence_that_the_hub_does_not_know_is_refused_before_the_work(hub, folder, monkeypatch):
    monkeypatch.setattr("hf_moe.hub.push.verify_before_push", None)
    code, output = command("push", folder, REPO, "--license", "mit-license")
    assert code == 2 and '"license" must be one of' in output and "--license" in output, output
    assert not hub.repositories
    (folder / "README.md").write_text("---\nlicense: [\n---\nMine.\n")
    code, output = command("push", folder, REPO)
    assert code == 2 and "README.md" in output and "metadata" in output and not hub.repositories, output


def test_bad_folders(hub, tmp_path, folder):
    code, output = command("push", tmp_path / "nowhere", REPO)
    assert code == 2 and "config.json" in output
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    code, output = command("push", folder, REPO)
    assert code == 2 and "llama" in output and "--no-code" in output
    assert plan_push(folder, REPO, PushOptions(code=False)).card is False
    (folder / "config.json").write_text("{")
    code, output = command("push", folder, REPO)
    assert code == 2 and "config.json" in output


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/api/repos/create", 401, "log in"),
        ("POST", "/api/repos/create", 403, "write access"),
        ("POST", "/api/repos/create", 500, "run the same command again"),
        ("GET", "/api/models/", 401, "log in"),
        ("POST", "/preupload/", 403, "write access"),
        ("POST", "/objects/batch", 500, "run the same command again"),
        ("PUT", "/lfs/", 403, "write access"),
        ("PUT", "/lfs/", 500, "run the same command again"),
        ("PUT", "/lfs/", 0, "again"),
        ("POST", "/commit/", 409, "conflict"),
        ("POST", "/commit/", 412, "run the same command again"),
        ("POST", "/commit/", 500, "run the same command again"),
        ("POST", "/api/", 429, "wait"),
    ],
)
def test_every_error_answer_is_one_clear_error(hub, folder, method, path, status, message):
    hub.fail(method, path, status)
    code, output = command("push", folder, REPO)
    assert code == 2 and message in output and REPO in output, output
    assert "Traceback" not in output and (status == 0 or str(status) in output), output
    assert set(hub.files(REPO) if REPO in hub.repositories else {}) <= {".gitattributes"}, (
        "nothing half done is visible"
    )


def test_no_hub_at_all(hub, folder, monkeypatch):
    hub.http.shutdown()
    hub.http.socket.close()
    code, output = command("push", folder, REPO)
    assert code == 2 and REPO in output and "again" in output, output
    monkeypatch.setattr(hub.http, "shutdown", lambda: None)


def test_wrong_token(hub, folder):
    code, output = command("push", folder, REPO, "--token", "hf_wrong")
    assert code == 2 and "--token" in output and not hub.repositories, output


# --- going on ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_push_goes_on_where_it_stopped(hub, folder):
    shards = len(list(folder.glob("*.safetensors")))
    hub.fail("PUT", "/lfs/", 500, skip=3)
    with pytest.raises(PushError):
        push(folder, REPO)
    kept = set(hub.objects)
    assert 3 <= len(kept) < shards
    hub.faults.clear()
    hub.requests.clear()
    push(folder, REPO)
    sent = {request.path.split("/")[2] for request in hub.asked("PUT", "/lfs/")}
    assert not sent & kept and len(sent) == shards - len(kept)
    for path in folder.glob("*.safetensors"):
        assert hub.files(REPO)[path.name] == path.read_bytes()


def test_transient_failures_are_retried_by_the_client(hub, folder):
    for method, path, status in (("PUT", "/lfs/", 500), ("POST", "/objects/batch", 503), ("POST", "/preupload/", 502)):
        hub.fail(method, path, status, times=2)
    push(folder, REPO)
    assert "config.json" in hub.files(REPO)


def test_a_killed_push_goes_on(folder, tmp_path):
    """SIGKILL while the second batch is on its way; the folder and the repository are whole before and after."""
    before = contents(folder)
    with HubServer() as server:
        server.fail("PUT", "/lfs/", 200, skip=4, seconds=0.5)
        environment = server.environment(tmp_path / "home", PYTHONPATH=str(MODELS.parents[1]))
        arguments = [sys.executable, "-m", "hf_moe.cli", "push", str(folder), REPO]
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(server.asked("PUT", "/lfs/")) < 5 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.6)
        kept = set(server.objects)
        assert kept and set(server.files(REPO)) == {".gitattributes"} and contents(folder) == before
        server.faults.clear()
        server.requests.clear()
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not {request.path.split("/")[2] for request in server.asked("PUT", "/lfs/")} & kept
        assert before.keys() <= server.files(REPO).keys()


# --- reading back -----------------------------------------------------------------------------------------------------


def test_what_was_pushed_loads_by_its_id(hub, folder, monkeypatch):
    push(folder, REPO)
    local = AutoModelForCausalLM.from_pretrained(folder).eval()
    loaded = AutoModelForCausalLM.from_pretrained(REPO).eval()
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, local(ids).logits)
    assert HfApi().model_info(REPO).private
    assert Path(hf_hub_download(REPO, "config.json")).is_file()


def test_ranges_are_served(hub, folder):
    """What reading a repository tensor by tensor needs of the stand-in."""
    import urllib.request

    hub.add_folder(REPO, folder)
    name = sorted(path.name for path in folder.glob("*.safetensors"))[0]
    data = (folder / name).read_bytes()
    for header, wanted in (("bytes=0-7", data[:8]), ("bytes=100-199", data[100:200]), ("bytes=-5", data[-5:])):
        request = urllib.request.Request(f"{hub.url}/{REPO}/resolve/main/{name}", headers={"Range": header})
        with urllib.request.urlopen(request) as response:
            assert response.status == 206 and response.read() == wanted
    assert sum(request.sent for request in hub.requests) == 113


def test_plan_shows_where_files_come_from(folder):
    plan = plan_push(folder, REPO)
    made = {upload.name for upload in plan.uploads if isinstance(upload.content, bytes)}
    assert {"README.md", "config.json", "modeling_deepseek_v3.py"} <= made and "generation_config.json" not in made
    assert plan.size == sum(upload.size for upload in plan.uploads)
