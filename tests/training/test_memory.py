import pytest
import torch

from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.config import QUANTIZATIONS, TARGETS, AdapterConfig, ModelConfig, TrainConfig
from minidoctor.model import Model
from minidoctor.ops.quantized import QuantizedWeight
from minidoctor.step import make_queue
from minidoctor.training.memory import (
    ADVICE,
    activations_per_token,
    estimate,
    format_estimate,
    free_memory,
)

CONFIG = ModelConfig(vocab_size=50, dim=48, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=12, ffn_dim=96)
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
TOKENS = torch.arange(4 * 64).view(4, 64) % 50


def saved_elements(model, recompute=False):
    """Return the elements of all tensors that autograd saves, each memory once, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            saved[storage.data_ptr()] = storage.nbytes() // tensor.element_size(), tensor  # held: no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden, _ = model.hidden(TOKENS, recompute=recompute)
    return sum(n for n, _ in saved.values()), hidden


@pytest.mark.parametrize("targets", [FEED_FORWARD, ("q_proj", "o_proj"), (*FEED_FORWARD, "q_proj", "v_proj", "o_proj")])
@pytest.mark.parametrize("n_experts", [1, 4])
def test_activations_per_token_are_those_that_autograd_saves(targets, n_experts):
    model = Model(CONFIG, AdapterConfig(n_experts, min(2, n_experts), 2, targets=targets))
    saved, _ = saved_elements(model)
    per_token, _ = activations_per_token(model)
    # The estimate omits the routers' logits and the final norm; the first layer saves less of its attention.
    assert 0.8 < CONFIG.n_layers * per_token * TOKENS.numel() / saved < 1.2


def test_activation_checkpointing_saves_the_inputs_of_the_blocks_only():
    model = Model(CONFIG, AdapterConfig(4, 2, 2, targets=tuple(TARGETS)))
    plain, hidden = saved_elements(model)
    recomputed, same = saved_elements(model, recompute=True)
    assert torch.equal(hidden, same)
    assert recomputed < plain / 4
    needed = [estimate(model, None, TrainConfig(recompute=r), 256, 100)["activations"] for r in (False, True)]
    assert needed[1] < 0.6 * needed[0]


def test_contrast_and_logits_have_a_fixed_size():
    config = TrainConfig(contrast_weight=0.03)
    model = Model(ModelConfig(32000, 16, 2, 2, 2, 8, 16), AdapterConfig(4, 2, 2, targets=tuple(TARGETS)))
    few, many = (estimate(model, make_queue(model, config), config, n, n // 2) for n in (1024, 65536))
    assert few["contrast"] == many["contrast"] > 0
    assert many["logits"] < 2 * few["logits"]
    assert many["activations"] == 64 * few["activations"]
    assert estimate(model, None, config, 1024, 512)["contrast"] == 0


def test_the_estimate_warns_with_advice_if_memory_is_short():
    needed = {"frozen weights": 2**30, "activations": 2**31}
    assert format_estimate(needed, 2**32) == "memory of a step: about 3.00 GiB (frozen weights 1.00, activations 2.00)"
    assert format_estimate(needed, None) == format_estimate(needed, 2**32)
    line = format_estimate(needed, 2**30)
    assert "WARNING: it needs 2.00 GiB in addition and 1.00 are free" in line
    assert ADVICE in line


def test_free_memory_is_in_bytes():
    free = free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert free_memory(torch.device("meta")) is None


def test_backpropagation_stops_at_the_first_adapted_layer():
    model = Model(CONFIG, AdapterConfig(4, 2, 2, targets=FEED_FORWARD))
    has_gradient = []
    for block in model.model.layers[:2]:
        block.self_attn.o_proj.register_forward_hook(lambda *args: has_gradient.append(args[-1].requires_grad))
    model.hidden(TOKENS)[0].sum().backward()
    assert has_gradient == [False, True]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("kind", QUANTIZATIONS[1:])
def test_frozen_weights_of_the_estimate_are_the_quantized_ones(base_dir, adapter, kind):
    config = TrainConfig()
    plain, model = (load_model(base_dir, adapter=adapter, quantize=name) for name in ("none", kind))
    needed = [estimate(m, None, config, 256, 100) for m in (plain, model)]
    embeddings = 4 * (plain.lm_head.weight.numel() + 5 * plain.config.dim)  # with the norms
    weights = [w for w in model.modules() if isinstance(w, QuantizedWeight)]
    quantized = sum(x.nbytes for w in weights for x in w.buffers())
    assert needed[0]["frozen weights"] == sum(p.nbytes for p in plain.parameters() if not p.requires_grad)
    assert needed[1]["frozen weights"] == embeddings + quantized
    assert needed[0]["dequantized"] == 0
    assert needed[1]["dequantized"] == 8 * max(w.n_weights for w in weights)
    assert needed[1].keys() == needed[0].keys()
    same = needed[0].keys() - {"frozen weights", "dequantized"}
    assert all(needed[0][name] == needed[1][name] for name in same)


def test_groups_of_experts_keep_the_values_before_the_update():
    one, two = (Model(CONFIG, AdapterConfig(8, 2, 2, targets=FEED_FORWARD, n_groups=n)) for n in (1, 2))
    needed = [estimate(model, None, TrainConfig(), 256, 100) for model in (one, two)]
    assert needed[1]["trainable"] == needed[0]["trainable"] * 20 // 16
    assert needed[1] | {"trainable": 0} == needed[0] | {"trainable": 0}
