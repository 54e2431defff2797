"""Compare variants of the fine-tuning on the same batches, with several seeds each.

    python -m minidoctor.study                    all variants and seeds on the shipped data
    python -m minidoctor.study --quick            a short test run
    python -m minidoctor.study --out DIR          repeated: runs only those that are missing in DIR
    python -m minidoctor.study --sequence         training in two stages without replay, which shows forgetting

A run is a variant and a seed, and is stored in DIR/runs when it ends. The printed tables, DIR/table.md and
DIR/ablation.json (DIR/sequence.json) are computed from all runs stored there. README.md in this directory contains the
results.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from minidoctor.cli.flags import add_flags, from_flags
from minidoctor.cli.main import run
from minidoctor.config import check
from minidoctor.study.ablation import ablate
from minidoctor.study.sequence_variants import GROUPS, ORACLE, SEQUENCE_VARIANTS, SequenceConfig
from minidoctor.study.variants import BASELINE, LORA, QUEUE, VARIANTS, AblationConfig

# The test runs: variants, seeds and settings
QUICK_ABLATION = [LORA, BASELINE, QUEUE], 2, {"steps": 12, "eval_rows": 40}
QUICK_SEQUENCE = (
    [LORA, BASELINE, ORACLE, GROUPS],
    1,
    {"steps": 6, "eval_rows": 60, "text_paragraphs": 20, "stages": ("language", "mixed")},
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minidoctor.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequence", action="store_true", help="the sequential experiment")
    parser.add_argument(
        "--out", help="directory for runs and tables (default study or study_sequence, with --quick *_quick)"
    )
    parser.add_argument("--seeds", type=int, help="number of seeds, from 0 (default 5, with --quick 2, of sequences 1)")
    parser.add_argument(
        "--variants",
        help=f"variants separated by semicolons (default all: {'; '.join(VARIANTS)}; "
        f"with --sequence: {'; '.join(SEQUENCE_VARIANTS)})",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parallel runs, one core each (default all)")
    parser.add_argument("--quick", action="store_true", help="few steps, few questions, some of the variants")
    add_flags(parser, SequenceConfig)
    flags = vars(parser.parse_args())
    quick, sequence = flags["quick"], flags["sequence"]
    only = sorted({"stages", "text_paragraphs"} & flags.keys())
    check(sequence or not only, f"{', '.join(only)}: settings of the sequential experiment; add --sequence")
    kind, variants = (SequenceConfig, SEQUENCE_VARIANTS) if sequence else (AblationConfig, VARIANTS)
    default: tuple[list[str], int, dict[str, Any]] = list(variants), 5, {}
    names, n_seeds, preset = (QUICK_SEQUENCE if sequence else QUICK_ABLATION) if quick else default
    config = from_flags(kind, {**preset, **flags})
    if flags["variants"]:
        names = [name.strip() for name in flags["variants"].split(";")]
    for name in names:
        check(name in variants, f"--variants: unknown {name!r}, expected some of {'; '.join(variants)}")
    n_seeds = n_seeds if flags["seeds"] is None else flags["seeds"]
    check(n_seeds >= 1, f"--seeds must be at least 1, got {n_seeds}")
    check(flags["jobs"] >= 1, f"--jobs must be at least 1, got {flags['jobs']}")
    out = flags["out"] or ("study_sequence" if sequence else "study") + ("_quick" if quick else "")
    ablate(Path(out), names, n_seeds, flags["jobs"], config)


if __name__ == "__main__":
    run(main)
