import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_checkpoints import change_json, change_tensors, randomize, write_bin, write_shards

from minidoctor.checkpoints.adapters import ADAPTER, load, load_adapted_model, save_adapter_config
from minidoctor.checkpoints.families import read_model_config
from minidoctor.checkpoints.hugging_face import checkpoint_hash, load_model, save_model
from minidoctor.checkpoints.peft import CONFIG, WEIGHTS, write_peft
from minidoctor.config import QUANTIZATIONS, TARGETS, AdapterConfig, ModelConfig, RopeScaling, SampleConfig
from minidoctor.export import __main__ as export
from minidoctor.export.merge import merge, stored_dtype
from minidoctor.files.safetensors import read_header, read_tensors, write_tensors
from minidoctor.generate import complete
from minidoctor.model import Model, adapter_state
from minidoctor.text.tokenizer import load_tokenizer

PLAIN = AdapterConfig(n_experts=1, rank=4, alpha=6.0, targets=tuple(TARGETS))
SIZES = {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 48}
# Bases of several families. The last two are the architectures that store q, k and v as one matrix.
KINDS = {
    "llama": {"tied": True, "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 16), "rope_theta": 100.0},
    "llama untied": {"tied": False},
    "qwen2": {"tied": True, "qkv_bias": True},
    "qwen3": {"tied": False, "qk_norm": True, "head_dim": 16},
    "mistral": {"tied": False, "window": 4},
    "BaiChuanForCausalLM": {"tied": False, "n_kv_heads": 4},
    "BaichuanForCausalLM": {"tied": False, "n_kv_heads": 4},
}


@pytest.fixture
def call(program):
    """Return a function that runs the program and returns exit code, stdout and stderr."""
    return lambda *arguments: program(export.main, "export", *arguments)


def write_adapter(directory, base, adapter=PLAIN):
    """Write what train.py writes, with large weights."""
    save_adapter_config(directory, str(base), adapter)
    write_tensors(directory / ADAPTER, adapter_state(randomize(Model(read_model_config(base), adapter))))
    return directory


def write_base(directory, kind, dtype=torch.float32):
    save_model(randomize(Model(ModelConfig(**(SIZES | KINDS[kind])))), directory, dtype)
    if kind.startswith("Bai"):
        tensors = dict(read_tensors(directory / "model.safetensors"))
        for i in range(2):
            prefix = f"model.layers.{i}.self_attn"
            tensors[f"{prefix}.W_pack.weight"] = torch.cat([tensors.pop(f"{prefix}.{k}_proj.weight") for k in "qkv"])
        write_tensors(directory / "model.safetensors", tensors)
        token_ids = {"user_token_id": 5, "assistant_token_id": 6}
        change_json(directory / "config.json", architectures=[kind], model_type="baichuan", **token_ids)
    return directory


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    """Write a base of each family and a plain LoRA of all its linear layers. Return the two directories."""
    base = write_base(tmp_path / "kind", request.param)
    return base, write_adapter(tmp_path / "adapter", base)


@pytest.fixture
def plain_dir(tmp_path, base_dir):
    return write_adapter(tmp_path / "plain", base_dir)


def assert_same_logits(first, second):
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 21))
    with torch.no_grad():
        logits, expected = first(tokens)[0], second(tokens)[0]
    assert logits.abs().max() > 0.5
    # The sums of the two are rounded in another order.
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_merged_checkpoint_computes_the_same_as_the_adapted_model(call, tmp_path, kind):
    base, adapter = kind
    assert call("--base", base, "--adapter", adapter, "--merge", tmp_path / "out") == (0, f"{tmp_path / 'out'}\n", "")
    merged, adapted = load_model(tmp_path / "out"), load_adapted_model(base, adapter)
    assert_same_logits(merged, adapted)
    tokens = torch.arange(20)[None]
    assert (merged(tokens)[0] - load_model(base)(tokens)[0]).abs().max() > 0.1  # the adapter changes the logits


