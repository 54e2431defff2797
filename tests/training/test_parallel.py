"""Several processes on CPUs (gloo) against the step of one process."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from paths import ROOT
from torch import nn

from minidoctor.batching import IGNORE, Example, ShuffledBatches, micro_batches
from minidoctor.cli.processes import Processes
from minidoctor.config import TARGETS, AdapterConfig, ModelConfig, TrainConfig
from minidoctor.files.safetensors import read_tensors
from minidoctor.model import Model, adapter_state, is_adapter_name, trainable_parameters
from minidoctor.step import make_optimizer, make_queue, train_step
from minidoctor.training.memory import estimate
from minidoctor.training.parallel import compute_share, shard_base, take_share
from minidoctor.training.state import read_state

SHAPE = ModelConfig(vocab_size=60, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48)
ADAPTER = AdapterConfig(n_experts=8, top_k=2, rank=2, alpha=4.0, routing_dim=4, targets=tuple(TARGETS), n_groups=2)
CONFIG = TrainConfig(
    steps=20, batch_size=7, accumulate=2, lr=2e-3, warmup=2, contrast_weight=0.5, contrast_warmup=0, n_anchors=16,
    queue_capacity=4, queue_share=2,
)  # fmt: skip


def make_examples() -> list[Example]:
    """Return 17 examples of unequal lengths with unequal numbers of answer tokens: the last batch of 7 has 3."""
    rng, examples = random.Random(0), []
    for _ in range(17):
        tokens = [rng.randrange(60) for _ in range(rng.randint(6, 30))]
        n_prompt = rng.randint(1, len(tokens) - 2)
        examples.append(Example(tokens[:-1], [IGNORE] * n_prompt + tokens[n_prompt + 1 :]))
    return examples


def train_steps(processes: Processes, dtype: torch.dtype):
    """Return the loss terms of 20 steps, the adapter and the queue."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Model(SHAPE, ADAPTER).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                nn.init.normal_(parameter, std=0.3)
    optimizer, queue = make_optimizer(model, CONFIG), make_queue(model, CONFIG).to(dtype)
    batches = ShuffledBatches(make_examples(), CONFIG.batch_size, CONFIG.seed).starting_at(0)
    options = {}
    if processes.size > 1:
        options = {"compute_losses": partial(compute_share, processes=processes), "all_reduce": processes.all_reduce}
    losses = []
    for step in range(CONFIG.steps):
        parts = micro_batches(next(batches), CONFIG.accumulate)
        metrics = train_step(model, optimizer, queue, parts, step, CONFIG, **options)
        losses.append({name: loss.item() for name, loss in metrics.losses.items()})
    return {
        "losses": losses,
        "adapter": {name: p.detach() for name, p in trainable_parameters(model).items()},
        "queue": queue.state_dict(),
        "load": metrics.expert_load,
        "n_tokens": metrics.n_tokens,
    }


