"""Configuration: the model, the adapter, training and sampling, as frozen dataclasses that check their values.

A field made with `flag` has a help text and is one flag of the command line: `top_k: int = flag(2, "...")` becomes
`--top-k 2` (minidoctor/cli/flags.py). Numbers are checked once, when the dataclass is made; other code relies on it.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

# The default targets: experts in the MLP learn the facts of the training questions by heart, see data/README.md.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# The linear layers of a block that can have experts, and the sublayer whose router computes their gates.
TARGETS = dict.fromkeys(ATTENTION, "self_attn") | dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp")

QUANTIZATIONS = ("none", "nf4", "nf4-double", "int8")  # forms of the frozen weights: ops/quantized.py

TINY = 1e-30  # lower bound of values that must be above 0
LARGEST = 2**31 - 1  # excludes infinity and sizes that are surely mistakes


class UserError(ValueError):
    """Bad input, in one sentence for the user: what is wrong, what was expected, what to do."""


def flag(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


def check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def check_range(config: object, *names: str, low: float = 1, high: float = LARGEST) -> None:
    lower = "above 0" if low == TINY else f"at least {low:g}"
    for name in names:
        value = getattr(config, name)
        upper = f" and at most {high:g}" if high < LARGEST or value > high else ""
        check(low <= value <= high, f"{name} must be {lower}{upper}, got {value}")


def check_quantization(name: str) -> None:
    check(name in QUANTIZATIONS, f"quantize must be one of {', '.join(QUANTIZATIONS)}, got {name!r:.40}")


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies for contexts longer than the original one."""

    kind: str  # "linear": all frequencies divided by `factor`; "llama3": only the low ones
    factor: float
    low_freq_factor: float = 1.0  # a frequency with fewer turns than this in the original context is divided
    high_freq_factor: float = 4.0  # a frequency with more turns than this stays unchanged
    original_seq_len: int = 8192

    def __post_init__(self) -> None:
        check(self.kind in ("linear", "llama3"), f"rope type must be linear or llama3, got {self.kind!r:.40}")
        check_range(self, "factor", "original_seq_len")
        check_range(self, "low_freq_factor", "high_freq_factor", low=TINY)
        low, high = self.low_freq_factor, self.high_freq_factor
        check(low < high, f"low_freq_factor={low} must be below high_freq_factor={high}")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder and the switches of its family. checkpoints/families.py reads it from config.json."""

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
    qk_norm: bool = False  # Qwen3: RMSNorm of each head's query and key before the rotation
    window: int = 0  # Mistral: number of positions a token attends to, including its own (0: all)
    rope_scaling: RopeScaling | None = None
    alibi: bool = False  # Baichuan 13B: a bias on the attention scores instead of rotary positions

    def __post_init__(self) -> None:
        check_range(self, "vocab_size", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "max_seq_len")
        check_range(self, "n_layers", high=1000)
        check_range(self, "norm_eps", low=TINY, high=1)
        check_range(self, "rope_theta", high=1e12)
        check_range(self, "window", low=0)
        heads, groups = self.n_heads, self.n_kv_heads
        check(heads % groups == 0, f"n_heads={heads} must be a multiple of n_kv_heads={groups}")
        check(self.head_dim % 2 == 0, f"head_dim must be even for the rotation of pairs, got {self.head_dim}")


@dataclass(frozen=True)
class AdapterConfig:
    """The experts and their router. `AdapterConfig(n_experts=1)` is plain LoRA, without a router."""

    n_experts: int = flag(8, "LoRA experts per adapted layer (1: plain LoRA)")
    top_k: int = flag(2, "experts per token")
    rank: int = flag(8, "rank of one expert")
    alpha: float = flag(16.0, "the sum of the experts is multiplied by alpha / rank")
    targets: tuple[str, ...] = flag(ATTENTION, "linear layers with experts")
    routing_dim: int = flag(16, "dimension of the routing vectors")
    n_groups: int = flag(0, "groups of experts; a token chooses from its prompt's group (1: off; 0: 2 where that fits)")

    def __post_init__(self) -> None:
        if self.n_experts == 1 and self.top_k == AdapterConfig.top_k:
            object.__setattr__(self, "top_k", 1)  # the default of several experts: one leaves nothing to choose
        if self.n_groups == 0:  # two groups, unless they would leave a token nothing to choose
            object.__setattr__(self, "n_groups", 1 if self.n_experts % 2 or 2 * self.top_k >= self.n_experts else 2)
        check_range(self, "n_experts", "rank", "routing_dim", "n_groups", high=4096)
        check_range(self, "alpha", low=TINY)
        groups, rest = self.n_groups, self.n_experts % self.n_groups
        check(not rest, f"n_experts={self.n_experts} must be a multiple of n_groups={groups}")
        check_range(self, "top_k", high=self.n_experts // groups)  # a token chooses within one group
        for target in self.targets:
            check(target in TARGETS, f"unknown target {target!r}, expected some of {', '.join(TARGETS)}")
        distinct = len(set(self.targets)) == len(self.targets) > 0
        check(distinct, f"targets must be at least one and distinct, got {self.targets}")


@dataclass(frozen=True)
class TrainConfig:
    """One fine-tuning run."""

    base: str = flag("data/base", "checkpoint directory of the frozen base model")
    data: str = flag("data/train.jsonl", "training questions with answers: a file or a directory of files")
    eval: str = flag("data/heldout.jsonl", "questions for the evaluation before and after training ('': none)")
    leave_out_eval: bool = flag(False, "remove questions from --data that also occur in --eval")
    explain: bool = flag(False, "train on each question's explanation too, below its answer")
    out: str = flag("out", "directory for the adapter, metrics.jsonl and report.json")
    steps: int = flag(1200, "optimizer steps")
    batch_size: int = flag(32, "examples per step")
    accumulate: int = flag(1, "gradient-accumulation steps per batch")
    recompute: bool = flag(False, "activation checkpointing of every block: less memory, more time")
    shard: bool = flag(False, "shard the frozen base over the processes of torchrun (FSDP2)")
    compile: bool = flag(False, "compile the transformer blocks with torch.compile (about 30 s warm-up)")
    max_seq_len: int = flag(256, "maximum length of an example in tokens; longer ones are truncated")
    lr: float = flag(5e-3, "peak learning rate")
    warmup: int = flag(20, "warm-up steps to the peak; a cosine to a tenth of it follows")
    weight_decay: float = flag(0.0, "decoupled weight decay of the trainable parameters")
    clip: float = flag(1.0, "maximum norm of the gradient")
    balance_weight: float = flag(0.2, "weight of the load-balance loss (0: off)")
    contrast_weight: float = flag(0.03, "weight of the contrastive routing loss (0: off, and no queue)")
    contrast_temperature: float = flag(0.3, "temperature of the contrastive routing loss")
    contrast_warmup: int = flag(50, "steps until the contrastive loss has its full weight")
    n_anchors: int = flag(128, "answer tokens per step that are compared with the queue, and candidates to be enqueued")
    queue_capacity: int = flag(64, "slots of the queue per router and expert")
    queue_share: int = flag(8, "slots of one router and expert that one step may replace")
    log_every: int = flag(20, "steps between two printed lines")
    save_every: int = flag(100, "steps between two saves of the training state")
    seed: int = flag(0, "seed of all random draws")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: str = flag("auto", "dtype of the frozen base: auto (bfloat16 on a GPU that has it), float32, bfloat16")
    quantize: str = flag("none", f"form of the frozen linear layers: {', '.join(QUANTIZATIONS)}")
    chat_format: str = flag("auto", "chat format (auto: the format that the checkpoint was trained in)")
    resume: bool = flag(
        False, "continue the run in --out; only --accumulate, --recompute, --shard, --compile may differ"
    )

    def __post_init__(self) -> None:
        check_range(self, "steps", "batch_size", "accumulate", "log_every", "save_every")
        check_range(self, "n_anchors", "queue_capacity", "queue_share", high=65536)
        check_range(self, "max_seq_len", low=2)
        check_range(self, "lr", "clip", "contrast_temperature", low=TINY)
        check_range(self, "weight_decay", "balance_weight", "contrast_weight", low=0)
        check_range(self, "warmup", "contrast_warmup", "seed", low=0)
        check(bool(self.eval) or not self.leave_out_eval, "leave_out_eval needs the questions of eval")
        check(not (self.shard and self.compile), "shard and compile exclude each other")
        check_quantization(self.quantize)
        check(not self.shard or self.quantize == "none", "shard and quantize exclude each other")
        share, capacity = self.queue_share, self.queue_capacity
        check(share <= capacity, f"queue_share must be at most queue_capacity={capacity}, got {share}")


@dataclass(frozen=True)
class SampleConfig:
    """Sampling of the next token. The filters apply in this order: temperature, top-k, top-p."""

    temperature: float = flag(0.0, "sampling temperature (0: greedy decoding)")
    top_k: int = flag(0, "sample among the k most probable tokens (0: all)")
    top_p: float = flag(1.0, "sample among the most probable tokens with total probability p")
    max_new_tokens: int = flag(256, "maximum length of an answer in tokens")
    seed: int = flag(0, "seed of the sampling")
    static_cache: bool = False  # decode with fixed shapes, for a model compiled into CUDA graphs: ops/compiled.py

    def __post_init__(self) -> None:
        check_range(self, "temperature", "top_k", "seed", low=0)
        check_range(self, "top_p", low=TINY, high=1)
        check_range(self, "max_new_tokens")
