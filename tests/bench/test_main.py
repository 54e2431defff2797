import json
import pickle
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from paths import ROOT

from minidoctor.bench import __main__ as bench
from minidoctor.bench import baselines, implementations, sample, train
from minidoctor.bench.memory import CLEAR_PEAK
from minidoctor.bench.options import SHAPES
from minidoctor.config import ModelConfig
from minidoctor.model import Model

TINY_SHAPE = ModelConfig(60, 16, 2, 2, 1, 8, 24, 64)
TRAIN = ["train", "--layers", 2, "--seq-len", 16, "--batch-size", 2, "--rank", 2, "--rounds", 2]
SAMPLE = ["sample", "--new-tokens", 3, "--rounds", 2]


@pytest.fixture
def tiny_shapes(monkeypatch):
    monkeypatch.setitem(SHAPES, "smollm2", TINY_SHAPE)
    monkeypatch.setitem(SHAPES, "qwen3-4b", replace(TINY_SHAPE, qk_norm=True))
    for module in (sample, train):  # other processes would not have the tiny shapes
        monkeypatch.setattr(
            module, "peak_memory", lambda builds, n: dict.fromkeys(pickle.loads(pickle.dumps(builds)), [0.5] * n)
        )


@pytest.fixture
def run_bench(program):
    def run_bench(*words):
        code, out, err = program(bench.main, "bench", *words, "--device", "cpu", "--threads", "1")
        assert code == 0, err
        return json.loads(out) if "--json" in words else out

    return run_bench


def assert_ratios(result, *names):
    for name in names:
        assert 0 < result[name]["least"] <= result[name]["median"] <= result[name]["greatest"], name


def test_train_prints_speeds_and_ratios_as_one_json_object(tiny_shapes, run_bench):
    result = run_bench(*TRAIN, "--json")
    assert_ratios(result, "of_lower_bound", "moe_over_lora", "contrast_over_none", "over_a_loop", "mfu")
    assert (result["ratio_to_peft"] is not None) == baselines.installed("transformers", "peft")
    assert (result["ratio_to_mixlora"] is not None) == baselines.installed("transformers", "mixlora")
    assert result["compiled_over_not"] is None
    assert (result["ratio_to_qlora"] is not None) == baselines.installed("transformers", "peft", "bitsandbytes")
    assert result["peak_gib"].keys() == result["speed"].keys() & {"minidoctor", "peft", "qlora"}
    assert result["config"]["seq_len"] == 16
    assert result["mode"] == "train"


def test_sample_prints_speeds_and_ratios_as_one_json_object(tiny_shapes, run_bench):
    result = run_bench(*SAMPLE, "--json")
    assert_ratios(result, "of_lower_bound", "batch_8_over_1")
    assert (result["ratio_to_transformers"] is not None) == baselines.installed("transformers")
    assert result["peak_gib"].keys() == {"minidoctor", *["transformers"] * baselines.installed("transformers")}
    assert result["ratio_to_llama_cpp"] is None
    assert result["weights_gb"] > 0
    assert result["bandwidth_gb_per_second"] == pytest.approx(result["lower_bound"] * result["weights_gb"])


class FakeLlama:
    """The part of llama_cpp.Llama that is used, with the sizes of TINY_SHAPE or of the file's name."""

    loaded, decoded = [], []

    def __init__(self, file, n_ctx, **settings):
        if "broken" in file:
            raise ValueError("not a gguf file")
        self.file, self.model, self.prompts = file, 2, []
        self.loaded.append((file, n_ctx, settings["n_gpu_layers"]))

    def n_vocab(self):
        return 61 if "other" in self.file else 60

    def n_embd(self):
        return 16

    def reset(self):
        self.prompts = []

    def generate(self, prompt, temp):
        assert not self.prompts, "the cache contains the prompt of another round"
        self.prompts.append(prompt)
        for token in range(1000):
            self.decoded.append((self.file, len(prompt), temp))
            yield token