def test_merged_weight_is_w_plus_scaled_product_and_no_other_changes(call, tmp_path, kind):
    base, adapter = kind
    call("--base", base, "--adapter", adapter, "--merge", tmp_path / "out")
    update, before = dict(read_tensors(adapter / ADAPTER)), load_model(base).state_dict()
    after = load_model(tmp_path / "out").state_dict()
    assert set(after) == set(before)
    assert len(update) == 2 * 2 * 7
    for name, tensor in before.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_a" in update:
            tensor = tensor + 6 / 4 * update[f"{layer}.lora_b"] @ update[f"{layer}.lora_a"]
            torch.testing.assert_close(after[name], tensor)
        elif name == "lm_head.weight" and "Baichuan" in str(json.loads((base / "config.json").read_text())):
            torch.testing.assert_close(after[name], tensor)  # its rows are normalized a second time
        else:
            assert torch.equal(after[name], tensor), name


def test_merge_in_place_sets_the_update_to_zero(tmp_path):
    base = write_base(tmp_path / "base", "qwen2")
    adapter = write_adapter(tmp_path / "adapter", base)
    model, adapted = load_adapted_model(base, adapter), load_adapted_model(base, adapter)
    merge(model)
    assert not model.model.layers[0].mlp.up_proj.lora_b.any()
    assert_same_logits(model, adapted)


