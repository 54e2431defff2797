"""Compare variants of the fine-tuning on the same batches, with several seeds each.

    python -m minidoctor.study                    all variants and seeds on the shipped data
    python -m minidoctor.study --quick            a short test run
    python -m minidoctor.study --out DIR          repeated: runs only those that are missing in DIR

A run is a variant and a seed, and is stored in DIR/runs when it ends. The printed tables, DIR/table.md and
DIR/ablation.json are computed from all runs stored there. README.md in this directory contains the results.
"""

import argparse
import os
from pathlib import Path

from minidoctor.cli.flags import add_flags, from_flags
from minidoctor.cli.main import run
from minidoctor.config import check
from minidoctor.study.ablation import ablate
from minidoctor.study.variants import BASELINE, LORA, QUEUE, VARIANTS, AblationConfig


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minidoctor.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="directory for runs and tables (default study, with --quick study_quick)")
    parser.add_argument("--seeds", type=int, help="number of seeds, from 0 (default 5, with --quick 2)")
    parser.add_argument("--variants", help=f"variants separated by semicolons (default all: {'; '.join(VARIANTS)})")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parallel runs, one core each (default all)")
    parser.add_argument("--quick", action="store_true", help="few steps, few questions, three variants")
    add_flags(parser, AblationConfig)
    flags = vars(parser.parse_args())
    quick = flags["quick"]
    config = from_flags(AblationConfig, {**({"steps": 12, "eval_rows": 40} if quick else {}), **flags})
    names = [LORA, BASELINE, QUEUE] if quick else list(VARIANTS)
    if flags["variants"]:
        names = [name.strip() for name in flags["variants"].split(";")]
    for name in names:
        check(name in VARIANTS, f"--variants: unknown {name!r}, expected some of {'; '.join(VARIANTS)}")
    n_seeds = (2 if quick else 5) if flags["seeds"] is None else flags["seeds"]
    check(n_seeds >= 1, f"--seeds must be at least 1, got {n_seeds}")
    check(flags["jobs"] >= 1, f"--jobs must be at least 1, got {flags['jobs']}")
    ablate(Path(flags["out"] or ("study_quick" if quick else "study")), names, n_seeds, flags["jobs"], config)


if __name__ == "__main__":
    run(main)
