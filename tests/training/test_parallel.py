"""Several processes on CPUs (gloo) against the step of one process."""

import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from minidoctor.batching import IGNORE, Example, ShuffledBatches, micro_batches
from minidoctor.config import AdapterConfig, ModelConfig, TrainConfig
from minidoctor.model import Model, trainable_parameters
from minidoctor.step import make_optimizer, make_queue, train_step
from minidoctor.training.parallel import Processes, take_share

SHAPE = ModelConfig(vocab_size=60, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48)
ADAPTER = AdapterConfig(n_experts=4, top_k=2, rank=2, alpha=4.0, routing_dim=4)
CONFIG = TrainConfig(
    steps=20, batch_size=7, accumulate=2, lr=1e-2, warmup=2, contrast_weight=0.5, contrast_warmup=0, n_anchors=16,
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
        options = {"compute_losses": processes.compute_losses, "all_reduce": processes.all_reduce}
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
        expected = batch.tokens.flatten()[anchors[is_local]]
        assert torch.equal(tokens[local_anchors[is_local]], expected)
    tokens, targets = batch.tokens.flatten(), batch.targets.flatten()
    assert sorted(pairs) == sorted((tokens[i].item(), targets[i].item()) for i in batch.answer_positions)
    assert (owners == 1).all()
