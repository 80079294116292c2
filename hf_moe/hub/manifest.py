"""`conversion.json` where files of a converted folder are replaced on purpose: its checksums follow."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from ..conversion.source import MANIFEST_NAME as MANIFEST


def updated_manifest(data: bytes, replaced: Mapping[str, bytes]) -> bytes:
    """The manifest with the sizes and checksums of `replaced`, those that it lists; the rest stays as it is.

    Raises:
        ValueError: for what is no manifest.
    """
    try:
        manifest = json.loads(data)
        files = manifest["files"]
        known = [name for name in replaced if name in files]
        for name in known:
            files[name] = {"size": len(replaced[name]), "sha256": hashlib.sha256(replaced[name]).hexdigest()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} is not the record of a conversion: {error!r}.") from error
    return (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode("utf-8") if known else data


def with_manifest(folder: Path, replaced: Mapping[str, bytes]) -> dict[str, bytes]:
    """`replaced`, and the manifest of the folder where its checksums change by them."""
    path = folder / MANIFEST
    if not path.is_file():
        return dict(replaced)
    before = path.read_bytes()
    after = updated_manifest(before, replaced)
    return {**replaced, **({} if after == before else {MANIFEST: after})}
