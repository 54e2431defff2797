"""A tiny tokenizer, a tiny random model and an adapter for it, as the directories that the programs read."""

import io
import json
import random
import shutil
import signal
import sys

import pytest
import sentencepiece
import torch
from torch import nn

from minidoctor.checkpoints.adapters import ADAPTER, load_adapted_model, save_adapter_config
from minidoctor.checkpoints.hugging_face import load_model, save_model
from minidoctor.cli.main import run
from minidoctor.config import AdapterConfig, ModelConfig, TrainConfig
from minidoctor.files.safetensors import write_tensors
from minidoctor.model import Model, adapter_state
from minidoctor.text.chat_formats import CHAT_FORMATS
from minidoctor.text.tokenizer import load_tokenizer

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, also by the runs that the tests start
torch.set_num_threads(1)  # products this small only wait for a second thread

SENTENCES = (
    "The key test for gout is uric acid in the joint fluid.",
    "Gout is treated in rheumatology. Asthma is treated in pneumology.",
    "The typical symptoms of asthma are wheezing and a cough at night.",
    "痛风的关键检查是关节液中的尿酸。痛风属于风湿科。",
    "哮喘的典型症状是喘息和夜间咳嗽。哮喘属于呼吸科。",
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def train_sentencepiece():
    """A function that trains BPE with byte fallback, as in data/make_base.py, and returns the content of its file."""

    def train(**settings):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES * 4),
            model_writer=model,
            model_type="bpe",
            vocab_size=420,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            split_digits=True,
            num_threads=1,
            minloglevel=2,
            **settings,
        )
        return model.getvalue()

    return train


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory, train_sentencepiece):
    def make(**settings):
        directory = tmp_path_factory.mktemp("tokenizer")
        (directory / "tokenizer.model").write_bytes(train_sentencepiece(**settings))
        return load_tokenizer(directory)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    return make_tokenizer(control_symbols=list(CHAT_FORMATS["minidoctor"].needs))


@pytest.fixture(scope="session")
def config(tokenizer):
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        dim=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        ffn_dim=48,
        max_seq_len=128,
    )


def random_model(config: ModelConfig, seed: int) -> Model:
    """Weights large enough that every layer and every earlier token has a say in the next one."""
    torch.manual_seed(seed)
    model = Model(config)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return model.eval()


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory, config, tokenizer):
    """Not to be changed by a test: copy it first."""
    directory = tmp_path_factory.mktemp("base")
    save_model(random_model(config, seed=1), directory, dtype=torch.float32)
    (directory / "tokenizer.model").write_bytes(tokenizer.backend.processor.serialized_model_proto())
    return directory


@pytest.fixture
def model(base_dir):
    return load_model(base_dir)


@pytest.fixture(scope="session")
def adapter():
    return AdapterConfig(
        n_experts=4, top_k=2, rank=2, alpha=4.0, targets=("q_proj", "up_proj", "down_proj"), routing_dim=4
    )


@pytest.fixture(scope="session")
def adapter_dir(tmp_path_factory, base_dir, adapter):
    """Experts that do something: lora_b is not zero. Not to be changed by a test: copy it first."""
    directory = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(2)
    state = adapter_state(load_model(base_dir, adapter=adapter))
    for name, tensor in state.items():
        if name.endswith("lora_b"):
            nn.init.normal_(tensor)
    save_adapter_config(directory, str(base_dir), adapter)
    write_tensors(directory / ADAPTER, state)
    return directory


@pytest.fixture
def adapted(base_dir, adapter_dir):
    return load_adapted_model(base_dir, adapter_dir)


@pytest.fixture
def program(monkeypatch, capsys):
    """Runs a program's main with these words; returns exit code, stdout and stderr."""

    def program(main, *words):
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        code = 0
        try:
            run(main)
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return program


@pytest.fixture
def rows_file(tmp_path):
    """Writes rows as JSON lines and returns the path; text is written as it is."""

    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def data(rows_file):
    """24 rows of different lengths in both languages, some of them multiple choice."""
    rng = random.Random(0)
    rows = []
    for i in range(24):
        question = rng.choice(["What is the test for gout?", "痛风的检查是什么？", "Asthma?"])
        if i % 4:
            rows.append({"question": question, "answer": rng.choice(["uric acid", "尿酸", "a cough at night"])})
        else:
            rows.append({"question": question, "options": {"A": "gout", "B": "asthma"}, "answer": "B"})
    return rows_file(*rows)


@pytest.fixture
def make_config(base_dir, data, tmp_path):
    def make(**changes):
        settings = {
            "base": str(base_dir), "data": str(data), "eval": "", "out": str(tmp_path / "run"), "steps": 10,
            "batch_size": 4, "lr": 1e-2, "warmup": 2, "contrast_weight": 0.5, "contrast_warmup": 0,
            "n_anchors": 16, "queue_capacity": 4, "queue_share": 2, "log_every": 2, "save_every": 5,
            "device": "cpu",
        }  # fmt: skip
        return TrainConfig(**(settings | changes))

    return make


@pytest.fixture
def base_copy(tmp_path, base_dir):
    """A copy of base_dir that a test may change."""
    return shutil.copytree(base_dir, tmp_path / "copy")
