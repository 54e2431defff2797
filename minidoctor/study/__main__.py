"""Does contrastive routing help? Variants of the fine-tuning on the same batches, several seeds each, in one table.

    python -m minidoctor.study                    all variants and seeds on the shipped data
    python -m minidoctor.study --quick            a look at whether it runs: minutes
    python -m minidoctor.study --out DIR          again: goes on with what is not there yet

A run is a variant and a seed. Runs of one seed see the same batches in the same order and start from the same experts,
so that differences are taken seed by seed. Each run leaves DIR/runs/VARIANT-SEED.json; the table and DIR/study.json are
made of these files alone.

Intervals are 95 %, of the mean over seeds, by Student's t: they tell what other seeds would give, not other questions.
What the columns mean stands in trial.py and specialization.py.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minidoctor.cli.flags import add_flags, from_flags
from minidoctor.cli.main import run
from minidoctor.config import UserError
from minidoctor.files.json_files import read_object, write_json
from minidoctor.questions.json_rows import read_rows
from minidoctor.study.report import markdown, summary_of, table
from minidoctor.study.run import BASELINE, VARIANTS, StudyConfig, rows_of, run_one


def leave_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def settings_of(name: str, config: StudyConfig) -> dict[str, Any]:
    return {"config": dataclasses.asdict(config), "variant": dataclasses.asdict(VARIANTS[name])}


def work(job: tuple[str, int, StudyConfig, Path]) -> None:
    """In a process of its own, on one core: a run and its file."""
    name, seed, config, path = job
    torch.set_num_threads(1)
    write_json(path, {**settings_of(name, config), "run": run_one(name, seed, config)})


def path_of(out: Path, name: str, seed: int) -> Path:
    return out / "runs" / f"{'_'.join(''.join(c if c.isalnum() else ' ' for c in name).split())}-{seed}.json"


def read_run(path: Path, config: StudyConfig) -> dict[str, Any]:
    """Raises ValueError if the file is of a study with other settings."""
    content = read_object(path)
    found: dict[str, Any] = content.get("run", {})
    if found.get("variant") not in VARIANTS:
        raise UserError(f"{path}: no run of a variant that there is")
    own = json.loads(json.dumps(settings_of(found["variant"], config)))
    stored = {part: content.get(part) or {} for part in own}
    keys = [key for part in own for key in own[part] if stored[part].get(key) != own[part][key]]
    if keys:
        raise UserError(f"{path}: a run with other settings ({', '.join(keys)}); give another --out")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minidoctor.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="directory for runs and study.json (default study, with --quick study_quick)")
    parser.add_argument("--seeds", type=int, help="seeds 0, 1, ... (default 5, with --quick 2)")
    parser.add_argument(
        "--variants", help=f"some of them, with semicolons between (default all): {'; '.join(VARIANTS)}"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at once, a core each (default all cores)"
    )
    parser.add_argument("--quick", action="store_true", help="few steps, few questions, three variants")
    add_flags(parser, StudyConfig)
    given = vars(parser.parse_args())
    quick = {"steps": 12, "eval_rows": 40} if given["quick"] else {}
    config = from_flags(StudyConfig, {**quick, **given})
    quick_variants = ["LoRA, same trained weights", BASELINE, "+ balance + contrast with the queue"]
    names = [name.strip() for name in given["variants"].split(";")] if given["variants"] else list(VARIANTS)
    if given["quick"] and not given["variants"]:
        names = quick_variants
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"no variant {unknown[0]!r}; there are {'; '.join(VARIANTS)}")
    n_seeds = (2 if given["quick"] else 5) if given["seeds"] is None else given["seeds"]
    for flag_name, value in (("seeds", n_seeds), ("jobs", given["jobs"])):
        if value < 1:
            raise UserError(f"--{flag_name} must be at least 1, got {value}")
    out = Path(given["out"] or ("study_quick" if given["quick"] else "study"))
    study(out, names, n_seeds, given["jobs"], config)


def study(out: Path, names: list[str], n_seeds: int, n_jobs: int, config: StudyConfig) -> dict[str, Any]:
    """Runs what is missing, prints the table of all that is there and writes study.json."""
    rows_of(config), read_rows(config.data)  # bad files are said before the first process starts
    (out / "runs").mkdir(parents=True, exist_ok=True)
    jobs, paths = [], []
    for seed in range(n_seeds):
        for name in names:
            path = path_of(out, name, seed)
            paths.append(path)
            if path.exists():
                read_run(path, config)
            else:
                jobs.append((name, seed, config, path))
    failures = []
    if jobs:
        context, n_processes = multiprocessing.get_context("spawn"), min(n_jobs, len(jobs))
        # A process for each run, so that its memory is its own. Runs that fail do not end the others.
        pool = ProcessPoolExecutor(n_processes, context, leave_to_parent, max_tasks_per_child=1)
        with pool, tqdm(total=len(paths), initial=len(paths) - len(jobs), desc="runs") as progress:
            waiting = {pool.submit(work, job): f"{job[0]}, seed {job[1]}" for job in jobs}
            try:
                for done in as_completed(waiting):
                    if error := done.exception():
                        failures.append(f"{waiting[done]}: {error}")
                    progress.set_postfix_str(waiting[done], refresh=False)
                    progress.update()
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    if failures:
        raise UserError(f"{len(failures)} of {len(jobs)} runs failed, the others are kept: {'; '.join(failures):.500}")
    found = [read_run(path, config) for path in (out / "runs").glob("*.json")]  # those of earlier calls, too
    place = {name: i for i, name in enumerate(VARIANTS)}
    runs = sorted(found, key=lambda run: (place[run["variant"]], run["seed"]))
    variants = {name: dataclasses.asdict(VARIANTS[name]) for name in dict.fromkeys(run["variant"] for run in runs)}
    result = {"config": dataclasses.asdict(config), "variants": variants, **summary_of(runs), "runs": runs}
    write_json(out / "study.json", result)
    (out / "table.md").write_text(markdown(result) + "\n", encoding="utf-8")
    print(table(result))
    print(f"{out}/study.json  {out}/table.md")
    return result


if __name__ == "__main__":
    run(main)