def test_merged_baichuan_is_a_llama_with_the_same_token_ids(call, tmp_path):
    for kind in ("BaiChuanForCausalLM", "BaichuanForCausalLM"):
        base = write_base(tmp_path / kind, kind)
        adapter, out = write_adapter(tmp_path / "adapter" / kind, base), tmp_path / "out" / kind
        assert call("--base", base, "--adapter", adapter, "--merge", out)[0] == 0
        settings = json.loads((out / "config.json").read_text())
        assert settings["architectures"] == ["LlamaForCausalLM"]
        assert (settings["user_token_id"], settings["assistant_token_id"]) == (5, 6)
        assert "model.layers.0.self_attn.q_proj.weight" in read_header(out / "model.safetensors")[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_with_alibi_in_a_bin_file_is_merged(call, tmp_path, dtype):
    config = ModelConfig(**(SIZES | {"n_kv_heads": 4, "tied": False, "alibi": True}))
    save_model(randomize(Model(config)), tmp_path / "base", dtype)
    write_bin(tmp_path / "base")
    adapter, out = write_adapter(tmp_path / "adapter", tmp_path / "base"), tmp_path / "out"
    assert call("--base", tmp_path / "base", "--adapter", adapter, "--merge", out) == (0, f"{out}\n", "")
    assert read_model_config(out) == config
    assert stored_dtype(tmp_path / "base") == stored_dtype(out) == dtype
    if dtype == torch.float32:
        assert_same_logits(load_model(out), load_adapted_model(tmp_path / "base", adapter))


def test_merged_checkpoint_keeps_linear_rope_scaling(call, tmp_path):
    base = write_base(tmp_path / "base", "llama untied")
    change_json(base / "config.json", rope_scaling={"type": "linear", "factor": 2.0})
    adapter = write_adapter(tmp_path / "adapter", base)
    assert call("--base", base, "--adapter", adapter, "--merge", tmp_path / "out")[0] == 0
    assert read_model_config(tmp_path / "out") == read_model_config(base)
    assert_same_logits(load_model(tmp_path / "out"), load_adapted_model(base, adapter))


def test_merging_rounds_once_to_the_dtype_of_the_base(call, tmp_path):
    base = write_base(tmp_path / "base", "qwen2", torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", base)
    call("--base", base, "--adapter", adapter, "--merge", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    update, before = dict(read_tensors(adapter / ADAPTER)), dict(read_tensors(base / "model.safetensors"))
    n_equal = n = 0
    for name, tensor in read_tensors(tmp_path / "out" / "model.safetensors"):
        assert tensor.dtype == torch.bfloat16
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_a" in update:
            exact = before[name].double()
            exact += 1.5 * update[f"{layer}.lora_b"].double() @ update[f"{layer}.lora_a"].double()
            n_equal, n = n_equal + (tensor == exact.bfloat16()).sum(), n + tensor.numel()
        else:
            assert torch.equal(tensor, before[name]), name
    assert n_equal > 0.999 * n  # float32 rounds a few of the sums to the other side
    tokens = torch.randint(0, 61, (2, 21))
    adapted, merged = load_adapted_model(base, adapter), load_model(tmp_path / "out")
    with torch.no_grad():
        distance = (merged(tokens)[0] - adapted(tokens)[0]).abs().max() / adapted(tokens)[0].abs().max()
    assert distance < 0.05  # a weight's rounding is 2^-9 of it; two layers add up 32 to 48 of them, seven times


def test_dtype_flag_sets_the_dtype_of_the_merged_weights(call, tmp_path):
    base = write_base(tmp_path / "base", "llama", torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", base)
    call("--base", base, "--adapter", adapter, "--merge", tmp_path / "out", "--dtype", "float32")
    assert {e.dtype for e in read_header(tmp_path / "out" / "model.safetensors")[0].values()} == {torch.float32}
    assert_same_logits(load_model(tmp_path / "out"), load_adapted_model(base, adapter))
    code, _, err = call("--base", base, "--adapter", adapter, "--merge", tmp_path / "none", "--dtype", "int8")
    assert code == 2
    assert "dtype" in err
    assert "int8" in err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_dtype_is_that_of_most_weights(tmp_path, dtype):
    base = write_base(tmp_path / "base", "llama", dtype)
    change_tensors(base / "model.safetensors", model__norm__weight=torch.ones(32, dtype=torch.float64))
    assert stored_dtype(base) == dtype


def test_tokenizer_files_are_copied_and_no_others(call, tmp_path, base_dir):
    base = shutil.copytree(base_dir, tmp_path / "base")
    copied = ["tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
    copied += ["generation_config.json", "chat_template.jinja", "tokenizer.json", "vocab.json", "merges.txt"]
    for name in copied[1:]:
        (base / name).write_text(json.dumps({"from": name}))
    for name in ("README.md", "training_args.bin", "adapter_config.json"):
        (base / name).write_text("left behind")
    change_json(base / "config.json", bos_token_id=1, eos_token_id=[2, 7])
    write_shards(base)
    adapter, out = write_adapter(tmp_path / "adapter", base), tmp_path / "out"
    assert call("--base", base, "--adapter", adapter, "--merge", out)[0] == 0
    assert {path.name for path in out.iterdir()} == {*copied, "config.json", "model.safetensors"}
    for name in copied:
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    after = json.loads((out / "config.json").read_text())
    assert (after["bos_token_id"], after["eos_token_id"]) == (1, [2, 7])


def test_merged_checkpoint_generates_the_same_answer(call, tmp_path, base_dir, plain_dir, tokenizer):
    call("--base", base_dir, "--adapter", plain_dir, "--merge", tmp_path / "out")
    prompt = tokenizer.chat([{"role": "user", "content": "gout?"}])
    merged_tokenizer = load_tokenizer(tmp_path / "out")
    assert (merged_tokenizer.chat_format, merged_tokenizer.chat([{"role": "user", "content": "gout?"}])) == (
        tokenizer.chat_format,
        prompt,
    )
    models = load_model(tmp_path / "out"), load_adapted_model(base_dir, plain_dir), load_model(base_dir)
    config = SampleConfig(max_new_tokens=8)
    answers = [complete(model, [prompt], config, tokenizer.eos_ids)[0] for model in models]
    assert answers[0] == answers[1] != answers[2]


def test_program_file_of_a_tokenizer_is_not_referenced(call, tmp_path, base_dir):
    base = shutil.copytree(base_dir, tmp_path / "base")
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_baichuan.Tokenizer", None]}, "add_bos_token": False}
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "BaichuanTokenizer"}))
    assert call("--base", base, "--adapter", write_adapter(tmp_path / "a", base), "--merge", tmp_path / "out")[0] == 0
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written == {"auto_map": None, "add_bos_token": False, "tokenizer_class": "LlamaTokenizer"}


@pytest.mark.parametrize("target", ["--peft", "--merge"])
def test_chat_format_of_the_training_is_exported_or_reported(call, tmp_path, base_dir, plain_dir, target):
    save_adapter_config(plain_dir, str(base_dir), PLAIN, "plain")
    code, out, _ = call("--base", base_dir, "--adapter", plain_dir, target, tmp_path / "out")
    assert code == 0
    assert "--chat-format plain" in out
    if target == "--peft":
        assert load(base_dir)[1].chat_format != "plain"
        assert load(base_dir, tmp_path / "out")[1].chat_format == "plain"


def test_exported_adapter_loads_equal(call, tmp_path, kind):
    base, adapter = kind
    code, out, err = call("--base", base, "--adapter", adapter, "--peft", tmp_path / "out")
    assert (code, out.splitlines()[0], err) == (0, str(tmp_path / "out"), "")
    assert ("peft would not find these" in out) == ("baichuan" in (base / "config.json").read_text().lower())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CONFIG, WEIGHTS}
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["base_model_name_or_path"] == str(base)
    expected, exported = load_adapted_model(base, adapter), load_adapted_model(base, tmp_path / "out")
    for name, tensor in adapter_state(exported).items():
        assert torch.equal(tensor, adapter_state(expected)[name]), name
    assert exported.adapter == replace(PLAIN, targets=exported.adapter.targets)
    tokens = torch.randint(0, 61, (2, 9))
    assert torch.equal(exported(tokens)[0], expected(tokens)[0])


def test_exported_adapter_of_a_bfloat16_base_is_float32(call, tmp_path):
    base = write_base(tmp_path / "base", "llama", torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", base)
    call("--base", base, "--adapter", adapter, "--peft", tmp_path / "out")
    stored, exported = (dict(read_tensors(path)) for path in (adapter / ADAPTER, tmp_path / "out" / WEIGHTS))
    name = "model.layers.1.self_attn.o_proj.lora_"
    assert torch.equal(exported[f"base_model.model.{name}B.weight"], stored[f"{name}b"])
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}


def test_adapter_of_peft_is_merged(call, tmp_path):
    base = write_base(tmp_path / "base", "qwen2")
    model = load_adapted_model(base, write_adapter(tmp_path / "adapter", base))
    write_peft(tmp_path / "peft", str(base), PLAIN, adapter_state(model), {})
    assert call("--base", base, "--adapter", tmp_path / "peft", "--merge", tmp_path / "out")[0] == 0
    assert_same_logits(load_model(tmp_path / "out"), model)


@pytest.mark.parametrize("where", ["--peft", "--merge"])
def test_mixture_is_rejected_with_the_reason(call, tmp_path, base_dir, adapter_dir, where):
    code, out, err = call("--base", base_dir, "--adapter", adapter_dir, where, tmp_path / "out")
    assert (code, out) == (2, "")
    assert "--n-experts 1" in err
    assert "4 experts: their gates depend on the token" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["--peft", "--merge"])
