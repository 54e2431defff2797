"""Checkpoints that are quantized while they are loaded, against the checkpoint with dequantized weights."""

import json
from dataclasses import replace

import pytest
import torch
from paths import FIXTURES
from torch import nn

from minidoctor.checkpoints.adapters import CONFIG, load, load_adapted_model, save_adapter_config
from minidoctor.checkpoints.hugging_face import load_model, save_model
from minidoctor.config import QUANTIZATIONS, SampleConfig
from minidoctor.generate import complete
from minidoctor.model import Model
from minidoctor.ops.int8_product import ENGINES, PackedInt8Weight
from minidoctor.ops.linear import Linear
from minidoctor.ops.quantized import FORMS

MODELS = FIXTURES / "models"
KINDS = QUANTIZATIONS[1:]
has_product = bool(set(ENGINES) & set(torch.backends.quantized.supported_engines))
FAMILIES = ("llama", "qwen2", "qwen3", "baichuan2", "baichuan2-13b", "baichuan2-bin-shards")


def dequantized(directory, kind):
    """Return the plain model whose quantized layers have the dequantized weights."""
    model = load_model(directory)
    head = model.lm_head.weight.detach()
    model.lm_head.weight = nn.Parameter(head)  # no longer that of the embeddings
    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and (kind == "int8" or name != "lm_head"):
            form = FORMS[kind](layer.weight.shape)
            form.store(layer.weight)
            layer.weight = nn.Parameter(form.dequantize(torch.float32))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_the_dequantized_weights(family, kind):
    model, tokens = load_model(MODELS / family, quantize=kind), torch.randint(48, (2, 13))
    with torch.no_grad():
        logits, expected = model(tokens)[0], dequantized(MODELS / family, kind)(tokens)[0]
        assert not torch.allclose(load_model(MODELS / family)(tokens)[0], expected, atol=1e-3)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_of_the_blocks_are_quantized_and_int8_includes_the_output_layer(family, kind):
    model, plain = load_model(MODELS / family, quantize=kind), load_model(MODELS / family)
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            assert (layer.quantized is None) == (name == "lm_head" and kind != "int8"), name
    expected = plain.state_dict()
    for name, parameter in model.named_parameters():
        assert parameter.numel() == 0 or torch.equal(parameter, expected[name]), name
    if plain.config.tied:
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind != "int8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "llama-linear"])  # stored in float32; the second is tied
def test_codes_are_those_of_the_stored_weights_in_every_dtype(family, dtype, kind):
    exact, cast = (load_model(MODELS / family, x, quantize=kind).state_dict() for x in (torch.float32, dtype))
    quantized = {name for name in exact if ".quantized." in name}
    assert ("lm_head.quantized.codes" in quantized) == (kind == "int8")
    assert "model.layers.0.mlp.up_proj.quantized.codes" in quantized
    assert all(torch.equal(cast[name], exact[name]) for name in quantized)
    assert {cast[name].dtype for name in cast.keys() - quantized} == {dtype}


def test_unknown_quantization_is_rejected_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="int4"):
        load_model(tmp_path, quantize="int4")


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_model_is_not_saved(base_dir, tmp_path, kind):
    with pytest.raises(ValueError, match="quantized"):
        save_model(load_model(base_dir, quantize=kind), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("trained_on", QUANTIZATIONS)
def test_adapter_records_its_quantization_and_loads_onto_every_form_of_the_base(
    base_dir, adapter_dir, adapter, tmp_path, trained_on
):
    save_adapter_config(tmp_path, str(base_dir), adapter, quantize=trained_on)
    assert json.loads((tmp_path / CONFIG).read_text())["base"].get("quantize", "none") == trained_on
    (tmp_path / "adapter.safetensors").write_bytes((adapter_dir / "adapter.safetensors").read_bytes())
    tokens = torch.randint(60, (1, 8))
    with torch.no_grad():
        for kind in QUANTIZATIONS:
            model = load_adapted_model(base_dir, tmp_path, quantize=kind)
            assert not torch.allclose(model(tokens)[0], load_model(base_dir, quantize=kind)(tokens)[0], atol=1e-3)
            lora = {name: tensor for name, tensor in model.state_dict().items() if "lora" in name}
            expected = load_adapted_model(base_dir, adapter_dir).state_dict()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in lora.items())


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_load_joins_and_packs_without_changing_the_greedy_tokens(base_dir, adapter_dir, kind, adapted):
    plain = load_adapted_model(base_dir, adapter_dir, quantize=kind) if adapted else load_model(base_dir, quantize=kind)
    model, _ = load(base_dir, adapter_dir if adapted else None, quantize=kind)
    layer, config = model.model.layers[0].mlp.up_proj, SampleConfig(max_new_tokens=12)
    assert (layer.joined is not None) == (kind == "none")
    assert (layer.rows is not None) == (kind in ("nf4", "int8"))
    prompts = [[1, 40, 300], [1, 7, 350, 12, 90, 33, 200], [1]]
    expected = complete(plain, prompts, config, ())
    assert complete(model, prompts, config, ()) == expected
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert complete(model, [prompt], config, ()) == [tokens]


def test_int8_blocks_for_compilation_are_not_packed(base_dir):
    for pack_blocks in (True, False):
        model, _ = load(base_dir, quantize="int8", pack_blocks=pack_blocks)
        packed = {
            isinstance(layer.quantized, PackedInt8Weight)
            for layer in model.model.modules()
            if isinstance(layer, Linear)
        }
        assert packed == {has_product and pack_blocks}
        assert isinstance(model.lm_head.quantized, PackedInt8Weight) == has_product


def test_load_reports_products_that_are_slower_than_unquantized_ones(base_dir, capsys, monkeypatch):
    for kind in QUANTIZATIONS:
        model, _ = load(base_dir, quantize=kind)
        assert isinstance(model.lm_head.quantized, PackedInt8Weight) == (has_product and kind == "int8")
        slower = kind.startswith("nf4") or (kind == "int8" and not has_product)
        assert (f"note: each product dequantizes its {kind} weight" in capsys.readouterr().err) == slower
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", [])
    model, _ = load(base_dir, quantize="int8")
    assert "int8" in capsys.readouterr().err
    assert not isinstance(model.lm_head.quantized, PackedInt8Weight)


@pytest.mark.parametrize(
    ("dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "n_layers"),
    [(2560, 32, 8, 128, 9728, 151936, 36), (4096, 32, 32, 128, 11008, 32000, 32)],
    ids=["Qwen3-4B", "Llama-2-7B"],
)
@pytest.mark.parametrize(("kind", "limit"), [("nf4", 0.57), ("nf4-double", 0.52), ("int8", 1.01)])
def test_large_models_take_the_stated_bytes_per_quantized_weight(
    config, dim, n_heads, n_kv_heads, head_dim, ffn_dim, vocab_size, n_layers, kind, limit
):
    large = replace(
        config, dim=dim, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, ffn_dim=ffn_dim,
        vocab_size=vocab_size, n_layers=1, tied=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = Model(large)
        layers = [layer for layer in model.model.modules() if isinstance(layer, Linear)]
        n_weights = sum(layer.weight.numel() for layer in layers)
        for layer in layers:
            layer.quantize(kind, torch.bfloat16, "meta")
    n_bytes = sum(buffer.nbytes for buffer in model.buffers())
    assert 0.5 < n_bytes / n_weights <= limit
    assert n_bytes == sum(buffer.nbytes for buffer in model.model.layers.buffers())
    assert n_weights * n_layers > 3e9
