import json
import os
import random
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_checkpoints import ABSENT, change_json, change_tensors, randomize
from torch import nn

from minidoctor.checkpoints.adapters import ADAPTER, load, load_adapted_model, save_adapter_config
from minidoctor.checkpoints.hugging_face import checkpoint_hash, load_model, save_model
from minidoctor.checkpoints.peft import CONFIG, PICKLED, WEIGHTS, is_peft, read_peft_config, write_peft
from minidoctor.config import AdapterConfig, ModelConfig
from minidoctor.files.safetensors import read_tensors, write_tensors
from minidoctor.model import Model, adapter_state

PLAIN = AdapterConfig(n_experts=1, rank=4, alpha=6.0, targets=("q_proj", "v_proj", "up_proj", "down_proj"))
# adapter_config.json as peft 0.21 writes it with its defaults.
PEFT_SETTINGS = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": "base", "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 6, "lora_bias": False, "lora_dropout": 0.05,
    "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4,
    "rank_pattern": {}, "revision": None, "target_modules": ["down_proj", "v_proj", "up_proj", "q_proj"],
    "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_bdlora": None,
    "use_dora": False, "use_qalora": False, "use_rslora": False, "velora_config": None,
}  # fmt: skip
# Bases of several families, all of one size.
KINDS = {
    "llama": {"tied": True},
    "llama untied": {"tied": False, "n_kv_heads": 4},
    "qwen2": {"tied": True, "qkv_bias": True},
    "qwen3": {"tied": False, "qk_norm": True, "head_dim": 16},
    "mistral": {"tied": False, "window": 4},
}


@pytest.fixture(scope="module")
def plain_dir(tmp_path_factory, base_dir):
    """Write what train.py writes with --n-experts 1. Tests must not change it."""
    directory = tmp_path_factory.mktemp("plain")
    torch.manual_seed(3)
    state = adapter_state(randomize(Model(load_model(base_dir).config, PLAIN)))
    save_adapter_config(directory, str(base_dir), PLAIN)
    write_tensors(directory / ADAPTER, state)
    return directory


@pytest.fixture
def peft_dir(tmp_path, base_dir, plain_dir):
    """Write the same adapter in the layout of peft. Tests may change it."""
    model = load_adapted_model(base_dir, plain_dir)
    write_peft(tmp_path / "peft", str(base_dir), PLAIN, adapter_state(model), {})
    return tmp_path / "peft"


@pytest.fixture
def tokens(config):
    return torch.randint(0, config.vocab_size, (2, 11))


def update_plainly(base_dir, peft_dir, scale):
    """Return the base with each adapted weight W replaced by W + scale * B A, from the files in peft's layout."""
    tensors, model = dict(read_tensors(peft_dir / WEIGHTS)), load_model(base_dir)
    for name in [name for name in tensors if ".lora_A." in name]:
        a, b = tensors[name].float(), tensors[name.replace(".lora_A.", ".lora_B.")].float()
        layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        layer.weight.data += scale * b @ a
    return model


def test_written_tensors_have_the_names_of_peft(peft_dir, plain_dir):
    ours, theirs = (dict(read_tensors(path)) for path in (plain_dir / ADAPTER, peft_dir / WEIGHTS))
    assert len(theirs) == len(ours) == 2 * 2 * 4  # A and B, layers, targets
    for layer in (0, 1):
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
            prefix = f"model.layers.{layer}.{name}"
            a, b = (theirs[f"base_model.model.{prefix}.lora_{matrix}.weight"] for matrix in "AB")
            assert (a.shape[0], b.shape[1]) == (4, 4)  # lora_A (R, D_in), lora_B (D_out, R)
            assert torch.equal(a, ours[f"{prefix}.lora_a"])
            assert torch.equal(b, ours[f"{prefix}.lora_b"])


