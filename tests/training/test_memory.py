import pytest
import torch

from minidoctor.bench.implementations import drawn_batch
from minidoctor.config import AdapterConfig, ModelConfig, TrainConfig
from minidoctor.losses import language_model_loss
from minidoctor.model import Model
from minidoctor.training.memory import ADVICE, activations_per_token, estimate, free_memory, in_words, out_of_memory

CONFIG = ModelConfig(vocab_size=50, dim=48, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=12, ffn_dim=96)
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def kept_for_the_way_back(model, batch, recompute=False):
    """Numbers in all tensors that autograd saves in a forward pass, each memory once, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            seen[storage.data_ptr()] = (
                storage.nbytes() // tensor.element_size(),
                tensor,
            )  # held, so that none is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden, _ = model.hidden(batch.tokens, recompute=recompute)
    return sum(n for n, _ in seen.values()), hidden


@pytest.mark.parametrize("targets", [FEED_FORWARD, ("q_proj", "o_proj"), (*FEED_FORWARD, "q_proj", "v_proj", "o_proj")])
@pytest.mark.parametrize("n_experts", [1, 4])
def test_what_a_block_keeps_is_what_autograd_saves(targets, n_experts):
    model = Model(CONFIG, AdapterConfig(n_experts, min(2, n_experts), 2, targets=targets))
    batch = drawn_batch(50, 4, 64)
    saved, _ = kept_for_the_way_back(model, batch)
    kept, _ = activations_per_token(model)
    # The routers' few numbers and the final norm are not in the estimate, the first layer needs less of its attention.
    assert 0.8 < CONFIG.n_layers * kept * batch.tokens.numel() / saved < 1.2


def test_recomputing_keeps_the_inputs_of_the_blocks_alone():
    model = Model(CONFIG, AdapterConfig(4, 2, 2))
    batch = drawn_batch(50, 4, 64)
    plain, hidden = kept_for_the_way_back(model, batch)
    less, again = kept_for_the_way_back(model, batch, recompute=True)
    assert torch.equal(hidden, again)
    assert less < plain / 4
    needed = [estimate(model, TrainConfig(recompute=r), 256, 100)["activations"] for r in (False, True)]
    assert needed[1] < 0.6 * needed[0]


def test_contrast_and_logits_have_a_fixed_size():
    model = Model(ModelConfig(32000, 16, 2, 2, 2, 8, 16), AdapterConfig(4, 2, 2))
    few, many = (estimate(model, TrainConfig(contrast_weight=0.03), n, n // 2) for n in (1024, 65536))
    assert few["contrast"] == many["contrast"] > 0
    assert many["logits"] < 2 * few["logits"]
    assert many["activations"] == 64 * few["activations"]
    assert estimate(model, TrainConfig(contrast_weight=0.0), 1024, 512)["contrast"] == 0


def test_the_report_warns_when_it_will_not_fit():
    needed = {"frozen weights": 2**30, "activations": 2**31}
    assert in_words(needed, 2**32) == "memory of a step: about 3.00 GiB (frozen weights 1.00, activations 2.00)"
    assert in_words(needed, None).count("\n") == 0
    line = in_words(needed, 2**30)
    assert "WARNING: 2.00 GiB more are needed and 1.00 are free" in line
    assert ADVICE in line


def test_what_is_free_and_what_it_is_called_when_nothing_is():
    free = free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_nothing_below_the_first_experts_is_walked_back_and_nothing_frozen_has_a_gradient():
    model = Model(CONFIG, AdapterConfig(4, 2, 2, targets=FEED_FORWARD))
    batch = drawn_batch(50, 2, 16)
    reached = []
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    for module in (first, second):
        module.o_proj.register_forward_hook(lambda module, inputs, out: reached.append(out.requires_grad))
    hidden, _ = model.hidden(batch.tokens)
    language_model_loss(hidden, model.lm_head.weight, batch.targets, batch.answer_positions).backward()
    assert reached == [False, True]
    assert all((p.grad is None) == (not p.requires_grad) or "router" in name for name, p in model.named_parameters())