def run_worker(rank: int, size: int, directory: str, dtype: torch.dtype) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=size)
    torch.save(train_steps(Processes(rank, size), dtype), f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_several_processes_equal_one(tmp_path: Path, size, dtype, tolerance):
    mp.spawn(run_worker, (size, str(tmp_path), dtype), nprocs=size)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    expected = train_steps(Processes(), dtype)
    for result in results:
        for losses, expected_losses in zip(result["losses"], expected["losses"], strict=True):
            assert losses == pytest.approx(expected_losses, rel=tolerance)
        for name, tensor in expected["adapter"].items():
            assert (result["adapter"][name] - tensor).norm() <= tolerance * tensor.norm(), name
        assert torch.equal(result["queue"]["keys"], results[0]["queue"]["keys"])
        assert torch.equal(result["queue"]["written"], expected["queue"]["written"])
        torch.testing.assert_close(result["load"], expected["load"])
        assert result["n_tokens"] == expected["n_tokens"]
    assert expected["losses"][-1]["contrast"] > 0


def test_single_process_does_not_import_what_several_need():
    code = "import sys, torch; before = set(sys.modules); import minidoctor.training.run; "
    code += "print([name for name in set(sys.modules) - before if name.startswith('torch.distributed')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_contain_every_answer_token_and_anchor_once(size):
    [batch] = micro_batches(make_examples()[:5], 1)
    anchors = batch.answer_positions[::3]
    pairs, owners = [], torch.zeros(len(anchors), dtype=torch.long)
    for rank in range(size):
        share, local_anchors, is_local = take_share(batch, anchors, rank, size)
        tokens, targets = share.tokens.flatten(), share.targets.flatten()
        pairs += [(tokens[i].item(), targets[i].item()) for i in share.answer_positions]
        owners += is_local
        if is_local.any():
            assert torch.equal(tokens[local_anchors], batch.tokens.flatten()[anchors[is_local]])
    tokens, targets = batch.tokens.flatten(), batch.targets.flatten()
    assert sorted(pairs) == sorted((tokens[i].item(), targets[i].item()) for i in batch.answer_positions)
    assert (owners == 1).all()


def start(size: int, *words: object, restarts: int = 0) -> subprocess.Popen:
    """Start train.py, with torchrun for more than one process, each on one thread."""
    program = [sys.executable, "train.py"]
    if size > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        program = [sys.executable, *launcher, f"--max-restarts={restarts}", "train.py"]
    command = [*program, *map(str, words)]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.fixture
def flags(make_config):
    config = make_config(steps=12, save_every=1, log_every=4, batch_size=5, lr=1e-3)
    names = ("base", "data", "eval", "steps", "batch_size", "lr", "warmup", "contrast_weight", "contrast_warmup")
    names += ("n_anchors", "queue_capacity", "queue_share", "log_every", "save_every", "device")
    return [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in names] + ["--n-experts=8", "--rank=2"]


def read_run(out: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return rows, dict(read_tensors(out / "training_state.safetensors"))


def assert_equal_runs(a: Path, b: Path, tolerance: float = 1e-6) -> None:
    (rows, tensors), (expected_rows, expected_tensors) = read_run(a), read_run(b)
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row["tokens"] == expected["tokens"]
        for name in ("loss", "lm", "balance", "contrast"):
            assert row[name] == pytest.approx(expected[name], rel=tolerance), name
    trained = [name for name in expected_tensors if is_adapter_name(name) and "optimizer" not in name]
    adapter, expected = (torch.cat([run[name].flatten() for name in trained]) for run in (tensors, expected_tensors))
    assert (adapter - expected).norm() <= tolerance * expected.norm()
    torch.testing.assert_close(tensors["queue.keys"], expected_tensors["queue.keys"])


@pytest.mark.slow
def test_run_continues_with_another_number_of_processes(flags, tmp_path):
    """12 steps of one process equal 4 steps of two, 4 of one and 4 of three."""
    finish(start(1, *flags, "--out", tmp_path / "single"))
    out = tmp_path / "mixed"
    for size, last in ((2, 4), (1, 8), (3, 12)):
        words = ["--out", out, "--resume"] if last > 4 else [*flags, "--out", out]
        process = start(size, *words)
        while last < 12 and process.poll() is None:
            if (out / "training_state.safetensors").is_file() and read_state(out).step >= last:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.01)
        process.communicate(timeout=300)
        assert read_state(out).step >= last
    assert_equal_runs(out, tmp_path / "single")
    assert json.loads((out / "report.json").read_text())["processes"] == 3
    assert json.loads((tmp_path / "single" / "report.json").read_text())["processes"] == 1


@pytest.mark.slow
def test_restarted_workers_resume_to_the_same_adapter(flags, tmp_path):
    """Workers are killed at random moments; the run ends by itself, byte for byte as an undisturbed one."""
    flags = [flag if "--steps" not in flag else "--steps=40" for flag in flags]
    finish(start(2, *flags, "--out", tmp_path / "undisturbed"))
    out, rng = tmp_path / "killed", random.Random(0)
    process = start(2, *flags, "--out", out, restarts=3)
    for step in (3, 15):
        while not (out / "training_state.safetensors").is_file() or read_state(out).step < step:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        time.sleep(rng.random() * 0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(rng.choice(children)), signal.SIGKILL)
        time.sleep(1)
    output = finish(process)
    assert (out / "adapter.safetensors").read_bytes() == (tmp_path / "undisturbed" / "adapter.safetensors").read_bytes()
    assert output.count("continuing after step") == 2


@pytest.mark.slow
def test_sharded_base_gives_the_same_run(flags, data, tmp_path):
    flags = [flag for flag in flags if "--eval=" not in flag] + [f"--eval={data}"]
    finish(start(2, *flags, "--out", tmp_path / "replicated"))
    finish(start(2, *flags, "--shard", "--out", tmp_path / "sharded"))
    assert_equal_runs(tmp_path / "sharded", tmp_path / "replicated")
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("sharded", "replicated")]
    assert reports[0]["eval_after"]["nll"] == pytest.approx(reports[1]["eval_after"]["nll"], rel=1e-5)


