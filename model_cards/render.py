"""Writes the cards of this folder.

    python model_cards/render.py

`converted.md` is the card of a tiny FP8 checkpoint of the tests after `hf-moe convert --to bf16`.
"""

import json
import shutil
import tempfile
from pathlib import Path

from hf_moe.conversion.quantization import plan_bf16
from hf_moe.conversion.run import convert
from hf_moe.conversion.source import open_source
from hf_moe.hub.card import CardOptions, family_card, read_checkpoint, render_card
from hf_moe.hub.families import FAMILIES

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "tests" / "goldens" / "v3_fp8"


def render_all() -> dict[str, str]:
    """Text by file name."""
    cards = {f"{family.slug}.md": family_card(family) for family in FAMILIES.values()}
    with tempfile.TemporaryDirectory() as place:
        source, target = Path(place) / "tiny-fp8", Path(place) / "tiny-bf16"
        source.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(TINY / name, source / name)
        opened = open_source(source)
        convert(opened, plan_bf16(opened), target, progress=False)
        manifest = json.loads((target / "conversion.json").read_text(encoding="utf-8"))
        manifest["steps"][-1]["torch"] = "2.13.0"  # whichever writes this folder
        (target / "conversion.json").write_text(json.dumps(manifest), encoding="utf-8")
        cards["converted.md"] = render_card(read_checkpoint(target, "your-name/tiny-bf16"), CardOptions(licence="mit"))
    return cards


def main() -> None:
    for name, text in render_all().items():
        (HERE / name).write_text(text, encoding="utf-8")
        print(f"wrote {HERE.name}/{name}")


if __name__ == "__main__":
    main()
