"""Where a configuration comes from: a shipped name, a folder, a file or a repository on the Hub."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Source:
    """A configuration with the name to show and where it was found."""

    name: str
    origin: str
    config: dict[str, Any]
    folder: Path | None = None


def shipped_names() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def read_source(model: str) -> Source:
    """Reads `config.json` and nothing else.

    Raises:
        FileNotFoundError: where there is no such file, folder or repository.
        ValueError: for a file that is not a JSON object.
    """
    shipped = CONFIGS / f"{model.lower()}.json"
    path = Path(model)
    if shipped.parent == CONFIGS and shipped.is_file() and not path.exists():
        return Source(model.lower(), "shipped configuration", _read(shipped))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} has no config.json.")
        return Source(path.resolve().name, str(path), _read(path / "config.json"), path)
    if path.is_file():
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        return Source(name, str(path), _read(path))
    try:
        return Source(model, "Hub", _read(Path(hf_hub_download(model, "config.json"))))
    except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{model!r} is no file or folder, none of the shipped names ({', '.join(shipped_names())}), and no "
            f"repository whose config.json can be read: {error}"
        ) from error


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        ValueError: that names the file, for what is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}, not a configuration.")
    return config


def stored_precision(config: dict[str, Any]) -> str:
    """Precision of the published files: by `quantization_config`, else by dtype."""
    for part in (config, config.get("text_config")):
        quantization = part.get("quantization_config") if isinstance(part, dict) else None
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method == "fp8":
            return "fp8"
        if method == "compressed-tensors":
            return "int4"
    dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
    return "fp32" if "float32" in dtype else "bf16"


def bytes_on_disk(folder: Path | None) -> int | None:
    """Bytes of the weight files of a folder; `None` where there are none."""
    sizes = [path.stat().st_size for path in folder.glob("model*.safetensors")] if folder else []
    return sum(sizes) if sizes else None
