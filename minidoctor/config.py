"""What can be chosen, as frozen dataclasses, and the few lines that turn them into a command line.

A field is a flag: `top_k: int = flag(2, "...")` becomes `--top-k 2`. Values are checked once, here,
when the dataclass is made; everything below may rely on them.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch

# The linear layers of a block that can have experts, and the sublayer whose router serves them.
TARGETS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


TINY = 1e-30  # the least that counts as above 0
LARGEST = 2**31 - 1  # keeps out infinities, and integers that no tensor's shape can hold


def flag(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_range(config: object, *names: str, low: float = 1, high: float = LARGEST) -> None:
    lower = "above 0" if low == TINY else f"at least {low:g}"
    for name in names:
        value = getattr(config, name)
        upper = f" and at most {high:g}" if high < LARGEST or value > high else ""
        check(low <= value <= high, f"{name} must be {lower}{upper}, got {value}")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched beyond the context that a model was first trained on."""

    kind: str  # "linear": all angles divided by `factor`; "llama3": the slow ones only
    factor: float
    low_freq_factor: float = 1.0  # turns in the original context below which an angle is divided
    high_freq_factor: float = 4.0  # and above which it is left alone
    original_seq_len: int = 8192

    def __post_init__(self) -> None:
        check(self.kind in ("linear", "llama3"), f"rope type must be linear or llama3, got {self.kind!r:.40}")
        check_range(self, "factor", "original_seq_len")
        check_range(self, "low_freq_factor", "high_freq_factor", low=TINY)
        check(
            self.low_freq_factor < self.high_freq_factor,
            f"low_freq_factor={self.low_freq_factor} must be below high_freq_factor={self.high_freq_factor}",
        )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: its shape, and what its family does in its own way. `families.py` reads it from config.json."""

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    max_seq_len: int = 2048
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tied: bool = True  # the output layer is the embedding matrix
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: each head's query and key are normalised before they are rotated
    window: int = 0  # Mistral: a token sees this many, itself among them (0: all before it)
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        check_range(self, "vocab_size", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "max_seq_len")
        check_range(self, "n_layers", high=1000)
        check_range(self, "norm_eps", low=TINY, high=1)
        check_range(self, "rope_theta", high=1e12)
        check_range(self, "window", low=0)
        check(
            self.n_heads % self.n_kv_heads == 0,
            f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}",
        )
        check(
            self.head_dim % 2 == 0,
            f"head_dim must be even to be rotated in pairs, got {self.head_dim}",
        )


@dataclass(frozen=True)
class AdapterConfig:
    """The experts and their router. `n_experts=1` is plain LoRA."""

    n_experts: int = flag(8, "LoRA experts of each adapted layer (1: plain LoRA)")
    top_k: int = flag(2, "experts that serve one token")
    rank: int = flag(8, "rank of one expert")
    alpha: float = flag(16.0, "an expert's update is scaled by alpha / rank")
    targets: tuple[str, ...] = flag(tuple(TARGETS), "linear layers that get experts")
    routing_dim: int = flag(16, "dim of the routing vectors")

    def __post_init__(self) -> None:
        check_range(self, "n_experts", "rank", "routing_dim", high=4096)
        check_range(self, "alpha", low=TINY)
        check(
            1 <= self.top_k <= self.n_experts,
            f"top_k must be between 1 and n_experts={self.n_experts}, got {self.top_k}",
        )
        for target in self.targets:
            check(target in TARGETS, f"unknown target {target!r}, choose from {', '.join(TARGETS)}")
        check(
            len(set(self.targets)) == len(self.targets) > 0,
            f"targets must be named once each, got {self.targets}",
        )


COMPILE = "make machine code of the blocks (torch.compile): half a minute at first, then faster, in writing most"


@dataclass(frozen=True)
class TrainConfig:
    """One fine-tuning run."""

    base: str = flag("data/base", "checkpoint directory of the frozen base model")
    data: str = flag("data/train.jsonl", "questions and answers to learn from: a file, or a directory of them")
    eval: str = flag("data/heldout.jsonl", "questions to evaluate on, before and after ('': none)")
    leave_out_eval: bool = flag(False, "leave out of --data the questions that stand in --eval as well")
    explain: bool = flag(False, "learn a question's explanation too, below its answer")
    out: str = flag("out", "directory for the adapter, metrics.jsonl and report.json")
    steps: int = flag(400, "optimizer steps")
    batch_size: int = flag(32, "examples in a step")
    accumulate: int = flag(1, "parts that a batch is computed in: less memory, the same language-model gradient")
    recompute: bool = flag(False, "keep no activations inside a block, compute them again: less memory, more time")
    compile: bool = flag(False, COMPILE)
    max_seq_len: int = flag(256, "longest example in tokens; longer ones are cut")
    lr: float = flag(2e-3, "peak learning rate")
    warmup: int = flag(20, "steps until the peak; after it a cosine down to a tenth of it")
    weight_decay: float = flag(0.0, "decoupled weight decay of the trained weights")
    clip: float = flag(1.0, "largest norm of the gradient")
    balance_weight: float = flag(0.1, "weight of the load-balance loss (0: off)")
    contrast_weight: float = flag(0.0, "weight of the contrastive routing loss (0: off; 0.03 was studied)")
    contrast_temperature: float = flag(0.3, "temperature of the contrastive routing loss")
    contrast_warmup: int = flag(50, "steps until the contrastive loss has its full weight")
    n_anchors: int = flag(128, "answer tokens of each step that are contrasted and remembered")
    queue_capacity: int = flag(64, "routing vectors remembered for each router and expert")
    queue_share: int = flag(8, "of them at most this many are replaced in one step")
    log_every: int = flag(20, "steps between two printed lines")
    save_every: int = flag(100, "steps between two saves")
    seed: int = flag(0, "seed of everything random")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: str = flag("auto", "of the frozen base: auto (bfloat16 on a GPU that has it), float32, bfloat16")
    chat_format: str = flag("auto", "how conversations are written (auto: as the checkpoint was trained)")
    resume: bool = flag(
        False, "go on with the run in --out; other flags must be its own, but for --accumulate, --recompute, --compile"
    )

    def __post_init__(self) -> None:
        check_range(self, "steps", "batch_size", "accumulate", "log_every", "save_every")
        check_range(self, "n_anchors", "queue_capacity", "queue_share", high=65536)
        check_range(self, "max_seq_len", low=2)
        check_range(self, "lr", "clip", "contrast_temperature", low=TINY)
        check_range(self, "weight_decay", "balance_weight", "contrast_weight", low=0)
        check_range(self, "warmup", "contrast_warmup", "seed", low=0)
        check(
            self.queue_share <= self.queue_capacity,
            f"queue_share must be at most queue_capacity={self.queue_capacity}, got {self.queue_share}",
        )


@dataclass(frozen=True)
class SampleConfig:
    """How the next token is chosen. The filters apply in this order: temperature, top-k, top-p."""

    temperature: float = flag(0.0, "0 takes the likeliest token, higher is more random")
    top_k: int = flag(0, "choose among the k likeliest tokens (0: all)")
    top_p: float = flag(1.0, "choose among the likeliest tokens that together have probability p")
    max_new_tokens: int = flag(256, "longest answer in tokens")
    seed: int = flag(0, "seed of the choice")

    def __post_init__(self) -> None:
        check_range(self, "temperature", "top_k", "seed", low=0)
        check_range(self, "top_p", low=TINY, high=1)
        check_range(self, "max_new_tokens")


WAYS = ("logits", "text", "generate", "loss")


@dataclass(frozen=True)
class EvalConfig:
    """How questions are put and what is read as the model's answer."""

    score: tuple[str, ...] = flag(
        ("auto",),
        "ways of scoring with commas between, the first is the headline: logits (of the letters), text (of each "
        "option), generate (write and read), loss (auto: logits; for a file of one's own text,logits,loss)",
    )
    prompt: str = flag("auto", "own, cmb, cmmlu, cmexam, huatuo or a file (auto: the benchmark's own)")
    shots: int = flag(0, "solved questions in front of each, from --dev")
    raw: bool = flag(False, "put the prompt as text to go on with, without a chat format")
    batch_size: int = flag(16, "most questions computed at once; it does not change the answers in float32")
    max_new_tokens: int = flag(64, "longest written answer in tokens (more for a model that reasons first)")

    def __post_init__(self) -> None:
        check_range(self, "shots", low=0)
        check_range(self, "batch_size", "max_new_tokens")
        for way in self.score:
            check(way in (*WAYS, "auto"), f"score must be of auto, {', '.join(WAYS)}, got {way!r}")
        check(len(set(self.score)) == len(self.score) > 0, f"score must name each way once, got {self.score}")
        check(not (self.raw and "loss" in self.score), "the loss is that of a conversation, there is none with --raw")
        bare = set(self.score) <= {"text", "loss"} and (self.shots or self.prompt != "auto")
        check(not bare, "text and loss put the bare question: prompt and shots need logits or generate")
        check(self.score[0] != "loss", "the loss alone is no accuracy: score must begin with another way")


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """One flag a field. A flag that was not given is left out of the result, so that a caller can tell."""
    types = get_type_hints(config)
    for field in dataclasses.fields(config):
        name, kind = "--" + field.name.replace("_", "-"), types[field.name]
        shown = ",".join(field.default) if isinstance(field.default, tuple) else repr(field.default)
        text = field.metadata["help"] + ("" if kind is bool else f" (default {shown})")
        if kind is bool:
            parser.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        parse = kind if kind in (int, float, str) else lambda value: tuple(value.split(","))
        parser.add_argument(name, type=parse, default=argparse.SUPPRESS, help=text, metavar=field.name.upper())


