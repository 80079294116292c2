"""Remote code: a saved folder works in an environment that has torch and transformers but not hf_moe.

The environment is built here: a virtual environment whose site-packages are links to everything installed except this
project. A class that is registered locally wins over remote code, so nothing less would prove anything.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from checkpoints import (
    LOGITS_ATOL,
    REPOSITORY,
    assert_same_tensors,
    copy_golden,
    expected,
    golden,
    read_config,
    read_tensors,
    stored_dtype,
)
from testing import SHARED_MODELING
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import (
    check_imports,
    get_imports,
    get_relative_import_files,
    get_relative_imports,
)

import hf_moe  # noqa: F401  registers the classes

MODELS = REPOSITORY / "hf_moe" / "models"
MODULES = sorted(path for path in MODELS.glob("*.py") if path.name != "__init__.py")
FAMILIES = {"deepseek_v3": "v3_basic", "deepseek_v2": "v2_group_limited", "kimi_k2": "kimi_k2"}
DEPENDENCIES = {"torch", "transformers"}


def closure(*entries: str) -> set[str]:
    """File names that the relative imports of the given modules reach, themselves included; found by parsing."""
    found, waiting = set(), list(entries)
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        tree = ast.parse((MODELS / f"{module}.py").read_text(encoding="utf-8"))
        waiting += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    return {f"{module}.py" for module in found}


# --- the rules of the loader ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_loaders_line_rules_see_what_python_sees(path):
    """The loader finds siblings by a line pattern: it must find every relative import and nothing else."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    for node in relative:
        assert node.level == 1 and node.module and "." not in node.module, f"line {node.lineno}: not `from .x import y`"
        assert (MODELS / f"{node.module}.py").is_file(), f"line {node.lineno}: no sibling {node.module}"
    assert set(get_relative_imports(path)) == {node.module for node in relative}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_import_only_what_every_user_has(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(node.module.split(".")[0])
    allowed = DEPENDENCIES | set(sys.stdlib_module_names) | ({"triton"} if path.stem == "triton_compat" else set())
    assert imported <= allowed, f"imports {sorted(imported - allowed)}"
    assert "triton" not in get_imports(path), "triton is imported outside of a `try`"
    check_imports(path)  # raises for a package that is not installed


def test_the_package_file_of_the_models_is_empty():
    assert (MODELS / "__init__.py").read_text() == ""


# --- what is shipped --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """(model type, golden, folder) of a saved float32 copy, moved away from where it was saved."""
    case = FAMILIES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    model = AutoModelForCausalLM.from_pretrained(golden(case), dtype=torch.float32)
    model.save_pretrained(root / "saved", max_shard_size="300KB")
    shutil.copytree(root / "saved", root / "copied" / "model")
    shutil.rmtree(root / "saved")
    return request.param, case, root / "copied" / "model"


def test_shipped_code_is_the_import_closure(saved):
    model_type, _, folder = saved
    wanted = closure(f"configuration_{model_type}", f"modeling_{model_type}")
    assert {path.name for path in folder.glob("*.py")} == wanted
    for name in wanted:
        assert (folder / name).read_bytes() == (MODELS / name).read_bytes(), name
    files = {Path(path).name for path in get_relative_import_files(folder / f"modeling_{model_type}.py")}
    assert files <= wanted, "the loader would look for files that are not there"


def test_no_other_family_is_shipped(saved):
    model_type, _, folder = saved
    families = {path.stem.removeprefix("modeling_") for path in MODELS.glob("modeling_*.py")} - SHARED_MODELING
    # V2 and Kimi-K2 are configurations of the V3 classes.
    allowed = {model_type, "deepseek_v3"}
    shipped = {
        path.stem.split("_", 1)[1] for path in folder.glob("*.py") if path.name.startswith(("modeling_", "conf"))
    }
    assert shipped & families <= allowed


def test_folder_holds_nothing_else(saved):
    _, _, folder = saved
    others = {path.name for path in folder.iterdir() if path.suffix not in (".py", ".safetensors")}
    assert others == {"config.json", "generation_config.json", "model.safetensors.index.json"}


def test_push_to_hub_uploads_code_and_auto_map(tmp_path, monkeypatch):
    from transformers.utils import hub

    uploaded = {}

    class NoNetwork:
        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})()

    def keep(self, working_dir, repo_id, *args, **kwargs):
        shutil.copytree(working_dir, tmp_path / "uploaded")
        uploaded["repo_id"] = repo_id

    if hasattr(hub, "hf_api"):
        monkeypatch.setattr(hub, "hf_api", NoNetwork)
    else:
        monkeypatch.setattr(hub, "create_repo", NoNetwork().create_repo)
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", keep)
    monkeypatch.setattr(hub.PushToHubMixin, "_get_files_timestamps", lambda self, folder: {}, raising=False)
    model = AutoModelForCausalLM.from_pretrained(golden("v3_basic"), dtype=stored_dtype("v3_basic"))
    model.push_to_hub("someone/model")
    assert uploaded["repo_id"] == "someone/model"
    folder = tmp_path / "uploaded"
    wanted = closure("configuration_deepseek_v3", "modeling_deepseek_v3")
    assert {path.name for path in folder.glob("*.py")} == wanted
    assert read_config(folder)["auto_map"] == model.config.remote_code_map
    assert_same_tensors(read_tensors(folder), read_tensors(golden("v3_basic")))


