"""The training step against definitions: loops, sums and single rows."""

import dataclasses
import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minidoctor import step as step_module
from minidoctor.batching import Batch, ShuffledBatches, collate, micro_batches
from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.config import TARGETS, AdapterConfig, TrainConfig
from minidoctor.losses import contrastive_routing_loss, load_balance_loss
from minidoctor.model import trainable_parameters
from minidoctor.questions.json_rows import parse_row
from minidoctor.step import compute_losses, learning_rate, make_optimizer, make_queue, train_step
from minidoctor.text.tokenizer import encode_conversation

ADAPTER_CONFIG = AdapterConfig(n_experts=4, top_k=2, rank=2, alpha=4.0, routing_dim=4, targets=tuple(TARGETS))
GROUPED = dataclasses.replace(ADAPTER_CONFIG, n_experts=8, n_groups=2)


def read_examples(config, tokenizer):
    rows = [parse_row(json.loads(line), "") for line in Path(config.data).read_text().splitlines()]
    return [encode_conversation(row.messages, tokenizer, config.max_seq_len) for row in rows]


def adapted_model(config, adapter):
    """Return the base with experts that do something: lora_b is not zero."""
    torch.manual_seed(0)
    model = load_model(config.base, adapter=adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                nn.init.normal_(parameter, std=0.3)
    return model


def one_step(config, tokenizer, n_micro=1, step=0, queue=None, change=lambda batch: batch):
    """Return the model, the metrics and the gradient of one step on the first batch."""
    model = adapted_model(config, ADAPTER_CONFIG)
    optimizer = torch.optim.SGD(trainable_parameters(model).values())
    optimizer.step = optimizer.zero_grad = lambda: None  # keeps the parameters and the gradient
    batch = next(ShuffledBatches(read_examples(config, tokenizer), config.batch_size, 0).starting_at(step))
    batches = [change(part) for part in micro_batches(batch, n_micro)]
    metrics = train_step(model, optimizer, queue, batches, step, config)
    return model, metrics, {name: p.grad for name, p in trainable_parameters(model).items()}


def test_gradient_accumulation_equals_the_large_batch(make_config, tokenizer):
    config = make_config(balance_weight=0.0, contrast_weight=0.0, clip=1e9, batch_size=8)
    _, whole, expected = one_step(config, tokenizer, n_micro=1)
    for n_micro in (2, 3, 8):
        _, metrics, gradient = one_step(config, tokenizer, n_micro=n_micro)
        torch.testing.assert_close(metrics.losses["lm"], whole.losses["lm"])
        for name in expected:
            torch.testing.assert_close(gradient[name], expected[name])


def test_micro_batches_come_in_random_order(make_config, tokenizer):
    """The queue keeps the last keys of an expert, which must not always be those of the longest examples."""
    config, lasts = make_config(batch_size=8), set()
    parts = micro_batches(read_examples(config, tokenizer)[:8], 4)
    for step in range(12):
        order = []
        model = adapted_model(config, ADAPTER_CONFIG)

        def losses(model, batch, *rest, order=order):
            order.append(next(i for i, part in enumerate(parts) if part is batch))
            return compute_losses(model, batch, *rest)

        train_step(model, make_optimizer(model, config), None, parts, step, config, losses)
        assert sorted(order) == [0, 1, 2, 3]
        lasts.add(order[-1])
    assert len(lasts) > 2


def test_labels_of_prompt_and_padding_do_not_change_the_loss(make_config, tokenizer):
    def scrambled(batch: Batch) -> Batch:
        targets = torch.randint_like(batch.targets, 50)
        answers = torch.zeros(targets.numel(), dtype=torch.bool)
        answers[batch.answer_positions] = True
        return batch._replace(targets=torch.where(answers.view_as(targets), batch.targets, targets))

    config = make_config()
    _, metrics, gradient = one_step(config, tokenizer)
    _, other, other_gradient = one_step(config, tokenizer, change=scrambled)
    assert metrics.losses["loss"] == other.losses["loss"]
    assert all(torch.equal(gradient[name], other_gradient[name]) for name in gradient)

    def relabeled(batch: Batch) -> Batch:  # the label of an answer token changes the loss
        targets = batch.targets.flatten().clone()
        targets[batch.answer_positions[0]] += 1
        return batch._replace(targets=targets.view_as(batch.targets))

    assert one_step(config, tokenizer, change=relabeled)[1].losses["lm"] != metrics.losses["lm"]


def test_balance_is_computed_per_layer_without_padding(make_config, tokenizer):
    config = make_config()
    seen = []
    model, metrics, _ = one_step(config, tokenizer, change=lambda batch: seen.append(batch) or batch)
    with torch.no_grad():
        _, routings = model(seen[0].tokens)
    assert not seen[0].attention_mask.all()
    each = [load_balance_loss(r.probs, r.expert_ids, seen[0].attention_mask) for r in routings]
    torch.testing.assert_close(metrics.losses["balance"], torch.stack(each).mean())
    together = load_balance_loss(
        torch.cat([r.probs for r in routings]),
        torch.cat([r.expert_ids for r in routings]),
        seen[0].attention_mask.repeat(len(routings), 1),
    )
    assert not torch.allclose(together, torch.stack(each).mean(), rtol=1e-3)


def test_contrast_uses_the_queue_before_this_step_is_enqueued(make_config, tokenizer):
    config = make_config()
    torch.manual_seed(0)
    queue = make_queue(load_model(config.base, adapter=ADAPTER_CONFIG), config)
    _, metrics, _ = one_step(config, tokenizer, queue=queue)
    assert metrics.losses["contrast"] == 0  # the queue is empty at step 0
    assert queue.written.sum() > 0
    keys, filled = queue.keys.clone(), queue.filled()
    seen = []
    model, metrics, _ = one_step(
        config, tokenizer, step=1, queue=queue, change=lambda batch: seen.append(batch) or batch
    )
    n_answers = len(seen[0].answer_positions)
    rng = random.Random(config.seed * 1_000_003 + 1)
    rng.sample(seen, 1)  # the order of the micro-batches
    drawn = rng.sample(range(n_answers), min(n_answers, config.n_anchors))
    anchors = seen[0].answer_positions[drawn]
    with torch.no_grad():
        _, routings = model(seen[0].tokens)
        z = torch.stack([r.z.flatten(0, 1)[anchors] for r in routings])
        gates = torch.stack([r.gates.flatten(0, 1)[anchors] for r in routings])
        expected = contrastive_routing_loss(z, gates, keys, filled, config.contrast_temperature)
    torch.testing.assert_close(metrics.losses["contrast"], expected)


def test_total_is_the_weighted_sum_and_contrast_warms_up(make_config, tokenizer):
    config = make_config(balance_weight=0.3, contrast_weight=0.5, contrast_warmup=4)
    torch.manual_seed(0)
    queue = make_queue(load_model(config.base, adapter=ADAPTER_CONFIG), config)
    one_step(config, tokenizer, queue=queue)
    _, metrics, _ = one_step(config, tokenizer, step=1, queue=queue)
    losses = metrics.losses
    assert losses["contrast"] > 0
    expected = losses["lm"] + 0.3 * losses["balance"] + 0.5 * (2 / 4) * losses["contrast"]
    torch.testing.assert_close(losses["loss"], expected)


@pytest.mark.parametrize("switched_off", ["contrast_weight", "balance_weight"])
def test_each_routing_loss_changes_the_router_gradient(make_config, tokenizer, switched_off):
    gradients = []
    for config in (make_config(), make_config(**{switched_off: 0.0})):
        torch.manual_seed(0)
        queue = make_queue(load_model(config.base, adapter=ADAPTER_CONFIG), make_config())
        one_step(config, tokenizer, queue=queue)
        gradients.append(one_step(config, tokenizer, step=1, queue=queue)[2])
    name = "model.layers.0.mlp.router.projection"
    assert not torch.allclose(gradients[0][name], gradients[1][name])


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    config = TrainConfig(steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))