def test_written_config_has_the_keys_of_peft(peft_dir, base_dir):
    content = json.loads((peft_dir / CONFIG).read_text())
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6.0, "bias": "none"}
    assert expected.items() <= content.items()
    assert sorted(content["target_modules"]) == sorted(PLAIN.targets)
    assert content["base_model_name_or_path"] == str(base_dir)
    assert read_peft_config(peft_dir) == PLAIN


def test_written_and_loaded_adapter_gives_equal_logits(base_dir, plain_dir, peft_dir, tokens):
    logits = load_adapted_model(base_dir, peft_dir)(tokens)[0]
    assert torch.equal(logits, load_adapted_model(base_dir, plain_dir)(tokens)[0])
    assert (logits - load_model(base_dir)(tokens)[0]).abs().max() > 0.1  # the adapter changes the logits


@pytest.mark.parametrize(("settings", "scale"), [({}, 6 / 4), ({"use_rslora": True}, 6 / 4**0.5)], ids=str)
def test_loaded_adapter_equals_w_plus_scaled_product(base_dir, peft_dir, tokens, settings, scale):
    change_json(peft_dir / CONFIG, **settings)
    logits = load_adapted_model(base_dir, peft_dir)(tokens)[0]
    torch.testing.assert_close(logits, update_plainly(base_dir, peft_dir, scale)(tokens)[0], atol=1e-5, rtol=1e-5)


def test_rank_stabilized_scale_is_written_into_alpha(tmp_path, base_dir, peft_dir, tokens):
    change_json(peft_dir / CONFIG, use_rslora=True)
    model = load_adapted_model(base_dir, peft_dir)
    write_peft(tmp_path / "again", str(base_dir), model.adapter, adapter_state(model), {})
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["lora_alpha"] == 6 * 4**0.5
    assert torch.equal(load_adapted_model(base_dir, tmp_path / "again")(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_of_other_dtypes_are_converted(base_dir, plain_dir, peft_dir, dtype):
    rounded = {name: tensor.to(dtype) for name, tensor in read_tensors(peft_dir / WEIGHTS)}
    write_tensors(peft_dir / WEIGHTS, rounded)
    state = adapter_state(load_adapted_model(base_dir, peft_dir))
    for name, tensor in read_tensors(plain_dir / ADAPTER):
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], tensor.to(dtype).float()), name


@pytest.mark.parametrize(
    "content",
    [
        PEFT_SETTINGS,
        PEFT_SETTINGS | {"lora_alpha": 6.0, "init_lora_weights": "gaussian"},
        PEFT_SETTINGS | {"init_lora_weights": False, "task_type": None, "auto_mapping": {"base_model_class": "Llama"}},
        {key: PEFT_SETTINGS[key] for key in ("peft_type", "r", "lora_alpha", "target_modules")},
    ],
    ids=["as written", "gaussian", "no task", "required keys"],
)
def test_config_of_plain_lora_is_read(base_dir, plain_dir, peft_dir, tokens, content):
    (peft_dir / CONFIG).write_text(json.dumps(content))
    assert is_peft(peft_dir)
    assert read_peft_config(peft_dir) == PLAIN
    logits = load_adapted_model(base_dir, peft_dir)(tokens)[0]
    assert torch.equal(logits, load_adapted_model(base_dir, plain_dir)(tokens)[0])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("use_dora", True),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("rank_pattern", {"up_proj": 2}),
        ("alpha_pattern", {"up_proj": 2}),
        ("modules_to_save", ["lm_head"]),
        ("layers_to_transform", [1]),
        ("layers_to_transform", 1),
        ("layers_to_transform", 0),
        ("layers_pattern", "layers"),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("exclude_modules", "up_proj"),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", ["gaussian"]),
        ("trainable_token_indices", [5]),
        ("target_parameters", ["mlp.experts"]),
        ("alora_invocation_tokens", [1, 2]),
        ("megatron_config", {"a": 1}),
        ("a future setting", "on"),
    ],
)
def test_setting_beyond_plain_lora_is_rejected_by_name(base_dir, peft_dir, key, value):
    (peft_dir / CONFIG).write_text(json.dumps(PEFT_SETTINGS | {key: value}))
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {key} is "):
        load_adapted_model(base_dir, peft_dir)


