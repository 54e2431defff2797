"""The evaluation before and after training, and report.json."""

import dataclasses
import shlex
from pathlib import Path

from minidoctor.cli.processes import Processes
from minidoctor.evaluate.evaluation import evaluate
from minidoctor.evaluate.protocol import EvalConfig
from minidoctor.evaluate.summary import Summary
from minidoctor.evaluate.table import format_summary
from minidoctor.files.json_files import write_json
from minidoctor.model import Model, trainable_parameters
from minidoctor.questions.rows import Row
from minidoctor.text.tokenizer import Tokenizer
from minidoctor.training.log import peak_memory_gib
from minidoctor.training.state import RunState

REPORT = "report.json"
EVALUATION = EvalConfig(score=("auto", "loss"))


def evaluate_rows(model: Model, tokenizer: Tokenizer, rows: list[Row], processes: Processes) -> Summary | None:
    return evaluate(model, tokenizer, rows, config=EVALUATION, processes=processes).summary if rows else None


def write_report(
    model: Model, state: RunState, eval_after: Summary | None, eval_trained: int, n_processes: int
) -> None:
    """Print both evaluations, then write report.json: the printed tables remain if the file cannot be written."""
    config, eval_before = state.config, state.eval_before
    if eval_before and eval_after:
        print(f"before\n{format_summary(eval_before)}\nafter\n{format_summary(eval_after)}")
    report = {
        "eval_before": dataclasses.asdict(eval_before) if eval_before else None,
        "eval_after": dataclasses.asdict(eval_after) if eval_after else None,
        "eval_trained": eval_trained,
        "processes": n_processes,
        "steps": state.step,
        "seconds": state.seconds,
        "tokens_per_second": state.tokens / state.seconds,
        "peak_memory_gib": peak_memory_gib(),
        "trainable_parameters": sum(p.numel() for p in trainable_parameters(model).values()),
        "expert_load": state.expert_load,
        "config": dataclasses.asdict(config),
        "adapter": dataclasses.asdict(state.adapter),
    }
    write_json(Path(config.out) / REPORT, report)
    command = shlex.join(["python", "sample.py", "--base", config.base, "--adapter", config.out])
    print(f"{config.out}/{REPORT}   ask it: {command}")