def test_activation_checkpointing_gives_the_same_gradients(make_config, tokenizer):
    config = make_config()
    plain = one_step(config, tokenizer)[2]
    again = one_step(dataclasses.replace(config, recompute=True), tokenizer)[2]
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


class NoSynchronization(TorchDispatchMode):
    """Fail where a value is read from a tensor or a shape depends on one: on a GPU the CPU would wait for it."""

    synchronizing = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.synchronizing, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapter", [ADAPTER_CONFIG, GROUPED])
def test_step_has_no_host_device_synchronization(adapter, make_config, tokenizer):
    config = make_config()
    torch.manual_seed(0)
    model = load_model(config.base, adapter=adapter)
    optimizer, queue = make_optimizer(model, config), make_queue(model, config)
    batch = next(ShuffledBatches(read_examples(config, tokenizer), config.batch_size, 0).starting_at(0))
    parts = micro_batches(batch, 2)
    with NoSynchronization():
        train_step(model, optimizer, queue, parts, 0, config)


def test_custom_losses_are_weighted_like_the_default_terms(make_config, tokenizer):
    config = make_config(contrast_weight=0.5, contrast_warmup=0, balance_weight=0.0)
    torch.manual_seed(0)
    model = load_model(config.base, adapter=ADAPTER_CONFIG)
    parts = [collate(read_examples(config, tokenizer)[:4])]
    seen = []

    def custom_losses(model, batch, anchors, queue, config):
        seen.append(anchors)
        losses = compute_losses(model, batch, anchors, queue, config)
        contrast = 3 * model.model.layers[0].mlp.router.scale
        return losses._replace(terms=losses.terms | {"contrast": contrast})

    losses = train_step(model, make_optimizer(model, config), None, parts, 0, config, custom_losses).losses
    torch.testing.assert_close(losses["loss"], losses["lm"] + 0.5 * losses["contrast"])
    assert set(seen[0].tolist()) <= set(parts[0].answer_positions.tolist())
    assert losses["contrast"] != 0


