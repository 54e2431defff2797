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
import math
import multiprocessing
import os
import signal
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minidoctor.config import add_flags, from_flags, run
from minidoctor.data import read_rows
from minidoctor.files import read_object, write_json
from minidoctor.trial import BASELINE, STRONGER, VARIANTS, StudyConfig, rows_of, run_one

# Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom; for more than these the last, a little wide
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)


def mean_of(values: list[float]) -> dict[str, Any]:
    """The mean over seeds and its 95 % interval, None for a single seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "interval": None}
    half = T95[min(len(values) - 2, len(T95) - 1)] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "interval": [mean - half, mean + half]}


def summary_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each variant every measure; and against balance, stronger balance and plain LoRA the paired differences."""
    names = list(dict.fromkeys(run["variant"] for run in runs))
    by_seed = {name: {run["seed"]: run for run in runs if run["variant"] == name} for name in names}
    measures: dict[str, Any] = {}
    seeds_of = {name: len(by_seed[name]) for name in names}
    for name in names:
        first = next(iter(by_seed[name].values()))
        keys = [key for key in first if key not in ("variant", "seed")]
        measures[name] = {key: mean_of([run[key] for run in by_seed[name].values()]) for key in keys}
    differences: dict[str, Any] = {}
    for other in (BASELINE, STRONGER, "LoRA, same trained weights"):
        for name in names:
            seeds = sorted(by_seed[name].keys() & by_seed.get(other, {}).keys())
            if name != other and seeds:
                differences.setdefault(other, {})[name] = {
                    key: mean_of([by_seed[name][seed][key] - by_seed[other][seed][key] for seed in seeds])
                    for key in ("right", "open", "choice", "nll")
                    if key in by_seed[name][seeds[0]]
                }
    return {"seeds": seeds_of, "measures": measures, "differences": differences}


def table(summary: dict[str, Any]) -> str:
    """The summary for people: percentages with half the width of their interval, and differences in points."""

    def percent(found: dict[str, Any] | None) -> str:
        if not found:
            return "-"
        half = (found["interval"][1] - found["mean"]) * 100 if found["interval"] else None
        return f"{100 * found['mean']:.1f}" + (f" ±{half:.1f}" if half is not None else "")

    def number(found: dict[str, Any] | None, digits: int) -> str:
        return "-" if not found else f"{found['mean']:.{digits}f}"

    titles = ["right %", "open %", "choice %", "nll", "weights", "entropy", "starved", "topic bits", "moved %"]
    lines = [f"{'':42}" + "".join(f"{title:>13}" for title in [*titles, "s/step", "GiB"])]
    for name, of in summary["measures"].items():
        cells = [percent(of.get(key)) for key in ("right", "open", "choice")]
        cells += [number(of["nll"], 3), f"{of['trained_weights']['mean']:,.0f}", number(of.get("load_entropy"), 2)]
        cells += [number(of.get("starved"), 1), number(of.get("topic_bits"), 3), percent(of.get("moved"))]
        cells += [number(of["step_seconds"], 3), number(of["peak_memory_gib"], 2)]
        lines.append(f"{name:42}" + "".join(f"{cell:>13}" for cell in cells))
    for other, of_other in summary["differences"].items():
        lines.append(f"\nless {other!r}, seed by seed, in points; nll in nats:")
        for name, of in of_other.items():
            cells = [*(percent(of.get(key)) for key in ("right", "open", "choice")), signed(of, "nll", 1, 3)]
            lines.append(f"{name:42}" + "".join(f"{cell:>13}" for cell in cells[:3]) + f"{cells[3]:>28}")
    return "\n".join(lines)


def signed(of: dict[str, Any] | None, key: str, scale: int, digits: int) -> str:
    """A difference, and its interval in brackets."""
    if not of or key not in of:
        return ""
    bounds = " to ".join(f"{scale * bound:+.{digits}f}" for bound in of[key]["interval"] or ())
    return f"{scale * of[key]['mean']:+.{digits}f}" + (f" ({bounds})" if bounds else "")


def markdown(summary: dict[str, Any]) -> str:
    """The README's table: means over seeds, and the differences seed by seed with their intervals."""
    titles = ["variant", "seeds", "trained weights", "open, %", "loss, nats", "starved"]
    titles += [f"open, less `{BASELINE}`, points", f"loss, less `{BASELINE}`"]
    rows = [titles, ["---"] * len(titles)]
    for name, of in summary["measures"].items():
        less = summary["differences"].get(BASELINE, {}).get(name)
        rows.append([
            name,
            str(summary["seeds"][name]),
            f"{of['trained_weights']['mean']:,.0f}",
            f"{100 * of['open']['mean']:.1f}" if "open" in of else "",
            f"{of['nll']['mean']:.3f}",
            f"{of['starved']['mean']:.1f}" if "starved" in of else "",
            signed(less, "open", 100, 1),
            signed(less, "nll", 1, 3),
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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
        raise ValueError(f"{path}: no run of a variant that there is")
    own = json.loads(json.dumps(settings_of(found["variant"], config)))
    stored = {part: content.get(part) or {} for part in own}
    keys = [key for part in own for key in own[part] if stored[part].get(key) != own[part][key]]
    if keys:
        raise ValueError(f"{path}: a run with other settings ({', '.join(keys)}); give another --out")
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
        raise ValueError(f"no variant {unknown[0]!r}; there are {'; '.join(VARIANTS)}")
    n_seeds = (2 if given["quick"] else 5) if given["seeds"] is None else given["seeds"]
    for flag_name, value in (("seeds", n_seeds), ("jobs", given["jobs"])):
        if value < 1:
            raise ValueError(f"--{flag_name} must be at least 1, got {value}")
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
        raise ValueError(f"{len(failures)} of {len(jobs)} runs failed, the others are kept: {'; '.join(failures):.500}")
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