@pytest.fixture
def llama_cpp(monkeypatch):
    """Replace the package by FakeLlama, as if no other baseline were installed."""
    package = SimpleNamespace(
        Llama=FakeLlama, llama_supports_gpu_offload=lambda: False, llama_model_n_layer=lambda model: model
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    monkeypatch.setattr(baselines, "installed", lambda *packages: packages == ("llama_cpp",))
    monkeypatch.setattr(FakeLlama, "loaded", [])
    monkeypatch.setattr(FakeLlama, "decoded", [])


def test_sample_compares_with_llama_cpp_by_the_name_of_the_file(tiny_shapes, llama_cpp, run_bench):
    result = run_bench(*SAMPLE, "--gguf", "a/f32.gguf", "a/q8_0.gguf", "--json")
    assert result["ratio_to_llama_cpp"].keys() == {"f32", "q8_0"}
    assert_ratios(result["ratio_to_llama_cpp"], "f32", "q8_0")
    assert result["peak_gib"].keys() == {"minidoctor", "llama.cpp f32", "llama.cpp q8_0"}
    assert FakeLlama.loaded == [("a/f32.gguf", 16 + 3, 0), ("a/q8_0.gguf", 16 + 3, 0)]
    rounds = [(file, 16, 0.0) for file in ("a/f32.gguf", "a/q8_0.gguf") for _ in range(3)] * 3  # with the warm-up
    assert FakeLlama.decoded == rounds


@pytest.mark.parametrize(
    ("files", "key"), [(["broken.gguf"], "broken.gguf"), (["other.gguf"], "61"), (["a/f32.gguf", "b/f32.gguf"], "f32")]
)
def test_gguf_file_without_the_shape_of_the_base_is_rejected(files, key, tiny_shapes, llama_cpp, program):
    code, _, err = program(bench.main, "bench", *SAMPLE, "--gguf", *files, "--device", "cpu")
    assert (code, err.count("\n"), key in err) == (2, 1, True), err


def test_sample_reports_that_llama_cpp_is_not_installed(tiny_shapes, llama_cpp, program, monkeypatch):
    monkeypatch.setattr(baselines, "installed", lambda *packages: False)
    code, out, err = program(bench.main, "bench", *SAMPLE, "--gguf", "f32.gguf", "--json", "--device", "cpu")
    assert (code, json.loads(out)["ratio_to_llama_cpp"]) == (0, None)
    assert "pip install llama-cpp-python" in err


def test_sample_counts_reads_of_all_weights_and_tokens_of_all_rows(tiny_shapes, run_bench, monkeypatch):
    calls, counts = {}, {}

    def spy(some_calls, some_counts, n_rounds, device):
        calls.update(some_calls), counts.update(some_counts)
        return {name: [1.0] for name in some_calls}

    monkeypatch.setattr(sample, "alternate", spy)
    run_bench(*SAMPLE)
    n_tensors = len(list(Model(TINY_SHAPE).parameters()))
    assert len(calls["read"]()) == counts["read"] * n_tensors
    for name in ("batch 1", "batch 8"):
        assert sum(map(len, calls[name]())) == counts[name]


@pytest.mark.parametrize(("words", "n_models"), [(TRAIN, 4), (SAMPLE, 1)])  # contrast, none, plain LoRA, frozen
def test_compile_times_compiled_next_to_eager_implementations(words, n_models, tiny_shapes, run_bench, monkeypatch):
    compiled = []  # the effect of compilation is tested with the model
    monkeypatch.setattr(implementations, "compile_blocks", compiled.append)
    monkeypatch.setattr(sample, "compile_decoding", lambda model: compiled.append(model) or False)
    result = run_bench(*words, "--compile", "--json")
    assert_ratios(result, "compiled_over_not")
    assert len(compiled) == n_models


@pytest.mark.parametrize("words", [TRAIN, SAMPLE])
def test_quantize_times_quantized_next_to_unquantized_weights(words, tiny_shapes, run_bench):
    result = run_bench(*words, "--quantize", "int8", "--json")
    assert_ratios(result, "quantized_over_not")
    assert run_bench(*words, "--json")["quantized_over_not"] is None


def test_gpu_settings_run_in_bfloat16(tiny_shapes, run_bench):
    settings = ["--shape", "qwen3-4b", "--dtype", "bfloat16", "--json"]
    assert_ratios(run_bench(*TRAIN, *settings, "--recompute"), "mfu")
    result = run_bench(*SAMPLE, *settings)
    assert result["dtype"] == "torch.bfloat16"
    # 2 bytes per element; with --layers the model is smaller
    assert run_bench(*SAMPLE, *settings, "--layers", 1)["weights_gb"] < result["weights_gb"]


def test_train_times_answer_tokens_of_questions(base_dir, rows_file, run_bench, program):
    rows = [{"question": "gout?", "answer": "uric acid " * (1 + i % 5)} for i in range(32)]
    words = ["train", "--data", rows_file(*rows), "--rank", 2, "--rounds", 1]
    assert "unit: answer tokens per second\n" in run_bench(*words, "--base", base_dir)
    code, _, err = program(bench.main, "bench", *words)
    assert (code, "--base" in err) == (2, True)
    code, _, err = program(bench.main, "bench", *words, "--base", base_dir, "--batch-size", 5)
    assert (code, "--batch-size" in err) == (2, True)  # 8 batches of 5 questions need 40


def test_load_prints_seconds(base_dir, run_bench):
    result = run_bench("load", "--base", base_dir, "--rounds", 1, "--json")
    assert result["seconds"].keys() == {"load", "first token"}


@pytest.mark.slow
@pytest.mark.skipif(not CLEAR_PEAK.exists(), reason="Linux only")
def test_memory_reports_peaks_of_a_separate_process(base_dir, run_bench):
    words = ["memory", "--base", base_dir, "--seq-len", 16, "--batch-size", 2, "--steps", 4, "--rank", 2, "--json"]
    result = run_bench(*words)
    assert 0.05 < result["peak_gib"]["minidoctor"] <= result["peak_gib_after_steps"]["minidoctor"] < 3
    for name, packages in (("peft", ()), ("qlora", ("bitsandbytes",))):
        if baselines.installed("transformers", "peft", *packages):
            assert_ratios(result, f"ratio_to_{name}")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["load"], "--base"),
        (["sample", "--shape", "gpt2"], "smollm2"),
        (["sample", "--base", str(ROOT / "data" / "base"), "--new-tokens", "497"], "the context has 512"),
        (["train", "--n-experts", "1"], "n_experts"),
        (["train", "--rounds", "0"], "rounds"),
        (["memory", "--steps", "2"], "steps"),
        (["sample", "--base", "no\udce9where"], "no\\udce9where"),  # a file name that is not UTF-8
    ],
)
def test_invalid_flags_end_in_one_line(words, key, program):
    code, _, err = program(bench.main, "bench", *words)
    assert (code, err.count("\n"), key in err) == (2, 1, True), err