def test_step_reports_the_load_of_the_anchors_and_the_fill_of_the_queue(make_config, tokenizer):
    config = make_config()
    torch.manual_seed(0)
    queue = make_queue(load_model(config.base, adapter=ADAPTER_CONFIG), config)
    _, metrics, _ = one_step(config, tokenizer, queue=queue)
    assert metrics.expert_load.shape == (4, 4)  # attention and feed-forward of two layers, four experts
    torch.testing.assert_close(metrics.expert_load.sum(1), torch.ones(4))
    filled = sum(min(int(n), config.queue_capacity) for n in queue.written.flatten())
    assert metrics.queue_fill.item() == pytest.approx(filled / (16 * config.queue_capacity))
    assert 0 < filled < 16 * config.queue_capacity


@pytest.mark.parametrize("adapter", [ADAPTER_CONFIG, GROUPED])
def test_step_runs_on_the_meta_device(adapter, make_config, tokenizer):
    """No tensor is on another device and no value is read back: either one raises an error on `meta`."""
    config = make_config()
    model = load_model(config.base, adapter=adapter).to("meta")
    optimizer, queue = make_optimizer(model, config), make_queue(model, config)
    batches = micro_batches(read_examples(config, tokenizer)[:6], 2)
    for step in range(2):
        metrics = train_step(model, optimizer, queue, batches, step, config)
    tensors = [*metrics.losses.values(), metrics.expert_load, metrics.queue_fill, metrics.grad_norm, queue.keys]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bfloat16_step_on_a_gpu_is_close_to_float32_on_the_cpu(make_config, tokenizer):
    config, losses = make_config(), []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        torch.manual_seed(0)
        model = load_model(config.base, dtype, device, ADAPTER_CONFIG)
        optimizer, queue = make_optimizer(model, config), make_queue(model, config)
        batches = micro_batches(read_examples(config, tokenizer)[:8], 2)
        losses.append(
            [train_step(model, optimizer, queue, batches, step, config).losses["lm"].item() for step in range(3)]
        )
    assert losses[1] == pytest.approx(losses[0], rel=0.03)  # bfloat16 has 8 significant bits
    assert losses[0][2] < losses[0][0]


def test_update_of_a_group_is_scaled_by_its_share_of_the_anchors(make_config, tokenizer, monkeypatch):
    config = make_config(n_anchors=5, lr=0.1, warmup=0)
    batch, chosen = micro_batches(read_examples(config, tokenizer)[:8], 1), []

    def spy(*arguments):
        chosen.append(compute_losses(*arguments))
        return chosen[-1]

    def moves():
        model = adapted_model(config, GROUPED)
        before = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
        train_step(model, make_optimizer(model, config), None, batch, 0, config, spy)
        return {name: p.detach() - before[name] for name, p in trainable_parameters(model).items()}

    scaled = moves()
    monkeypatch.setattr(step_module, "scale_updates", lambda *_: None)
    share = (chosen[0].top1[0] >= 4).float().mean().item()  # of the second group
    factors = torch.tensor([min(1, 2 * (1 - share)), min(1, 2 * share)])
    assert factors.min() not in (0, 1)
    for name, move in moves().items():
        if name.endswith("lora_a"):
            move *= factors.repeat_interleave(8)[:, None]
        elif name.endswith("lora_b"):
            move *= factors.repeat_interleave(8)
        elif name.endswith("embeddings"):
            move *= factors.repeat_interleave(4)[:, None]
        torch.testing.assert_close(scaled[name], move, rtol=1e-5, atol=1e-6)  # differences of nearly equal numbers
        assert move.any()