def test_existing_output_is_not_overwritten(call, tmp_path, base_dir, plain_dir, where):
    base = shutil.copytree(base_dir, tmp_path / "base")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").write_text("kept")
    before = checkpoint_hash(base), (base / "config.json").read_bytes(), (plain_dir / CONFIG).read_bytes()
    for out in (base, plain_dir, tmp_path / "file", tmp_path / "full"):
        code, _, err = call("--base", base, "--adapter", plain_dir, where, out)
        assert code == 2
        assert f"{out}: exists" in err
    assert (checkpoint_hash(base), (base / "config.json").read_bytes(), (plain_dir / CONFIG).read_bytes()) == before
    assert [path.name for path in (tmp_path / "full").iterdir()] == [".hidden"]
    (tmp_path / "empty").mkdir()
    assert call("--base", base, "--adapter", plain_dir, where, tmp_path / "empty")[0] == 0
    assert call("--base", base, "--adapter", plain_dir, where, tmp_path / "new" / "deeper")[0] == 0


@pytest.mark.parametrize("where", ["--peft", "--merge"])
def test_adapter_of_another_base_is_rejected(call, tmp_path, config, plain_dir, where):
    save_model(randomize(Model(config)), tmp_path / "trained further", torch.float32)
    save_model(Model(replace(config, ffn_dim=40)), tmp_path / "smaller", torch.float32)
    for name, key in {"trained further": "checkpoint_hash", "smaller": "ffn_dim 48, "}.items():
        code, _, err = call("--base", tmp_path / name, "--adapter", plain_dir, where, tmp_path / "out")
        assert code == 2
        assert key in err
        assert not (tmp_path / "out").exists()


