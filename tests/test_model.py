"""The decoder against stored logits of an independent implementation, and against its definitions."""

import math
import shutil
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from paths import FIXTURES
from torch import nn

import minidoctor.model as model_module
from minidoctor.checkpoints.hugging_face import load_model, read_stored, save_model
from minidoctor.config import AdapterConfig, ModelConfig, SampleConfig
from minidoctor.files.safetensors import read_tensors
from minidoctor.generate import generate
from minidoctor.kv_cache import KVCache
from minidoctor.model import (
    Model,
    adapter_state,
    alibi_slopes,
    is_adapter_name,
    position_info,
    project,
    rotary_frequencies,
    rotary_table,
    rotate,
    trainable_parameters,
)
from minidoctor.ops.compiled import compile_blocks, compile_decoding
from minidoctor.ops.linear import join_projections

TINY = ModelConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48)
EVERYWHERE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUPED = AdapterConfig(n_experts=8, routing_dim=8, targets=EVERYWHERE, n_groups=2)
MODELS = FIXTURES / "models"
FAMILIES = sorted(path.name for path in MODELS.iterdir())


def tiny_model(adapter: AdapterConfig | None = None) -> Model:
    """Random weights; the experts too, so that they matter."""
    torch.manual_seed(0)
    model = Model(TINY, adapter).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                nn.init.normal_(parameter, std=0.3)
    return model


def prompts_and_logits(family):
    """Return the prompts, logits and greedy tokens that `transformers` computed one by one: see `make_fixtures.py`."""
    stored = dict(read_tensors(MODELS / family / "expected.safetensors"))
    lengths = sorted((int(name.split(".")[1]) for name in stored if name.startswith("tokens.")), reverse=True)
    return [(stored[f"tokens.{n}"], stored[f"logits.{n}"], stored[f"greedy.{n}"]) for n in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_family_equal_an_independent_implementation(family):
    """One right-padded batch, with positions beyond the window and beyond the original context."""
    model, expected = load_model(MODELS / family), prompts_and_logits(family)
    tokens = nn.utils.rnn.pad_sequence([tokens for tokens, _, _ in expected], batch_first=True)
    with torch.no_grad():
        logits, _ = model(tokens)
    for ours, (_, theirs, _) in zip(logits, expected, strict=True):
        torch.testing.assert_close(ours[: len(theirs)], theirs)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["default positions", "positions"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_logits_of_every_family_equal_an_independent_implementation(family, given, joined):
    model, expected = load_model(MODELS / family), prompts_and_logits(family)
    if joined:
        join_projections(model)
    for tokens, theirs, _ in expected:
        cache = KVCache(model.config, 1, len(tokens), model.lm_head.weight)
        for first, last in [(0, 3), (3, 5), *((i, i + 1) for i in range(5, len(tokens)))]:
            positions = torch.arange(first, last)[None] if given else None
            with torch.no_grad():
                logits, _ = model(tokens[None, first:last], positions, cache)
            torch.testing.assert_close(logits[0], theirs[first:last])


def test_joined_projections_with_experts_equal_separate_ones():
    # In float32 the rounding of some CPUs exceeds the default tolerance.
    model, tokens = tiny_model(GROUPED).double(), torch.randint(50, (2, 9))
    seed, results = torch.randn(2, 9, 50, dtype=torch.float64), []
    for joined in (False, True):
        if joined:
            join_projections(model)
            assert model.model.layers[0].mlp.up_proj.joined is not None
        with torch.no_grad():
            inferred = model(tokens)[0]
        gradients = torch.autograd.grad(model(tokens)[0], list(trainable_parameters(model).values()), seed)
        results.append([inferred, *gradients])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("window", [0, 4])
def test_mask_exists_only_where_a_key_is_excluded(window):
    config, x = replace(TINY, window=window), torch.zeros(2, 3, TINY.dim)
    cache = KVCache(config, 2, 9, x)
    masked = [position_info(config, x, None, None).mask is not None]
    for n, positions in ((3, None), (1, None), (1, None), (2, None), (1, torch.full((2, 1), 7))):
        cache.reserve(2, n)
        masked.append(position_info(config, x[:, :n], positions, cache).mask is not None)
    assert masked == [False, False, False, window > 0, True, True]


def test_rotary_table_is_computed_once_per_cache(monkeypatch):
    model, tables = tiny_model(), []
    monkeypatch.setattr(model_module, "rotary_table", lambda *args: tables.append(args) or rotary_table(*args))
    list(generate(model, [[1, 2, 3]], SampleConfig(max_new_tokens=6), ()))
    assert len(tables) == 1
    list(generate(model, [[1, 2, 3], [4]], SampleConfig(max_new_tokens=6), ()))
    assert len(tables) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_every_family_equal_an_independent_implementation(family):
    model, expected = load_model(MODELS / family), prompts_and_logits(family)
    prompts = [tokens.tolist() for tokens, _, _ in expected]
    steps = list(generate(model, prompts, SampleConfig(temperature=0.0, max_new_tokens=64), stop_ids=()))
    for decoded, (_, _, theirs) in zip(zip(*steps, strict=True), expected, strict=True):
        assert list(decoded) == theirs.tolist()
        assert len(decoded) == 64


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama-linear", {"rope_scaling": None}),
        ("llama3", {"rope_scaling": None}),
        ("mistral", {"window": 0}),
        ("mistral", {"window": 9}),
        ("qwen3", {"norm_eps": 1e-3}),
    ],
)
def test_stored_logits_differ_for_a_wrong_switch(family, change):
    model, (tokens, theirs, _) = load_model(MODELS / family), prompts_and_logits(family)[0]
    wrong = Model(replace(model.config, **change)).eval()
    wrong.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert not torch.allclose(wrong(tokens[None])[0][0], theirs, atol=1e-3)


