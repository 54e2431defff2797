import json

import pytest
import torch

from minidoctor.config import UserError
from minidoctor.step import StepMetrics
from minidoctor.training.log import METRICS, MetricsLog, format_line, peak_memory_gib


def metrics(loss=1.0, load=((0.5, 0.5),), fill=0.25, grad_norm=1.0):
    fill = None if fill is None else torch.tensor(fill)
    losses = {"loss": torch.tensor(loss), "lm": torch.tensor(loss)}
    return StepMetrics(losses, torch.tensor(load), fill, torch.tensor(grad_norm), 0.1, 70)


def read_rows(out):
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def test_every_step_becomes_one_row_and_the_entry_is_their_mean(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step, load in enumerate(([[0.0, 1.0]], [[0.5, 0.5]])):
        log.add(step, metrics(loss=1.0 + step, load=load), 0.5)
    line, load = log.flush()
    rows = read_rows(tmp_path)
    assert rows[-1].pop("expert_load", [[0.25, 0.75]]) == [[0.25, 0.75]]
    assert rows == [
        {"step": step, "loss": 1.0 + step, "lm": 1.0 + step, "grad_norm": 1.0, "lr": 0.1, "queue_fill": 0.25,
         "tokens": 70, "seconds": 0.5}
        for step in (0, 1)
    ]  # fmt: skip
    assert load == ((0.25, 0.75),)
    assert line.startswith("step     2  loss 1.500  lm 1.500  queue 25 % full  lr 1.0e-01  140 tok/s  ")
    assert line.endswith("top-1 load 25 % to 75 % (uniform 50 %)")


def test_the_uniform_load_of_eight_experts_is_not_rounded():
    row = {"step": 0, "loss": 1.0, "lr": 0.1, "tokens": 70, "seconds": 1.0, "contrast": 2.0}
    line = format_line([row], ((0.03, 0.27, *[0.7 / 6] * 6),))
    assert line.endswith("top-1 load 3 % to 27 % (uniform 12.5 %)")
    assert "contrast 2.000" in line
    assert "top-1" not in format_line([row], ())


def test_damaged_rows_are_dropped_with_a_note(tmp_path, capsys):
    good = b'{"step": 0, "loss": 1.0}\n'
    (tmp_path / METRICS).write_bytes(good + b"\0\0\0\n" + b"[]\n" + b'{"step": "x"}\n' + b'{"loss": 1}\n')
    MetricsLog(tmp_path, 3)
    assert (tmp_path / METRICS).read_bytes() == good
    assert "contains 1 of the 3 steps" in capsys.readouterr().out


def test_a_run_without_a_queue_stores_no_fill(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.add(0, metrics(fill=None), 0.5)
    assert "queue" not in log.flush()[0]
    assert "queue_fill" not in read_rows(tmp_path)[0]


@pytest.mark.parametrize(("step", "advice"), [(0, "--dtype float32"), (3, "lower --lr")])
def test_the_advice_for_a_non_finite_step_depends_on_whether_it_follows_an_update(tmp_path, step, advice):
    log = MetricsLog(tmp_path, step)
    log.add(step, metrics(loss=float("nan")), 0.5)
    with pytest.raises(UserError, match=f"step {step}: loss, lm .*{advice}"):
        log.flush()


def test_a_non_finite_gradient_stops_the_run_after_the_rows_before_it(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step, norm in enumerate((1.0, 2.0, float("inf"), 1.0)):
        log.add(step, metrics(grad_norm=norm), 0.5)
    with pytest.raises(UserError, match="step 2: grad_norm"):
        log.flush()
    assert [row["grad_norm"] for row in read_rows(tmp_path)] == [1.0, 2.0]


def test_resume_keeps_the_complete_rows_before_its_step(tmp_path, capsys):
    rows = [json.dumps({"step": step}) for step in range(6)]
    (tmp_path / METRICS).write_text("\n".join(rows) + '\n{"step": 6, "lo')  # a crash in the middle of a line
    MetricsLog(tmp_path, 4)
    assert read_rows(tmp_path) == [{"step": step} for step in range(4)]
    assert capsys.readouterr().out == ""
    MetricsLog(tmp_path, 5)
    assert "contains 4 of the 5 steps" in capsys.readouterr().out
    assert len(read_rows(tmp_path)) == 4
    MetricsLog(tmp_path, 0)
    assert read_rows(tmp_path) == []


def test_peak_memory_grows_with_an_allocation():
    before = peak_memory_gib()
    assert 0.01 < before < 100
    torch.ones(round(before * 2**28) + 2**26).sum()  # float32: larger than the peak so far
    assert peak_memory_gib() > before