# --- a process without hf_moe -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory) -> str:
    """Python of a virtual environment with everything that is installed here, but not this project."""
    folder = tmp_path_factory.mktemp("environment")
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    assert packages.is_dir()
    sources = [Path(entry) for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    for source in dict.fromkeys(sources):
        if not source.is_dir():
            continue
        for entry in source.iterdir():
            name = entry.name.lower()
            ours = "hf_moe" in name or "hf-moe" in name
            if ours or entry.suffix == ".pth" or name == "__pycache__" or (packages / entry.name).exists():
                continue
            (packages / entry.name).symlink_to(entry)
    return str(folder / "bin" / "python")


def run_isolated(interpreter: str, cache: Path, code: str, *arguments) -> dict:
    """Runs `code` where hf_moe cannot be imported; its last line of output is JSON."""
    guard = "import importlib.util, sys\nassert importlib.util.find_spec('hf_moe') is None, sys.path\n"
    done = "\nassert not [name for name in sys.modules if name.split('.')[0] == 'hf_moe']\n"
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "TRANSFORMERS"))
    }
    environment |= {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [interpreter, "-I", "-c", guard + code + done, *map(str, arguments)],
        env=environment,
        cwd=cache,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-6000:]}"
    return json.loads(result.stdout.splitlines()[-1])


