"""The metrics of a training run: one JSON object per step, as minidoctor/training/log.py writes them."""

import math
from pathlib import Path
from typing import Any

from minidoctor.config import UserError, check
from minidoctor.files.json_files import parse_json, read_lines


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl. Raises FileNotFoundError or UserError."""
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            row = parse_json(line)
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        check(isinstance(row, dict) and {"step", "loss"} <= set(row), f'{path}:{number}: no "step" and "loss"')
        for name in {"step", "loss", "lm", "balance", "contrast"} & set(row):
            finite = isinstance(row[name], (int, float)) and math.isfinite(row[name])
            check(finite, f"{path}:{number}: {name} is not a finite number: {row[name]!r:.40}")
        rows.append(row)
    check(bool(rows), f"{path}: no steps yet")
    return rows