@pytest.mark.parametrize(
    "value",
    [
        r".*\.(q|v)_proj",
        "all-linear",
        None,
        {"up_proj": 1},
        [],
        ["up_proj", "lm_head"],
        ["up_proj", None],
        [5],
        [["up_proj"]],
        [{}],
    ],
    ids=str,
)
def test_unsupported_target_modules_are_rejected(base_dir, peft_dir, value):
    change_json(peft_dir / CONFIG, target_modules=value)
    with pytest.raises(ValueError, match=r"adapter_config\.json: .*target"):
        load_adapted_model(base_dir, peft_dir)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": None},
        {"r": "4"},
        {"r": 4.0},
        {"r": True},
        {"r": 0},
        {"r": -4, "use_rslora": True},
        {"r": 10**400},
        {"r": 10**400, "use_rslora": True},
        {"lora_alpha": None},
        {"lora_alpha": "6"},
        {"lora_alpha": 0},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 10**400},
        {"lora_alpha": 10**400, "use_rslora": True},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_impossible_rank_or_alpha_is_rejected(base_dir, peft_dir, changes):
    change_json(peft_dir / CONFIG, **changes)
    with pytest.raises(ValueError, match=r"adapter_config\.json: "):
        load_adapted_model(base_dir, peft_dir)


OURS = "model.layers.0.mlp.up_proj.lora_a"
UP = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"  # (4, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({UP: ABSENT}, r"1 tensors .*: model\.layers\.0\.mlp\.up_proj\.lora_a"),
        ({"extra": torch.zeros(1)}, "1 tensors .*: extra"),
        ({UP: torch.zeros(32, 4)}, r"up_proj\.lora_a .*\(32, 4\), expected"),
        ({UP: torch.zeros(4, 32, dtype=torch.int32)}, r"up_proj\.lora_a is torch\.int32"),
        ({OURS: torch.zeros(4, 32)}, r"up_proj\.lora_a .*two names"),
        ({OURS: torch.zeros(4, 32), UP: torch.zeros(3)}, r"up_proj\.lora_a .*two names"),
    ],
    ids=["missing", "unexpected", "shape", "integers", "twice", "twice with another shape"],
)
def test_unsuitable_tensor_is_named(base_dir, peft_dir, changes, message):
    change_tensors(peft_dir / WEIGHTS, **changes)
    with pytest.raises(ValueError, match=message) as rejected:
        load_adapted_model(base_dir, peft_dir)
    assert str(peft_dir / WEIGHTS) in str(rejected.value)


def test_adapter_of_a_base_of_another_size_is_rejected(tmp_path, peft_dir, config):
    for changes in ({"ffn_dim": 40}, {"n_layers": 1}, {"n_layers": 3}):
        save_model(Model(replace(config, **changes)), tmp_path / str(changes), torch.float32)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors: "):
            load_adapted_model(tmp_path / str(changes), peft_dir)


