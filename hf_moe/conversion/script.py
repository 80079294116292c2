"""What the scripts in `conversions/` have in common: a source, a target and the options of the engine."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ..models.weights_safetensors import CheckpointError
from .command import carry_out, default_workers
from .families import model_name
from .inference import open_hub_layout
from .plan import Plan
from .source import Source


def run_script(description: str, plan: Callable[[Source], Plan], models: tuple[str, ...]) -> None:
    """Runs a conversion with the arguments of the command line.

    Args:
        description: the script's documentation, for `--help`.
        plan: makes the plan.
        models: model types or architectures that the script is for; others are refused.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of a checkpoint, or Hub id")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--max-shard-size", default="5GB", help="of a weight file (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="threads (default: 2, for the Hub 8)")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be written")
    args = parser.parse_args()
    try:
        source = open_hub_layout(args.source, revision=args.revision)
        name = model_name(source.config)
        if name not in models:
            raise CheckpointError(f"{source.path('config.json')}: is of {name}, but this script is for {models[0]}.")
        workers = default_workers(source) if args.workers is None else args.workers
        carry_out(source, plan(source), args.target, workers, args.max_shard_size, args.dry_run)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt as interrupt:
        sys.exit(str(interrupt) or "Interrupted.")
