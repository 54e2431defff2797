"""Options of the benchmark: one frozen dataclass, one flag per field, and the shapes of the random models."""

from dataclasses import dataclass

from minidoctor.config import (
    QUANTIZATIONS,
    AdapterConfig,
    ModelConfig,
    TrainConfig,
    check,
    check_quantization,
    check_range,
    flag,
)

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
# The config.json of https://huggingface.co/HuggingFaceTB/SmolLM2-135M, Qwen/Qwen3-0.6B and Qwen/Qwen3-4B
SHAPES = {
    "smollm2": ModelConfig(49152, 576, 30, 9, 3, 64, 1536, 8192, 1e-5, 1e5),
    "qwen3-0.6b": ModelConfig(151936, 1024, 28, 16, 8, 128, 3072, 40960, 1e-6, 1e6, qk_norm=True),
    "qwen3-4b": ModelConfig(151936, 2560, 36, 32, 8, 128, 9728, 40960, 1e-6, 1e6, qk_norm=True),
}


@dataclass(frozen=True)
class BenchConfig:
    """Settings of one benchmark."""

    base: str = flag("", "checkpoint directory ('': random weights of --shape)")
    shape: str = flag("smollm2", f"shape of the random model: {', '.join(SHAPES)}")
    layers: int = flag(0, "layers of the random model (0: 10; sample: those of the shape)")
    data: str = flag("", "train: questions instead of random tokens, a file or a directory")
    batch_size: int = flag(4, "train, memory: examples per step")
    seq_len: int = flag(256, "train, memory: tokens per example, with --data the maximum")
    rounds: int = flag(7, "train, sample, load: alternating rounds")
    steps: int = flag(20, "memory: training steps until the second measurement")
    new_tokens: int = flag(128, "sample: generated tokens")
    n_experts: int = flag(8, "LoRA experts per adapted layer")
    top_k: int = flag(2, "experts per token")
    rank: int = flag(8, "rank of one expert")
    targets: tuple[str, ...] = flag(FEED_FORWARD, "linear layers with experts")
    recompute: bool = flag(False, "activation checkpointing, as in train.py")
    compile: bool = flag(False, "compile the transformer blocks, as in train.py and sample.py")
    threads: int = flag(0, "CPU threads (0: all)")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: str = flag("auto", "dtype of the base model: auto (bfloat16 on a GPU that has it), float32 or bfloat16")
    quantize: str = flag("none", f"form of the base model's linear layers: {', '.join(QUANTIZATIONS)}")

    def __post_init__(self) -> None:
        check_quantization(self.quantize)
        check(self.shape in SHAPES, f"shape must be one of {', '.join(SHAPES)}, got {self.shape!r}")
        check_range(self, "batch_size", "rounds", "new_tokens")
        check_range(self, "layers", "threads", low=0)
        check_range(self, "seq_len", low=4)
        check_range(self, "steps", low=3)
        check_range(self, "n_experts", low=2)  # plain LoRA, one expert, is part of every comparison

    @property
    def experts(self) -> AdapterConfig:
        return AdapterConfig(self.n_experts, self.top_k, self.rank, 2.0 * self.rank, self.targets)

    @property
    def train(self) -> TrainConfig:
        return TrainConfig(recompute=self.recompute, compile=self.compile)  # the default losses: balance and contrast