def measure_shards(rank: int, size: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=size)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokens = Model(SHAPE, ADAPTER), torch.randint(60, (2, 9))
    with torch.no_grad():
        expected, _ = model(tokens)
    shard_base(model, torch.device("cpu"), Processes(rank, size))

    def held() -> float:
        frozen = [p for p in model.parameters() if not p.requires_grad]
        return sum(p.to_local().numel() for p in frozen) / sum(p.numel() for p in frozen)

    shares = [held()]
    needed = estimate(model, None, TrainConfig(shard=True), 18, 4)
    whole = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    block = sum(p.nbytes for p in model.model.layers[0].parameters() if not p.requires_grad)
    shares += [needed["frozen weights"] / whole]
    with torch.inference_mode():
        evaluated, _ = model(tokens)
    hidden, _ = model.hidden(tokens, recompute=True)
    hidden.sum().backward()
    shares.append(held())
    gradients = all(p.grad is not None for p in trainable_parameters(model).values())
    names = list(adapter_state(model))
    result = {"shares": torch.tensor(shares), "equal": torch.equal(evaluated, expected), "gradients": gradients}
    result["gathered"] = needed["gathered"] == whole - (SHAPE.n_layers - 1) * block
    torch.save(result | {"names": names}, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_weights_are_halved_on_two_processes(tmp_path):
    mp.spawn(measure_shards, (2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert result["shares"].max() <= 0.6
        assert result["equal"]
        assert result["gradients"]
        assert result["gathered"]
        assert result["names"] == list(adapter_state(Model(SHAPE, ADAPTER)))


@pytest.mark.slow
def test_more_processes_than_examples_are_rejected(flags, rows_file, tmp_path):
    data = rows_file({"question": "gout?", "answer": "uric acid"}, name="one.jsonl")
    output, _ = start(2, *flags, "--data", data, "--out", tmp_path / "out").communicate(timeout=300)
    assert "2 processes for 1 examples" in output


@pytest.mark.slow
def test_evaluation_of_two_processes_equals_one(adapter_dir, base_dir, rows_file, tmp_path):
    options = {"A": "uric acid", "B": "ECG", "C": "尿酸"}
    rows = [{"question": f"Which test is number {i}?", "options": options, "answer": "ABC"[i % 3]} for i in range(21)]
    rows += [{"question": f"What is test {i}?", "answer": "uric acid"} for i in range(6)]
    results = []
    for size in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if size == 2 else []
        out = tmp_path / f"{size}.json"
        command = [sys.executable, *launcher, "-m", "minidoctor.evaluate", "--base", base_dir, "--adapter", adapter_dir]
        command += ["--data", rows_file(*rows), "--out", out, "--device", "cpu"]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(out.read_text()))
        assert done.stdout.count("not medical advice") == 1
    keys = ("id", "prediction", "answer", "correct")
    one, two = ([{key: p[key] for key in keys} for p in result["predictions"]] for result in results)
    assert one == two
    assert results[0]["summary"]["accuracy"] == results[1]["summary"]["accuracy"]
    assert results[1]["complete"]
