"""Parallel runs of an ablation, stored one by one, and their summary.

The functions that run in other processes cannot be in __main__.py: these processes do not import it.
"""

import json
import multiprocessing
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from minidoctor.checkpoints.hugging_face import checkpoint_hash
from minidoctor.cli.main import exit_code
from minidoctor.config import UserError, check
from minidoctor.files.json_files import read_object, write_json
from minidoctor.study.report import Report, read_runs, report_ablation
from minidoctor.study.run import RunResult, run_variant
from minidoctor.study.sequence import run_sequence
from minidoctor.study.sequence_report import report_sequence
from minidoctor.study.sequence_variants import SEQUENCE_VARIANTS, SequenceConfig
from minidoctor.study.variants import VARIANTS, AblationConfig, Variant
from minidoctor.training.data import hash_files, read_rows


class Experiment(NamedTuple):
    """The parts in which the ablation on mixed data and the sequential experiment differ."""

    name: str  # of the summary's file
    variants: Mapping[str, Variant]
    run: Callable[[str, int, Any], RunResult]
    report: Callable[[list[RunResult]], Report]


def experiment(config: AblationConfig) -> Experiment:
    """Return the experiment that these settings belong to."""
    if isinstance(config, SequenceConfig):
        return Experiment("sequence", SEQUENCE_VARIANTS, run_sequence, report_sequence)
    return Experiment("ablation", VARIANTS, run_variant, report_ablation)


def run_path(out: Path, name: str, seed: int) -> Path:
    words = "".join(c if c.isalnum() else " " for c in name).split()
    return out / "runs" / f"{'_'.join(words)}-{seed}.json"


@lru_cache
def input_hashes(config: AblationConfig) -> dict[str, str]:
    """Return hashes of the base and the questions, because their paths stay the same when they are made again."""
    return {"base": checkpoint_hash(config.base), "data": hash_files(config.data), "eval": hash_files(config.eval)}


def settings(name: str, config: AblationConfig) -> dict[str, Any]:
    variant = asdict(experiment(config).variants[name])
    return {"config": asdict(config), "variant": variant, "inputs": input_hashes(config)}


def run_and_store(name: str, seed: int, config: AblationConfig, path: Path) -> None:
    """Run one variant and seed in this process, on one core. Exit with code 2 after an error that the user can mend.

    Any other error is raised: the process prints its traceback and exits with code 1.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C the parent process terminates this one
    torch.set_num_threads(1)
    try:
        write_json(path, {**settings(name, config), "run": asdict(experiment(config).run(name, seed, config))})
    except Exception as error:
        if exit_code(error) is None:
            raise
        print(f"{name}, seed {seed}: {error}", file=sys.stderr)
        sys.exit(2)


def read_run(path: Path, config: AblationConfig) -> RunResult:
    """Read a stored run. Raises UserError if it belongs to an ablation with other settings."""
    content = read_object(path)
    try:
        result = RunResult(**content["run"])
        expected = json.loads(json.dumps(settings(result.variant, config)))  # tuples become lists, as in the file
        pairs = [(fields, content[part]) for part, fields in expected.items()]
        keys = [key for a, b in pairs for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a run of a current variant; choose another --out") from None
    check(not keys, f"{path}: a run with other settings ({', '.join(keys)}); choose another --out")
    return result


def read_stored(out: Path, config: AblationConfig) -> list[RunResult]:
    """Read all stored runs, ordered by variant and seed. Raises UserError if one is not of this ablation."""
    order = list(experiment(config).variants)
    runs = [read_run(path, config) for path in sorted((out / "runs").glob("*.json"))]
    return sorted(runs, key=lambda result: (order.index(result.variant), result.seed))


def run_missing(jobs: list[tuple[str, int, AblationConfig, Path]], n_processes: int) -> list[str]:
    """Run the jobs in parallel and return a message for each that failed. A failure does not stop the others.

    Each job has a new process, so that its peak memory does not include that of earlier runs.
    """
    context, failures, waiting = multiprocessing.get_context("spawn"), [], jobs[::-1]
    running: dict[int, tuple[Any, str]] = {}  # process and title by sentinel
    try:
        with tqdm(total=len(jobs), desc="runs") as progress:
            while waiting or running:
                while waiting and len(running) < n_processes:
                    job = waiting.pop()
                    process = context.Process(target=run_and_store, args=job)
                    process.start()
                    running[process.sentinel] = process, f"{job[0]}, seed {job[1]}"
                for sentinel in wait(list(running)):
                    process, title = running.pop(sentinel)  # type: ignore[arg-type]
                    process.join()
                    check(process.exitcode != 1, f"{title}: stopped by a fault of the code, see its traceback above")
                    if process.exitcode:
                        hint = ", killed, perhaps for lack of memory; lower --jobs" if process.exitcode < 0 else ""
                        failures.append(title + hint)
                    progress.set_postfix_str(title, refresh=False)
                    progress.update()
    finally:
        for process, _ in running.values():
            process.terminate()
    return failures


def ablate(out: Path, names: list[str], n_seeds: int, n_jobs: int, config: AblationConfig) -> None:
    """Run the missing variants and seeds, then print and write the summary of all stored runs."""
    read_rows(config.data)  # an unreadable file ends the program here, before the first process starts
    check(all(row.answer for row in read_rows(config.eval)), f"{config.eval}: contains questions without an answer")
    stored = read_stored(out, config)
    summary_path, table_path = out / f"{experiment(config).name}.json", out / "table.md"
    previous = read_runs(summary_path) if summary_path.exists() else []
    lost = [result for result in previous if result not in stored]
    check(not lost, f"{summary_path}: {len(lost)} of its runs are not in {out}/runs; choose another --out")
    check(bool(previous) or not table_path.exists(), f"{table_path}: exists without its runs; choose another --out")
    (out / "runs").mkdir(parents=True, exist_ok=True)
    chosen = [(name, seed) for seed in range(n_seeds) for name in names]
    missing = [job for job in chosen if job not in {(result.variant, result.seed) for result in stored}]
    jobs = [(name, seed, config, run_path(out, name, seed)) for name, seed in missing]
    failures = run_missing(jobs, min(n_jobs, len(jobs))) if jobs else []
    runs = read_stored(out, config)
    failure = f"{len(failures)} of {len(jobs)} runs failed, the others are stored: {'; '.join(failures):.500}"
    check(bool(runs), failure)
    report = experiment(config).report(runs)
    print(report.printed)
    variants = {run.variant: asdict(experiment(config).variants[run.variant]) for run in runs}
    result = {"config": asdict(config), "variants": variants, **report.summary, "runs": [asdict(run) for run in runs]}
    write_json(summary_path, result)
    table_path.write_text(report.table + "\n", encoding="utf-8")
    print(f"{summary_path}  {table_path}")
    check(not failures, failure)
