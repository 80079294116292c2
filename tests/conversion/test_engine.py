"""The engine: the same bytes however often it is stopped and whoever does the work, and nothing half done."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_moe.conversion.run as engine
from hf_moe.conversion import writer
from hf_moe.conversion.plan import Copy, Group, Output, Part, Plan, copy_group
from hf_moe.conversion.quantization import plan_bf16, plan_fp8
from hf_moe.conversion.run import convert, partial_path
from hf_moe.conversion.source import LocalStore, carried_files, open_source
from hf_moe.conversion.writer import file_hash, lay_out, parse_size
from hf_moe.models.weights_safetensors import CheckpointError

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
REPOSITORY = Path(__file__).resolve().parents[2]
FP8 = torch.float8_e4m3fn


def content(folder):
    """Every file of a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoint(folder, experts=24, width=256, rows=384):
    """A DeepSeek checkpoint of block FP8 experts, and the small files around it."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for expert in range(experts):
        name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
        tensors[name] = torch.randn(rows, width, generator=generator).to(FP8)
        tensors[f"{name}_scale_inv"] = torch.rand(-(-rows // 128), -(-width // 128), generator=generator) + 0.1
    tensors["model.norm.weight"] = torch.randn(width, generator=generator).bfloat16()
    names = sorted(tensors)
    weight_map = {}
    for index in range(3):
        held = {name: tensors[name] for name in names[index::3]}
        save_file(held, folder / f"model-{index + 1:05d}-of-00003.safetensors")
        weight_map.update(dict.fromkeys(held, f"model-{index + 1:05d}-of-00003.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((GOLDENS / "v3_fp8" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        (folder / name).write_text(f'{{"name": "{name}"}}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "modeling_own.py").write_text("x = 1\n")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The checkpoint of this module's tests."""
    return checkpoint(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """Its conversion in one go."""
    return run(source, tmp_path_factory.mktemp("whole") / "out")


def run(source, target, **options):
    """Converts to bfloat16 with small files; returns the target."""
    opened = open_source(source)
    convert(opened, plan_bf16(opened), target, **{"max_shard_size": "1MB", "progress": False, **options})
    return target


@pytest.mark.parametrize("workers", [1, 3, 7])
def test_the_number_of_workers_changes_no_byte(source, whole, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "PIECE_BYTES", 100_000)  # so that every weight is many pieces
    assert content(run(source, tmp_path / "out", workers=workers)) == content(whole)


def test_what_is_written_around_the_weights(source, whole):
    files = content(whole)
    weights = [name for name in files if name.endswith(".safetensors")]
    assert len(weights) == 5 and "model-00002-of-00005.safetensors" in weights
    present = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
    for name in carried_files(present):
        assert files[name] == (source / name).read_bytes()
    assert {"additional_chat_templates/tools.jinja", "modeling_own.py", "LICENSE"} <= set(files)
    index = json.loads(files["model.safetensors.index.json"])
    held = {name: path for path in weights for name in load_file(whole / path)}
    assert index["weight_map"] == held
    tensors = {name: tensor for path in weights for name, tensor in load_file(whole / path).items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    manifest = json.loads(files["conversion.json"])
    assert set(manifest["files"]) == set(files) - {"conversion.json"}
    for name, record in manifest["files"].items():
        assert record == {"size": len(files[name]), "sha256": file_hash(whole / name)}
    (step,) = manifest["steps"]
    assert step["title"] == "block FP8 to bfloat16" and step["source"]["name"] == "model"
    assert str(source) not in files["conversion.json"].decode()
    assert not list(whole.parent.glob("*.partial"))


def test_all_bytes_are_on_the_disk_before_the_target_appears(source, tmp_path, monkeypatch):
    flushed, fsync = {}, os.fsync

    def note(descriptor):
        assert not (tmp_path / "out").exists()
        fsync(descriptor)
        flushed[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fsync", note)
    run(source, tmp_path / "out")
    written = [path.stat() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert all(flushed[status.st_ino] == status.st_size for status in written)


def test_weight_files_that_are_no_part_of_the_checkpoint_are_named(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "model")
    for name in ("adapter_model.safetensors", "mtp.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(b"x")
    opened = open_source(folder)
    (note,) = convert(opened, plan_bf16(opened), tmp_path / "out", dry_run=True).notes
    assert note.endswith(": adapter_model.safetensors, mtp.safetensors, pytorch_model.bin")
    for name in ("figures", ".cache"):  # beside additional_chat_templates, which is carried
        (folder / name).mkdir()
    (note,) = convert(open_source(folder), plan_bf16(opened), tmp_path / "out", dry_run=True).notes
    assert note.endswith(", pytorch_model.bin, figures/")
    assert not convert(open_source(source), plan_bf16(opened), tmp_path / "out", dry_run=True).notes


def test_a_second_conversion_remembers_the_first(whole, tmp_path):
    opened = open_source(whole)
    summary = convert(opened, plan_fp8(opened), tmp_path / "fp8", progress=False)
    titles = [step["title"] for step in summary.manifest["steps"]]
    assert titles == ["block FP8 to bfloat16", "bfloat16 to block FP8 with float32 scales"]


def interrupt(source, target, kills, seed, signal_name):
    """Runs the helper; returns its report and what the children printed."""
    helper = Path(__file__).with_name("interruptions.py")
    command = [sys.executable, str(helper), str(source), str(target), str(kills), str(seed), signal_name]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(Path(f"{target}.json").read_text()), done.stderr


def test_killed_at_ten_random_moments_the_result_is_byte_identical(tmp_path):
    source = checkpoint(tmp_path / "model", experts=150, width=1024)
    reference = run(source, tmp_path / "reference")
    report, _ = interrupt(source, tmp_path / "out", 10, 0, "SIGKILL")
    total = len(list(reference.glob("*.safetensors")))
    assert report["codes"] == [-9] * 10 + [0]
    assert report["finished"] == sorted(report["finished"]) and len(set(report["finished"])) > 5
    assert 0 < report["finished"][0] and report["finished"][-1] < total
    assert content(tmp_path / "out") == content(reference)
    assert not partial_path(tmp_path / "out").exists()


def test_interrupted_by_the_user_it_says_how_to_go_on(tmp_path):
    source = checkpoint(tmp_path / "model", experts=100, width=1024)
    report, printed = interrupt(source, tmp_path / "out", 1, 1, "SIGINT")
    assert report["codes"] == [130, 0]
    assert "weight files are finished in" in printed and "Repeat the command to go on." in printed
    assert content(tmp_path / "out") == content(run(source, tmp_path / "reference"))


class Stopped(Exception):
    """Raised by the tests in the middle of a conversion."""


def stop_after(monkeypatch, files):
    """Makes the engine fail when so many weight files are finished; the state stays."""
    save = engine._Job.save_state

    def save_and_stop(job):
        save(job)
        if len(job.finished) == files:
            raise Stopped

    monkeypatch.setattr(engine._Job, "save_state", save_and_stop)


@pytest.fixture
def half(source, tmp_path, monkeypatch):
    """A target of which two files are finished."""
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return tmp_path / "out"


def test_finished_files_are_not_written_again(source, whole, half):
    files = partial_path(half) / "files"
    times = {path.name: path.stat().st_mtime_ns for path in files.glob("*.safetensors")}
    state = json.loads((partial_path(half) / "state.json").read_text())
    assert len(state["finished"]) == 2
    opened = open_source(source)
    summary = convert(opened, plan_bf16(opened), half, max_shard_size="1MB", progress=False)
    assert summary.resumed == list(state["finished"])
    assert all((half / name).stat().st_mtime_ns == times[name] for name in summary.resumed)
    assert content(half) == content(whole)


@pytest.mark.parametrize("damage", ["flip", "shorten", "remove"])
def test_a_finished_file_that_changed_is_made_again(source, whole, half, damage):
    path = sorted((partial_path(half) / "files").glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-1])
    assert content(run(source, half)) == content(whole)


def test_another_conversion_does_not_go_on_with_the_files(source, half):
    opened = open_source(source)
    before = content(partial_path(half))
    with pytest.raises(CheckpointError, match="a part of another conversion .the sizes of the weight files differ"):
        convert(opened, plan_bf16(opened), half, max_shard_size="2MB", progress=False)
    with pytest.raises(CheckpointError, match="the conversion and the .*configuration differ"):
        other = Plan("copy", [copy_group(opened, name) for name in opened.entries], opened.config)
        convert(opened, other, half, max_shard_size="1MB", progress=False)
    assert content(partial_path(half)) == before and not half.exists()


def test_a_changed_source_is_noticed(half, source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "copy")
    with pytest.raises(CheckpointError, match="the source differ"):
        run(copy, half)
    first = sorted(source.glob("*.safetensors"))[0]
    stamp = first.stat()
    os.utime(first, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    try:
        with pytest.raises(CheckpointError, match="the source differ"):
            run(source, half)
    finally:
        os.utime(first, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


@pytest.mark.parametrize("state", ["{", '{"identity": {}}', "[]", '{"identity": [1], "finished": {}}'])
def test_a_damaged_state_is_refused(source, half, state):
    (partial_path(half) / "state.json").write_text(state)
    with pytest.raises(CheckpointError, match="state.json: damaged|a part of another"):
        run(source, half)


def test_a_damaged_record_is_said_before_the_work(tmp_path):
    folder = checkpoint(tmp_path / "source", experts=1)
    (folder / "conversion.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="conversion.json: holds list"):
        run(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_foreign_files_in_the_partial_folder_are_refused(source, tmp_path):
    files = partial_path(tmp_path / "out") / "files"
    files.mkdir(parents=True)
    (files / "precious").write_text("mine")
    with pytest.raises(CheckpointError, match="no conversion accounts for"):
        run(source, tmp_path / "out")
    assert (files / "precious").read_text() == "mine"


def test_two_conversions_do_not_write_to_one_target(source, tmp_path):
    folder = partial_path(tmp_path / "out")
    folder.mkdir()
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="another conversion is writing"):
        run(source, tmp_path / "out")
    os.close(lock)
    run(source, tmp_path / "out")


def test_a_folder_of_the_partial_name_that_is_somebody_elses_stays(source, tmp_path):
    folder = partial_path(tmp_path / "out")
    folder.mkdir()
    (folder / "precious").write_text("mine")
    with pytest.raises(CheckpointError, match="out.partial: holds precious, which no conversion accounts for"):
        run(source, tmp_path / "out")
    assert content(folder) == {"precious": b"mine"}


@pytest.mark.parametrize("linked", [False, True])
def test_a_source_of_the_partial_name_stays(source, linked, tmp_path):
    named = partial_path(tmp_path / "out")
    place = shutil.copytree(source, tmp_path / "elsewhere" if linked else named)
    if linked:
        named.symlink_to(place)
    with pytest.raises(CheckpointError, match=f"out.partial: {'is a link' if linked else 'the source lies there'}"):
        run(named, tmp_path / "out")
    assert content(place) == content(source) and not (tmp_path / "out").exists()


def test_stopped_while_small_files_are_carried_it_goes_on(source, whole, tmp_path, monkeypatch):
    def interrupt(job, files):
        assert (job.files / "additional_chat_templates" / "tools.jinja").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._Job, "_manifest", interrupt)
        with pytest.raises(KeyboardInterrupt, match="5 of 5 weight files are finished .*Repeat the command"):
            run(source, tmp_path / "out")
    assert content(run(source, tmp_path / "out")) == content(whole)


def test_a_target_that_appears_while_the_source_is_read_stays(source, whole, tmp_path, monkeypatch):
    def lay_out_while_another_runs(*arguments):
        monkeypatch.undo()
        run(source, tmp_path / "out")
        return lay_out(*arguments)

    monkeypatch.setattr(engine, "lay_out", lay_out_while_another_runs)
    with pytest.raises(CheckpointError, match="out: exists and is not empty"):
        run(source, tmp_path / "out")
    assert content(tmp_path / "out") == content(whole) and not partial_path(tmp_path / "out").exists()


@pytest.mark.parametrize("nothing", [False, True], ids=["files", "nothing"])
def test_file_systems_that_lock_no_folders(source, whole, nothing, tmp_path, monkeypatch, capsys):
    flock = fcntl.flock

    def of_nfs(descriptor, operation):  # which asks for what is open for writing
        if nothing or fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    assert content(run(source, tmp_path / "out", progress=True)) == content(whole)
    assert not partial_path(tmp_path / "out").exists()
    assert ("cannot be locked: start no second conversion" in capsys.readouterr().err) == nothing
    folder = partial_path(tmp_path / "again")
    folder.mkdir()
    if not nothing:
        with open(folder / "lock", "w") as held:
            flock(held.fileno(), fcntl.LOCK_EX)
            with pytest.raises(CheckpointError, match="another conversion is writing"):
                run(source, tmp_path / "again")
        run(source, tmp_path / "again")


def test_a_dry_run_writes_nothing_and_says_what_would_be(source, whole, tmp_path):
    opened = open_source(source)
    summary = convert(opened, plan_bf16(opened), tmp_path / "out", max_shard_size="1MB", dry_run=True)
    assert not any(tmp_path.iterdir())
    assert summary.shards == {path.name: path.stat().st_size for path in sorted(whole.glob("*.safetensors"))}
    assert summary.tensors == 25 and set(summary.files) == {
        name for name in content(whole) if not name.endswith(".safetensors")
    }


def test_too_little_room_is_noticed_before_the_start(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(CheckpointError, match="the disk has 1 MB free, but the conversion needs 21"):
        run(source, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_room_for_carried_files_is_asked_for(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "source", experts=1)
    (folder / "tokenizer.json").write_bytes(b" " * 30_000_000)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 40 * 10**6))
    with pytest.raises(CheckpointError, match="the disk has 40 MB free, but the conversion needs 4[6-9]"):
        run(folder, tmp_path / "out")


@pytest.mark.parametrize("call", [3, 30])
def test_a_disk_that_fills_up_leaves_what_is_finished(source, whole, call, tmp_path, monkeypatch):
    pwrite, calls = os.pwrite, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(CheckpointError, match="the disk is full .*Make room and repeat the command"):
            run(source, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    assert content(run(source, tmp_path / "out")) == content(whole)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="reads a file whose first byte cannot be read")
def test_a_source_that_cannot_be_read_is_named():
    with pytest.raises(CheckpointError, match="/proc/self/mem: tensor x cannot be read: Input/output error."):
        LocalStore(Path("/proc/self")).read_into("mem", 0, memoryview(bytearray(8)), "tensor x")


def test_an_empty_folder_may_be_the_target(source, whole, tmp_path):
    (tmp_path / "out").mkdir()
    assert content(run(source, tmp_path / "out")) == content(whole)


@pytest.mark.parametrize("size", ["5 bananas", "0", "GB", "-1", "5iB"])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="no size|too small"):
        parse_size(size)


def test_sizes():
    assert [parse_size(size) for size in ("5GB", "1.5 MB", "2GiB", "10kib", 7, "8B")] == [
        5 * 10**9,
        1_500_000,
        2**31,
        10240,
        7,
        8,
    ]


def test_files_of_odd_sizes_are_read_by_other_libraries(tmp_path):
    # Three bytes before a float32: the order of the groups would put it where readers cannot take it as numbers.
    source = tmp_path / "in"
    source.mkdir()
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.randn(2, 3),
        "c": torch.zeros(0, 4),
        "d": torch.tensor(2.5, dtype=torch.bfloat16),
        "e": torch.randn(5).double(),
    }
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "deepseek_v3"}')
    opened = open_source(source)
    plan = Plan("copy", [copy_group(opened, name) for name in sorted(tensors)], opened.config)
    convert(opened, plan, tmp_path / "out", progress=False)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def double(tensors):
    """A step of the tests."""
    return {"twice": torch.cat([tensors["left"], tensors["right"]], dim=1) * 2}


def test_parts_of_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "PIECE_BYTES", 256)
    source = tmp_path / "in"
    source.mkdir()
    matrix = torch.randn(40, 24)
    save_file({"m": matrix}, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "deepseek_v3"}')
    opened = open_source(source)
    groups = [
        Group((Part("m", 10, 30),), (Output("rows", torch.float32, (20, 24)),), Copy()),
        Group((Part("m", 3, 17, dim=1),), (Output("columns", torch.float32, (40, 14)),), Copy()),
        Group(
            (Part("m", 0, 4, dim=1, alias="left"), Part("m", 20, 24, dim=1, alias="right")),
            (Output("twice", torch.float32, (40, 8)),),
            double,
        ),
    ]
    convert(opened, Plan("parts", groups, None, shard_of=lambda name: f"{name}.safetensors"), tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "rows.safetensors")["rows"], matrix[10:30])
    assert torch.equal(load_file(tmp_path / "out" / "columns.safetensors")["columns"], matrix[:, 3:17])
    edges = torch.cat([matrix[:, :4], matrix[:, 20:]], dim=1)
    assert torch.equal(load_file(tmp_path / "out" / "twice.safetensors")["twice"], edges * 2)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_a_plan_that_writes_a_name_twice_is_refused(source):
    opened = open_source(source)
    with pytest.raises(CheckpointError, match="would write tensor model.norm.weight twice"):
        lay_out(Plan("twice", [copy_group(opened, "model.norm.weight")] * 2, None), 10**9)


MEMORY = """
import sys, torch
from hf_moe.conversion.quantization import plan_bf16, plan_fp8
from hf_moe.conversion.run import convert
from hf_moe.conversion.source import open_source

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

before = peak()
for source, target, plan in ((*sys.argv[1:3], plan_bf16), (*sys.argv[2:4], plan_fp8)):
    source = open_source(source)
    convert(source, plan(source), target, workers=2, progress=False)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
def test_memory_does_not_grow_with_tensors(tmp_path):
    # One stack, 67 MB in FP8 and 134 MB in bfloat16, of which a conversion holds a few strips.
    config = json.loads((GOLDENS / "step3_fp8" / "config.json").read_text())
    name = "model.layers.1.moe.gate_proj.weight"
    stack = torch.zeros(16, 2048, 2048, dtype=torch.uint8)
    stack[:, ::7] = 57
    (tmp_path / "in").mkdir()
    tensors = {name: stack.view(FP8), f"{name}_scale_inv": torch.full((16, 16, 16), 0.25)}
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    folders = [str(tmp_path / folder) for folder in ("in", "bf16", "fp8")]
    command = [sys.executable, "-c", MEMORY, *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 110e6  # inputs and outputs as a whole would be 200 MB, their float32 values more
    after = load_file(tmp_path / "fp8" / "model.safetensors")
    assert torch.equal(after[name].float()[0, :14:7], torch.full((2, 2048), 448.0))
    assert list(after[f"{name}_scale_inv"].shape) == [16, 16, 16]