USE = """
import json
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification
)
folder, expected, again = sys.argv[1:4]
want = load_file(expected)
ids = want["input_ids"]
remote = {"trust_remote_code": True, "dtype": torch.float32}

def difference(actual, wanted):
    return (actual.double() - wanted.double()).abs().max().item()

out = {}
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
out["config"] = [type(config).__module__, type(config).__name__, config.model_type]
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **remote)
model.eval()
out["model"] = [type(model).__module__, type(model).__name__]
out["info"] = {key: sorted(map(str, value)) for key, value in info.items()}
with torch.no_grad():
    out["logits"] = difference(model(ids).logits, want["logits"])
    if "mtp1_logits" in want:
        out["mtp"] = difference(model(ids, output_mtp_logits=True).mtp_logits[0], want["mtp1_logits"])
generated = model.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
out["greedy"] = torch.equal(generated[:, ids.shape[1] :], want["greedy_new_ids"])
out["experts"] = model.config._experts_implementation
model.save_pretrained(again)
copy = AutoModelForCausalLM.from_pretrained(again, **remote).eval()
base = AutoModel.from_pretrained(folder, **remote).eval()
with torch.no_grad():
    out["logits_again"] = difference(copy(ids).logits, want["logits"])
    out["states"] = difference(base(ids).last_hidden_state, want["last_hidden_state"])
for auto_class in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
    classifier = auto_class.from_pretrained(folder, num_labels=3, pad_token_id=0, **remote).eval()
    state = model.model.state_dict()
    equal = all(torch.equal(value, state[key]) for key, value in classifier.model.state_dict().items())
    with torch.no_grad():
        shape = list(classifier(ids).logits.shape)
    out[auto_class.__name__] = [type(classifier).__module__, equal, shape]
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def used(saved, interpreter, tmp_path_factory):
    """What a process without hf_moe saw of the saved folder."""
    model_type, case, folder = saved
    root = tmp_path_factory.mktemp(f"used_{model_type}")
    (root / "cache").mkdir()
    seen = run_isolated(interpreter, root / "cache", USE, folder, golden(case) / "expected.safetensors", root / "again")
    return model_type, case, folder, root / "again", seen


def test_remote_classes_are_used(used):
    model_type, _, _, _, seen = used
    assert seen["config"][0].startswith("transformers_modules.") and seen["config"][2] == model_type
    assert seen["config"][0].endswith(f"configuration_{model_type}")
    assert seen["model"][0].startswith("transformers_modules.")
    assert seen["model"][0].endswith(f"modeling_{model_type}")


def test_remote_code_loads_everything(used):
    assert not any(used[-1]["info"].values()), used[-1]["info"]


def test_remote_code_gives_the_expected_values(used):
    _, case, _, _, seen = used
    assert seen["logits"] < LOGITS_ATOL and seen["states"] < LOGITS_ATOL
    assert seen["greedy"] is True
    if "mtp1_logits" in expected(case):
        assert seen["mtp"] < LOGITS_ATOL


def test_remote_code_keeps_our_defaults(used):
    assert used[-1]["experts"] == "hf_moe"


def test_remote_classification(used):
    _, case, _, _, seen = used
    batch, length = expected(case)["input_ids"].shape
    for name, shape in (
        ("AutoModelForSequenceClassification", [batch, 3]),
        ("AutoModelForTokenClassification", [batch, length, 3]),
    ):
        module, equal, got = seen[name]
        assert module.startswith("transformers_modules.") and equal and got == shape, name


def test_saving_from_remote_code(used):
    model_type, case, folder, again, seen = used
    assert seen["logits_again"] < LOGITS_ATOL
    assert_same_tensors(read_tensors(again), read_tensors(folder))
    wanted = closure(f"configuration_{model_type}", f"modeling_{model_type}")
    assert {path.name for path in again.glob("*.py")} == wanted
    for name in wanted:
        assert (again / name).read_bytes() == (MODELS / name).read_bytes(), name
    before, after = read_config(folder), read_config(again)
    assert before.pop("architectures") == after.pop("architectures")
    assert {key.split("--")[-1]: value.split("--")[-1] for key, value in after.pop("auto_map").items()} == before.pop(
        "auto_map"
    )
    assert after == before


def test_saved_from_remote_code_loads_with_hf_moe(used):
    _, case, _, again, _ = used
    model = AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("hf_moe.models.")
    with torch.no_grad():
        difference = (model(expected(case)["input_ids"]).logits - expected(case)["logits"]).abs().max().item()
    assert difference < LOGITS_ATOL


QUANTISED_AND_DAMAGED = """
import json
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
fp8, expected, damaged, other = sys.argv[1:5]
want = load_file(expected)
out = {}
model = AutoModelForCausalLM.from_pretrained(fp8, trust_remote_code=True, dtype=torch.float32).eval()
with torch.no_grad():
    out["fp8"] = (model(want["input_ids"]).logits - want["logits"]).abs().max().item()
try:
    AutoModelForCausalLM.from_pretrained(damaged, trust_remote_code=True)
except OSError as error:
    out["damaged"] = str(error)
# A second bundle in one process: each has its own modules.
second = AutoModelForCausalLM.from_pretrained(other, trust_remote_code=True)
out["modules"] = [type(model).__module__, type(second).__module__]
print(json.dumps(out))
"""


def test_remote_code_reads_fp8_and_refuses_damage_and_lives_beside_another_bundle(interpreter, tmp_path):
    saved = tmp_path / "saved"
    AutoModelForCausalLM.from_pretrained(golden("v3_basic")).save_pretrained(saved)
    fp8 = copy_golden(tmp_path / "fp8", "v3_fp8")
    for path in saved.glob("*.py"):
        shutil.copy(path, fp8)
    config = {**read_config(fp8), "auto_map": read_config(saved)["auto_map"]}
    (fp8 / "config.json").write_text(json.dumps(config))
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(golden("kimi_k2")).save_pretrained(other)
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "cache").mkdir()
    seen = run_isolated(
        interpreter,
        tmp_path / "cache",
        QUANTISED_AND_DAMAGED,
        fp8,
        golden("v3_fp8") / "expected.safetensors",
        saved,
        other,
    )
    assert seen["fp8"] < LOGITS_ATOL
    assert "model.safetensors" in seen["damaged"] and "truncated" in seen["damaged"]
    first, second = (module.split(".") for module in seen["modules"])
    assert first[-1] == "modeling_deepseek_v3" and second[-1] == "modeling_kimi_k2" and first[:-1] != second[:-1]


def test_the_isolated_environment_is_isolated(interpreter, tmp_path):
    seen = run_isolated(interpreter, tmp_path, "import json\nprint(json.dumps([sys.prefix, sys.path]))")
    assert Path(seen[0]) != Path(sys.prefix)
    assert str(REPOSITORY) not in seen[1]
