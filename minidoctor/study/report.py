"""TODO"""

import math
import statistics
from typing import Any

from minidoctor.study.run import BASELINE, STRONGER

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