def test_missing_file_is_named(base_dir, peft_dir):
    for name in (WEIGHTS, CONFIG):
        (peft_dir / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            load_adapted_model(base_dir, peft_dir)
        assert is_peft(peft_dir) == (name == WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pickled_weights_load_as_safetensors_do(capsys, base_dir, peft_dir, tokens, dtype):
    rounded = {name: tensor.to(dtype) for name, tensor in read_tensors(peft_dir / WEIGHTS)}
    write_tensors(peft_dir / WEIGHTS, rounded)
    expected = load_adapted_model(base_dir, peft_dir)(tokens)[0]
    (peft_dir / WEIGHTS).rename(peft_dir / "elsewhere")
    torch.save(rounded, peft_dir / PICKLED)
    assert torch.equal(load_adapted_model(base_dir, peft_dir)(tokens)[0], expected)
    assert torch.equal(load(base_dir, peft_dir)[0](tokens)[0], expected)
    assert capsys.readouterr().err == ""
    torch.save({}, peft_dir / PICKLED)
    with pytest.raises(ValueError, match=rf"{PICKLED}: 16 tensors are missing"):
        load_adapted_model(base_dir, peft_dir)
    (peft_dir / "elsewhere").rename(peft_dir / WEIGHTS)
    assert torch.equal(load_adapted_model(base_dir, peft_dir)(tokens)[0], expected)
    assert f"{WEIGHTS} and {PICKLED}" in capsys.readouterr().err


def test_pickled_weights_that_call_a_function_are_rejected(tmp_path, base_dir, peft_dir):
    class Call:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/made",)

    (peft_dir / WEIGHTS).unlink()
    torch.save({UP: Call()}, peft_dir / PICKLED)
    with pytest.raises(ValueError, match=rf"{PICKLED}: .*nothing was run"):
        load_adapted_model(base_dir, peft_dir)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "noted"),
    [
        (None, False),
        (5, False),
        ("", False),
        ("{base}", False),
        ("org/name", False),
        ("./name", False),
        ("name", False),
        ("org/another", True),
        ("/elsewhere/name", True),
        ("\0" * 5000, True),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_adapter_trained_on_another_directory_is_noted(tmp_path, capsys, base_dir, peft_dir, name, noted):
    base = shutil.copytree(base_dir, tmp_path / "models--org--name" / "snapshots" / "0a1b")
    stored = name.format(base=base) if isinstance(name, str) else name
    change_json(peft_dir / CONFIG, base_model_name_or_path=stored)
    for directory in (base, base.parent.parent):
        load_adapted_model(directory, peft_dir)
        out, err = capsys.readouterr()
        assert out == ""
        assert (f"was trained on {str(stored)[:20]}" in err) == noted
        assert bool(err) == noted


def test_exported_adapter_is_checked_by_the_hash_of_its_base(tmp_path, capsys, base_dir, plain_dir):
    model = load_adapted_model(base_dir, plain_dir)
    for key in ("base_checkpoint_hash", "base_fingerprint"):  # the second was written by earlier versions
        directory = tmp_path / key
        write_peft(directory, "/elsewhere", PLAIN, adapter_state(model), {key: checkpoint_hash(base_dir)})
        load_adapted_model(base_dir, directory)
        assert capsys.readouterr().err == ""
        write_peft(directory, str(base_dir), PLAIN, adapter_state(model), {key: "0a1b"})
        with pytest.raises(ValueError, match="trained on another model"):
            load_adapted_model(base_dir, directory)


def test_non_finite_adapter_is_not_written(tmp_path, base_dir, plain_dir):
    state = adapter_state(load_adapted_model(base_dir, plain_dir))
    state["model.layers.1.mlp.up_proj.lora_b"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.lora_b"):
        write_peft(tmp_path / "out", str(base_dir), PLAIN, state, {})
    assert not (tmp_path / "out").exists()


def test_100_mutated_adapters_load_or_are_rejected(base_dir, peft_dir):
    draw, n_rejected = random.Random(0), 0
    for name in (CONFIG, WEIGHTS):
        content = (peft_dir / name).read_bytes()
        for _ in range(50):
            changed = bytearray(content)
            changed[draw.randrange(min(len(content), 2000))] ^= 1 << draw.randrange(8)
            (peft_dir / name).write_bytes(changed[: draw.choice([len(content), len(content), 200])])
            try:
                load_adapted_model(base_dir, peft_dir)
            except (ValueError, FileNotFoundError):
                n_rejected += 1
        (peft_dir / name).write_bytes(content)
    load_adapted_model(base_dir, peft_dir)
    assert 50 < n_rejected <= 100


def test_mixture_is_not_written(tmp_path, adapter, adapted):
    with pytest.raises(ValueError, match=r"--n-experts 1.* 4 experts"):
        write_peft(tmp_path / "peft", "base", adapter, adapter_state(adapted), {})
    assert not (tmp_path / "peft").exists()


def test_load_gives_base_and_adapter_of_peft(base_dir, plain_dir, peft_dir, tokens):
    logits = [load(base_dir, directory)[0](tokens)[0] for directory in (None, plain_dir, peft_dir)]
    assert torch.equal(logits[1], logits[2])
    assert not torch.equal(logits[0], logits[1])


# Compared with the package itself where it is installed: pip install peft transformers


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    """Write a base of each family that `transformers` has, in float32. Return its config and directory."""
    # peft shortens a long list of full layer names, as three layers of seven linears give, to their last parts.
    sizes = {"vocab_size": 61, "dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 48}
    config = ModelConfig(**(sizes | KINDS[request.param]))
    save_model(randomize(Model(config)), tmp_path / "kind", torch.float32)
    return config, tmp_path / "kind"


def their_model(directory):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def assert_same_logits(ours, theirs, config):
    tokens = torch.randint(0, config.vocab_size, (2, 13))
    with torch.no_grad():
        logits = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens)[0], logits, atol=1e-5, rtol=1e-5)
        with theirs.disable_adapter():
            assert (theirs(tokens).logits - logits).abs().max() > 0.1  # the adapter changes the logits


@pytest.mark.filterwarnings("ignore")
def test_written_adapter_gives_the_same_logits_in_peft(tmp_path, kind):
    peft = pytest.importorskip("peft")
    config, base = kind
    adapter = replace(PLAIN, rank=3, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"))
    ours = load_model(base, adapter=adapter)
    for tensor in adapter_state(ours).values():
        nn.init.normal_(tensor, std=0.2)
    write_peft(tmp_path / "peft", str(base), adapter, adapter_state(ours), {})
    theirs = peft.PeftModel.from_pretrained(their_model(base), tmp_path / "peft").eval()
    assert_same_logits(ours, theirs, config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"target_modules": ["o_proj", "gate_proj"], "use_rslora": True, "lora_dropout": 0.1},
        {"target_modules": "all-linear"},
        {"target_modules": ["k_proj", "up_proj"], "init_lora_weights": "gaussian"},
    ],
    ids=["plain", "rslora", "all-linear", "gaussian"],
)
def test_adapter_of_peft_gives_the_same_logits_as_in_peft(tmp_path, kind, settings):
    peft = pytest.importorskip("peft")
    config, base = kind
    lora_config = peft.LoraConfig(task_type="CAUSAL_LM", r=5, lora_alpha=7, **settings)
    theirs = peft.get_peft_model(their_model(base), lora_config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "peft")
    assert_same_logits(load_adapted_model(base, tmp_path / "peft"), theirs, config)


@pytest.mark.filterwarnings("ignore")
def test_other_methods_of_peft_are_rejected_by_name(tmp_path, base_dir):
    peft = pytest.importorskip("peft")
    methods = {
        "use_dora": {"use_dora": True},
        "rank_pattern": {"rank_pattern": {"up_proj": 2}},
        "alpha_pattern": {"alpha_pattern": {"up_proj": 2}},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "layers_to_transform": {"layers_to_transform": [0]},
        "init_lora_weights": {"init_lora_weights": "pissa"},
        "bias": {"bias": "all"},
        "target_modules": {"target_modules": r".*\.mlp\.up_proj"},
    }
    for key, settings in methods.items():
        lora_config = peft.LoraConfig(task_type="CAUSAL_LM", **({"target_modules": ["up_proj"]} | settings))
        peft.get_peft_model(their_model(base_dir), lora_config).save_pretrained(tmp_path / key)
        with pytest.raises(ValueError, match=rf"{CONFIG}: .*{key}"):
            load_adapted_model(base_dir, tmp_path / key)