def test_no_token_attends_to_later_tokens():
    model = tiny_model(GROUPED)
    tokens = torch.randint(0, 50, (2, 10))
    logits, routings = model(tokens)
    for t in range(9):
        changed = tokens.clone()
        changed[:, t + 1] = (changed[:, t + 1] + 1) % 50
        other, other_routings = model(changed)
        assert torch.equal(other[:, : t + 1], logits[:, : t + 1])
        assert not torch.allclose(other[:, t + 1 :], logits[:, t + 1 :])
        for ours, theirs in zip(routings, other_routings, strict=True):
            assert torch.equal(ours.gates[:, : t + 1], theirs.gates[:, : t + 1])


def test_tokens_choose_from_the_group_with_the_most_votes_so_far():
    model, tokens = tiny_model(GROUPED), torch.randint(0, 50, (6, 9))
    _, routings = model(tokens)
    chosen = set()
    for row in range(6):
        votes = torch.zeros(2)
        for t in range(9):
            embedding = model.model.embed_tokens.weight[tokens[row, t]]
            votes += torch.stack([(embedding - model.groups.mean) @ centre for centre in model.groups.centres])
            group = int(votes.argmax())
            assert all(set(r.expert_ids[row, t].tolist()) <= set(range(4 * group, 4 * group + 4)) for r in routings)
            chosen.add(group)
    assert chosen == {0, 1}


def test_votes_continue_those_of_a_prefix():
    model, tokens = tiny_model(GROUPED), torch.randint(0, 50, (2, 9))
    tokens[:, :4] = tokens[0, :4]
    with torch.no_grad():
        full, _ = model(tokens)
        prefix = KVCache(TINY, 1, 4, model.lm_head.weight)
        model(tokens[:1, :4], cache=prefix)
        cache = prefix.expand(TINY, 2, 9)
        torch.testing.assert_close(model(tokens[:, 4:6], cache=cache)[0], full[:, 4:6])
        torch.testing.assert_close(model(tokens[:, 6:], cache=cache)[0], full[:, 6:])
        prefix.votes += torch.tensor([0.0, 1e6])  # the test could not fail if the votes did not matter
        other, _ = model(tokens[:, 4:6], cache=prefix.expand(TINY, 2, 9))
    assert not torch.allclose(other, full[:, 4:6])


