"""Convert a checkpoint, look at what would go to the Hub, and push it.

    python examples/publish.py deepseek-ai/DeepSeek-V3 DeepSeek-V3-bf16 your-name/DeepSeek-V3-bf16
    python examples/publish.py ... --push

SOURCE may be a folder or a Hub id; a Hub id is read piece by piece. Without `--push` nothing is sent. The same as

    hf-moe convert SOURCE TARGET --to bf16 && hf-moe push TARGET REPO --dry-run
"""

import argparse
from pathlib import Path

from hf_moe.conversion.quantization import plan_bf16
from hf_moe.conversion.run import convert
from hf_moe.conversion.source import open_source
from hf_moe.hub.push import plan_push, push
from hf_moe.hub.tokenizer import with_fast_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("target", type=Path)
    parser.add_argument("repo")
    parser.add_argument("--push", action="store_true", help="send it, to a private repository")
    args = parser.parse_args()
    if not args.target.exists():
        source = open_source(args.source)
        convert(source, with_fast_tokenizer(source, plan_bf16(source)), args.target)
    plan = plan_push(args.target, args.repo)
    for upload in plan.uploads:
        print(f"{upload.size:>16,}  {upload.name}{'' if isinstance(upload.content, Path) else '  (made by hf_moe)'}")
    for note in plan.notes:
        print(note)
    if args.push:
        print(push(args.target, args.repo, plan=plan, report=print).url)


if __name__ == "__main__":
    main()