def test_missing_and_contradicting_flags_are_named(call, tmp_path, base_dir, plain_dir):
    for arguments, expected in (
        ([], "--adapter"),
        (["--adapter", plain_dir], "--peft --merge"),
        (["--adapter", plain_dir, "--peft", "a", "--merge", "b"], "--peft"),
        (["--adapter", plain_dir, "--peft", ""], "exists"),
        (["--adapter", plain_dir, "--merge", ""], "exists"),
        (
            ["--base", tmp_path / "nowhere", "--adapter", plain_dir, "--peft", tmp_path / "a"],
            "nowhere/config.json",
        ),
        (["--base", base_dir, "--adapter", tmp_path / "nowhere", "--peft", tmp_path / "a"], "nowhere"),
        (["--base", base_dir, "--adapter", tmp_path, "--merge", tmp_path / "a"], "adapter_config.json"),
        (["--base", base_dir, "--adapter", base_dir, "--merge", tmp_path / "a"], "adapter_config.json"),
        (["--base", plain_dir, "--adapter", plain_dir, "--merge", tmp_path / "a"], "config.json"),
    ):
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert expected in err
    assert not (tmp_path / "a").exists()


def test_base_without_a_tensor_is_rejected(call, tmp_path, base_dir, plain_dir):
    base = shutil.copytree(base_dir, tmp_path / "base")
    write_tensors(base / "model.safetensors", {})
    code, _, err = call("--base", base, "--adapter", plain_dir, "--merge", tmp_path / "out")
    assert code == 2
    assert str(base) in err