def from_flags(config: type, given: dict[str, Any]) -> Any:
    """The dataclass with the given flags that belong to it, and its defaults otherwise."""
    return config(**{f.name: given[f.name] for f in dataclasses.fields(config) if f.name in given})


def from_json(config: type, content: Any) -> Any:
    """The dataclass with the fields of a JSON object, each of its type. Raises ValueError."""
    check(isinstance(content, dict), f"expected an object, got {type(content).__name__}")
    types, fields = get_type_hints(config), {}
    for name, value in content.items():
        check(name in types, f"unknown setting {name!r:.40}")
        if isinstance(value, list):
            value = tuple(value) if all(isinstance(item, str) for item in value) else None
        kind = {float: (int, float)}.get(types[name], getattr(types[name], "__origin__", types[name]))
        right = isinstance(value, kind) and (type(value) is not bool or kind is bool)
        check(right, f"{name} is {value!r:.40}, expected {getattr(types[name], '__name__', 'another type')}")
        fields[name] = value
    missing = sorted(set(types) - set(fields))
    check(not missing, f"no {', '.join(missing)}")
    return config(**fields)


def choose_device(name: str) -> torch.device:
    """Raises ValueError if there is none of that kind."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    check(name in available, f"device must be auto, {', '.join(available)}, got {name!r}")
    check(
        available[name],
        f"device {name} is not there, torch {torch.__version__} finds only "
        f"{', '.join(kind for kind in available if available[kind])}",
    )
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of the frozen base. Raises ValueError."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    check(name in dtypes, f"dtype must be auto, {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


def run(main: Callable[[], None]) -> None:
    """Run a program's main: bad input ends in one line and exit code 2, a failure on the way in code 1."""
    try:
        main()
    except (
        ValueError,
        FileNotFoundError,
        IsADirectoryError,
        NotADirectoryError,
        PermissionError,
    ) as error:
        code, message = 2, str(error)
    except (OSError, FloatingPointError, MemoryError) as error:
        code, message = 1, str(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    else:
        return
    # One line, whatever a file's own words in it were.
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(code)