def test_cached_steps_equal_the_full_forward_for_rows_of_different_lengths():
    model = tiny_model(GROUPED).double()
    tokens = torch.randint(0, 50, (3, 12))
    lengths = torch.tensor([7, 3, 5])  # each row's prompt; the rest follows one token at a time
    with torch.no_grad():
        full, _ = model(tokens)
        cache = KVCache(TINY, 3, 12, model.lm_head.weight)
        prompt = tokens[:, :7].masked_fill(torch.arange(7) >= lengths[:, None], 0)
        logits, _ = model(prompt, torch.arange(7).expand(3, 7), cache)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(logits[row, :length], full[row, :length])
        for step in range(5):
            positions = lengths + step
            logits, _ = model(tokens[torch.arange(3), positions][:, None], positions[:, None], cache)
            torch.testing.assert_close(logits[:, 0], full[torch.arange(3), positions])


def test_right_padding_does_not_change_the_logits():
    model = tiny_model()
    tokens = torch.randint(0, 50, (2, 6))
    padded = torch.cat([tokens, torch.zeros(2, 4, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(padded)[0][:, :6], model(tokens)[0])


def test_adapted_model_equals_the_base_bit_for_bit_before_training(tmp_path):
    save_model(tiny_model(), tmp_path, torch.float32)
    tokens = torch.randint(0, 50, (2, 10))
    adapter = GROUPED
    adapted, base = load_model(tmp_path, adapter=adapter), load_model(tmp_path)
    logits, routings = adapted(tokens)
    assert torch.equal(logits, base(tokens)[0])
    assert len(routings) == 4  # attention and feed-forward of two layers
    assert not base(tokens)[1]


def test_only_experts_and_routers_are_trainable():
    model = tiny_model(AdapterConfig(targets=("gate_proj", "up_proj", "down_proj")))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained | {"groups.centres", "groups.mean"} == set(adapter_state(model))
    assert all(is_adapter_name(name) for name in adapter_state(model))
    per_layer = 3 * 2 + 3  # A and B of three linears; the router's projection, embeddings and scale
    assert len(trained) == 2 * per_layer


def test_the_same_seed_gives_the_same_experts_for_every_dtype(tmp_path):
    save_model(tiny_model(), tmp_path, torch.float32)
    torch.manual_seed(3)
    loaded = adapter_state(load_model(tmp_path, adapter=AdapterConfig(targets=EVERYWHERE)))
    torch.manual_seed(3)
    again = adapter_state(load_model(tmp_path, torch.bfloat16, adapter=AdapterConfig(targets=EVERYWHERE)))
    assert all(torch.equal(loaded[name], again[name]) for name in loaded)


def test_rotation_depends_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    frequencies = rotary_frequencies(TINY, torch.device("cpu"))

    def score(i: int, j: int) -> float:
        tables = [rotary_table(torch.tensor([[p]]), frequencies, torch.float32) for p in (i, j)]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum().item()

    assert score(5, 3) == pytest.approx(score(105, 103), rel=1e-4)
    assert abs(score(5, 3) - score(5, 4)) > 1e-3


def test_rotation_rotates_each_pair_by_its_angle():
    x = torch.randn(1, 1, 1, 4)
    frequencies = rotary_frequencies(replace(TINY, head_dim=4, rope_theta=100.0), torch.device("cpu"))
    turned = rotate(x, rotary_table(torch.tensor([[3]]), frequencies, torch.float32)).flatten()
    for pair, angle in ((0, 3.0), (1, 3.0 / 10)):
        complex_number = torch.complex(x.flatten()[pair], x.flatten()[pair + 2])
        expected = complex_number * torch.polar(torch.tensor(1.0), torch.tensor(angle))
        torch.testing.assert_close(torch.complex(turned[pair], turned[pair + 2]), expected)


def test_a_bfloat16_base_trains_float32_experts(tmp_path):
    save_model(tiny_model(), tmp_path)
    model = load_model(tmp_path, torch.bfloat16, adapter=GROUPED)
    logits, _ = model(torch.randint(0, 50, (2, 10)))
    logits.float().logsumexp(-1).mean().backward()
    assert logits.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if is_adapter_name(name) else torch.bfloat16)
        assert (parameter.grad is not None) == is_adapter_name(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_names_are_those_of_the_checkpoint(family):
    stored = {name for name in read_stored(MODELS / family) if not name.endswith("inv_freq")}
    ours = set(load_model(MODELS / family).state_dict())
    packed = {name.replace("W_pack", part) for name in stored for part in ("q_proj", "k_proj", "v_proj")}
    assert ours == packed | (ours & {"lm_head.weight"})


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiled_blocks_give_the_same_results():
    plain = tiny_model(AdapterConfig(4, 2, 2, targets=EVERYWHERE, routing_dim=8))
    compiled = deepcopy(plain)
    compile_blocks(compiled.model.layers)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for n_rows, n_tokens in ((3, 9), (2, 14)):
        tokens = torch.randint(0, 50, (n_rows, n_tokens))
        results = []
        for model in (plain, compiled):
            model.zero_grad()
            logits, routings = model(tokens)
            logits.logsumexp(-1).mean().backward()
            results.append((logits, routings[0].gates, {n: p.grad for n, p in trainable_parameters(model).items()}))
        # Not to the last bit: fused operations do not round their intermediate results.
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    config = SampleConfig(max_new_tokens=12)
    for prompts in ([[4, 8, 15], [16, 23, 42, 7, 9]], [[4, 8, 15]]):  # one row has a separate compiled form
        decoded = [list(generate(model, prompts, config, ())) for model in (plain, compiled)]
        assert decoded[0] == decoded[1]


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiled_step_with_a_static_cache_gives_the_same_tokens():
    plain = tiny_model(GROUPED)
    compiled = deepcopy(plain)
    compiled.compile(mode="reduce-overhead", fullgraph=True)  # as compile_decoding does on a GPU
    for prompts in ([[4, 8, 15], [16, 23, 42, 7, 9]], [[4, 8, 15]]):
        decoded = [
            list(generate(model, prompts, SampleConfig(max_new_tokens=6, static_cache=model is compiled), ()))
            for model in (plain, compiled)
        ]
        assert decoded[0] == decoded[1]
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    list(generate(compiled, [[5, 3]], SampleConfig(max_new_tokens=9, static_cache=True), ()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames > 0


def test_fix_shapes_marks_all_that_a_step_writes():
    model = tiny_model(GROUPED)
    cache = KVCache(model.config, 2, 12, model.lm_head.weight)
    model(torch.ones(2, 3, dtype=torch.long), cache=cache)
    assert cache.votes is not None
    cache.fix_shapes()
    for stored in (*cache.layers[0], *cache.layers[-1], cache.votes):  # CUDA graphs are skipped for other tensors
        assert stored._dynamo_static_input_type == "unguarded"


def test_compile_reports_a_machine_without_compiler(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler\nand more lines")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match=r"--compile .*: no compiler$"):
        compile_blocks(tiny_model().model.layers)


@pytest.mark.parametrize("family", ["llama", "mistral"])  # without and with a window
def test_forward_and_cached_decoding_run_on_the_meta_device(family):
    """No tensor is on another device and no value is read back: either one raises an error on `meta`."""
    config = load_model(MODELS / family).config
    with torch.no_grad(), torch.device("meta"):
        model = Model(config, GROUPED).to("meta")
        cache = KVCache(config, 2, 40, model.lm_head.weight)
        for n_tokens in (20, 1, 1):
            start = cache.length
            positions = (start + torch.arange(n_tokens)).expand(2, n_tokens)
            logits, routings = model(torch.zeros(2, n_tokens, dtype=torch.long), positions, cache)
    assert logits.shape == (2, 1, config.vocab_size)
    assert {tensor.device.type for routing in routings for tensor in routing} == {"meta"}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("graphs", [False, True], ids=["blocks", "CUDA graphs"])
def test_compiled_decoding_on_a_gpu_equals_eager_decoding(graphs):
    plain = tiny_model(GROUPED).to("cuda")
    compiled = deepcopy(plain)
    if graphs:
        assert compile_decoding(compiled)
    else:
        compile_blocks(compiled.model.layers)
    for prompts in ([[4, 8, 15], [16, 23, 42, 7, 9]], [[4, 8, 15]], [[3, 5]]):
        configs = [SampleConfig(max_new_tokens=12, static_cache=static) for static in (False, graphs)]
        models = zip((plain, compiled), configs, strict=True)
        decoded = [list(generate(model, prompts, config, ())) for model, config in models]
        assert decoded[0] == decoded[1]
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("n_heads", [4, 6, 40])
def test_alibi_slopes_equal_the_published_definition(n_heads):
    def power_of_two_slopes(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start ** (i + 1) for i in range(n)]

    n = 2 ** math.floor(math.log2(n_heads))
    expected = power_of_two_slopes(n) + power_of_two_slopes(2 * n)[0::2][: n_heads - n]
    torch.testing.assert_close(alibi_slopes(n_heads, torch.device("cpu")), torch.tensor(expected))


def alibi_model(n_heads: int) -> Model:
    torch.manual_seed(0)
    shape = replace(TINY, alibi=True, n_heads=n_heads, n_kv_heads=n_heads, max_seq_len=12)
    return Model(shape, GROUPED).eval()


@pytest.mark.parametrize("n_heads", [4, 6])
def test_alibi_attention_equals_a_loop_over_heads_and_queries(n_heads):
    model, tokens = alibi_model(n_heads), torch.randint(0, 50, (1, 15))  # beyond the context length of training
    block = model.model.layers[0]
    with torch.no_grad():
        x = block.input_layernorm(model.model.embed_tokens(tokens))
        ours, routing = block.self_attn(x, position_info(model.config, x, None, None), None)
        layers = (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
        q, k, v = (project(layer, x, routing)[0].unflatten(-1, (n_heads, -1)) for layer in layers)
        slopes, rows = alibi_slopes(n_heads, torch.device("cpu")), []
        for t in range(15):
            heads = []
            for h in range(n_heads):
                scores = k[: t + 1, h] @ q[t, h] / 8**0.5 - slopes[h] * (t - torch.arange(t + 1))
                heads.append(scores.softmax(0) @ v[: t + 1, h])
            rows.append(torch.cat(heads))
        expected = project(block.self_attn.o_proj, torch.stack(rows)[None], routing)
    torch.testing.assert_close(ours, expected)


def test_alibi_is_the_same_with_a_cache_in_padded_batches_and_beyond_the_context():
    model = alibi_model(6)
    tokens, lengths = torch.randint(0, 50, (3, 20)), torch.tensor([20, 11, 16])
    with torch.no_grad():
        full, _ = model(tokens)
        padded, _ = model(tokens.masked_fill(torch.arange(20) >= lengths[:, None], 0))
        for row, length in enumerate(lengths):
            torch.testing.assert_close(padded[row, :length], full[row, :length])
        cache = KVCache(model.config, 3, 20, model.lm_head.weight)
        for first, last in [(0, 7), *((i, i + 1) for i in range(7, 20))]:
            logits, _ = model(tokens[:, first:last], torch.arange(first, last).expand(3, -1), cache)
            torch.testing.assert_close(logits, full[:, first:last])
        rotary = Model(replace(model.config, alibi=False), model.adapter).eval()
        rotary.load_state_dict(model.state_dict())
        assert not torch.allclose(rotary(tokens)[0], full, atol=1e-3)