@pytest.mark.parametrize("target", ["--peft", "--merge"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("source", ["base", "adapter"])
def test_non_finite_weights_are_not_exported(call, tmp_path, base_dir, target, value, source):
    base = shutil.copytree(base_dir, tmp_path / "base")
    if source == "base":
        change_tensors(base / "model.safetensors", model__norm__weight=torch.full((32,), value))
    adapter = write_adapter(tmp_path / "adapter", base)
    if source == "adapter":
        change_tensors(adapter / ADAPTER, **{"model.layers.0.mlp.up_proj.lora_b": torch.full((48, 4), value)})
    code, out, err = call("--base", base, "--adapter", adapter, target, tmp_path / "out")
    if (source, target) == ("base", "--peft"):  # the base is not part of the output
        assert code == 0
        return
    assert (code, out) == (2, "")
    assert {"base": "model.norm.weight", "adapter": "model.layers.0.mlp.up_proj"}[source] in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stored", "largest", "flags"),
    [(torch.float16, 6e4, []), (torch.float32, 3.4e38, ["--dtype", "bfloat16"]), (torch.bfloat16, 3e38, [])],
    ids=["float16", "to bfloat16", "bfloat16"],
)
def test_overflow_of_a_merged_weight_is_reported(call, tmp_path, stored, largest, flags):
    base = write_base(tmp_path / "base", "llama untied", stored)
    name = "model.layers.1.self_attn.q_proj"
    change_tensors(base / "model.safetensors", **{f"{name}.weight": torch.full((32, 32), largest).to(stored)})
    adapter = write_adapter(tmp_path / "adapter", base)
    update = {f"{name}.lora_a": torch.ones(4, 32), f"{name}.lora_b": torch.full((32, 4), largest / 6)}
    change_tensors(adapter / ADAPTER, **update)
    code, out, err = call("--base", base, "--adapter", adapter, "--merge", tmp_path / "out", *flags)
    assert (code, out) == (2, "")
    assert f"{name}.weight" in err
    assert not (tmp_path / "out").exists()
    assert call("--base", base, "--adapter", adapter, "--peft", tmp_path / "out")[0] == 0


def test_cache_directory_of_the_base_is_exported_with_its_tokenizer(call, tmp_path, base_dir, plain_dir):
    cache = tmp_path / "models--org--name"
    shutil.copytree(base_dir, cache / "snapshots" / "0a1b")
    assert call("--base", cache, "--adapter", plain_dir, "--merge", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (base_dir / "tokenizer.model").read_bytes()


def test_merged_checkpoint_of_a_tied_base_with_another_output_layer_is_untied(call, tmp_path):
    base = write_base(tmp_path / "base", "llama")
    change_tensors(base / "model.safetensors", lm_head__weight=torch.randn(61, 32))
    adapter = write_adapter(tmp_path / "adapter", base)
    assert call("--base", base, "--adapter", adapter, "--merge", tmp_path / "out")[0] == 0
    assert not read_model_config(tmp_path / "out").tied
    assert_same_logits(load_model(tmp_path / "out"), load_adapted_model(base, adapter))


# Compared with the packages themselves where they are installed: pip install peft transformers


@pytest.mark.filterwarnings("ignore")
def test_merged_checkpoint_gives_the_same_logits_in_transformers(call, tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    base, adapter = kind
    call("--base", base, "--adapter", adapter, "--merge", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert_same_logits(load_adapted_model(base, adapter), lambda tokens: [theirs(tokens).logits])


@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_a_bfloat16_checkpoint_as_bfloat16(call, tmp_path):
    transformers = pytest.importorskip("transformers")
    base = write_base(tmp_path / "base", "qwen2", torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", base)
    call("--base", base, "--adapter", adapter, "--merge", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    stored = dict(read_tensors(tmp_path / "out" / "model.safetensors"))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, stored.get(name, tensor)), name
    assert set(stored) <= set(theirs.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_exported_adapter_gives_the_same_logits_in_peft(call, tmp_path, kind):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base, adapter = kind
    if base.joinpath("config.json").read_text().count("baichuan"):
        pytest.skip("transformers has no Baichuan")
    call("--base", base, "--adapter", adapter, "--peft", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out").eval()
    with theirs.disable_adapter():
        assert_same_logits(load_model(base), lambda tokens: [theirs(tokens).logits])
    assert_same_logits(load_adapted_model(base, adapter), lambda tokens: [theirs(tokens).logits])


@pytest.mark.parametrize("trained_on", QUANTIZATIONS)
@pytest.mark.parametrize("output", ["--peft", "--merge"])
def test_export_reports_the_weights_that_an_adapter_of_a_quantized_base_is_for(
    call, base_dir, tmp_path, output, trained_on
):
    plain_dir = write_adapter(tmp_path / "plain", base_dir)
    save_adapter_config(plain_dir, str(base_dir), PLAIN, quantize=trained_on)
    code, out, err = call("--base", base_dir, "--adapter", plain_dir, output, tmp_path / "out")
    assert code == 0, err
    reported = f"trained with --quantize {trained_on}" in out and "not quantized" in out
    assert reported == (trained_on != "none")
    if output == "--merge":
        merged, (layer, *_) = load_model(tmp_path / "out"), load_adapted_model(base_dir, plain_dir).model.layers
        up = layer.mlp.up_proj
        expected = up.weight + up.scale * up.lora_b @ up.lora_a
        torch.testing.assert_close(merged.model.layers[0].mlp.up_proj.weight, expected)
        assert ("torch.float32" in out) == (trained_on != "none")
