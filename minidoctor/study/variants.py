"""The variants of the ablation: their adapters, training settings and losses."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minidoctor.batching import Batch
from minidoctor.config import TARGETS, AdapterConfig, ModelConfig, TrainConfig, check_range, flag
from minidoctor.expert_queue import ExpertQueue
from minidoctor.losses import contrastive_routing_loss
from minidoctor.model import Model, trainable_parameters
from minidoctor.router import Routing
from minidoctor.step import Losses, compute_losses, gather_routing


@dataclass(frozen=True)
class AblationConfig:
    """Settings that all runs of an ablation share. The learning rates and weights were chosen on data/dev.jsonl."""

    base: str = flag("data/base", "checkpoint directory of the frozen base model")
    data: str = flag("data/train.jsonl", "training questions with answers")
    eval: str = flag("data/heldout.jsonl", "evaluation questions (data/dev.jsonl for choosing settings)")
    steps: int = flag(100, "optimizer steps per run")
    batch_size: int = flag(32, "examples per step")
    max_seq_len: int = flag(256, "maximum length of an example in tokens; longer ones are truncated")
    eval_rows: int = flag(0, "number of evaluation questions, drawn at random (0: all)")
    loss_only: bool = flag(False, "evaluate the loss only, without generating answers")
    n_experts: int = flag(8, "LoRA experts per adapted layer")
    top_k: int = flag(2, "experts per token")
    rank: int = flag(2, "rank of one expert")
    targets: tuple[str, ...] = flag(tuple(TARGETS), "linear layers with experts")
    lr: float = flag(8e-3, "peak learning rate of the experts")
    lora_lr: float = flag(6e-3, "peak learning rate of plain LoRA with the same trainable parameters")
    active_lr: float = flag(1.6e-2, "peak learning rate of plain LoRA with the same active parameters")
    full_lr: float = flag(1e-3, "peak learning rate of full fine-tuning")
    balance_weight: float = flag(0.03, "weight of the load-balance loss in the variants that have it")
    queue_capacity: int = flag(64, "routing vectors per router and expert in the queue")

    def __post_init__(self) -> None:
        check_range(self, "steps", "batch_size", "rank", "queue_capacity")
        check_range(self, "n_experts", "max_seq_len", low=2)
        check_range(self, "top_k", high=self.n_experts)
        check_range(self, "eval_rows", low=0)


@dataclass(frozen=True)
class Variant:
    """The settings in which runs differ."""

    method: str = "moe"  # "full": fine-tuning of all parameters; "lora_trainable" and "lora_active": plain LoRA with
    # as many parameters as the experts have in all or use per token
    trainable_router: bool = True
    balance_factor: float = 1.0  # multiplies AblationConfig.balance_weight
    contrast: str = ""  # origin of the keys: "queue" or "batch"
    contrast_weight: float = 0.0
    contrast_temperature: float = 0.1
    n_groups: int = 1


BASELINE, STRONG_BALANCE, LORA = "+ balance", "+ balance, 10x weight", "LoRA, same trainable parameters"
IN_BATCH, QUEUE = "+ balance + in-batch contrast", "+ balance + queue contrast"
VARIANTS = {
    "full fine-tuning": Variant("full"),
    LORA: Variant("lora_trainable"),
    "LoRA, same active parameters": Variant("lora_active"),
    "LoRA-MoE, frozen random router": Variant(trainable_router=False, balance_factor=0.0),
    "LoRA-MoE": Variant(balance_factor=0.0),
    BASELINE: Variant(),
    STRONG_BALANCE: Variant(balance_factor=10.0),
    # Weight and temperature with the best free-form accuracy on data/dev.jsonl, see results/search.json.
    IN_BATCH: Variant(contrast="batch", contrast_weight=0.1, contrast_temperature=0.1),
    QUEUE: Variant(contrast="queue", contrast_weight=0.3, contrast_temperature=0.3),
}


def adapter_config(variant: Variant, config: AblationConfig, base: ModelConfig) -> AdapterConfig | None:
    """Return the adapter of a variant, with alpha = 2 rank in every one, or None for full fine-tuning."""
    if variant.method == "full":
        return None
    experts = AdapterConfig(config.n_experts, config.top_k, config.rank, 2.0 * config.rank, config.targets)
    experts = replace(experts, n_groups=variant.n_groups)
    if variant.method == "moe":
        return experts
    rank = config.top_k * config.rank
    if variant.method == "lora_trainable":
        n_experts, n_per_rank = (n_parameters(base, a) for a in (experts, AdapterConfig(1, 1, 1, 2.0, config.targets)))
        rank = round(n_experts / n_per_rank)
    return AdapterConfig(1, 1, rank, 2.0 * rank, config.targets)


def n_parameters(base: ModelConfig, adapter: AdapterConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in trainable_parameters(Model(base, adapter)).values())


def train_config(variant: Variant, config: AblationConfig, seed: int) -> TrainConfig:
    rates = {"moe": config.lr, "full": config.full_lr}
    rates |= {"lora_trainable": config.lora_lr, "lora_active": config.active_lr}
    return TrainConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        max_seq_len=config.max_seq_len,
        lr=rates[variant.method],
        warmup=min(20, config.steps // 5),
        balance_weight=config.balance_weight * variant.balance_factor,
        contrast_weight=variant.contrast_weight,
        contrast_temperature=variant.contrast_temperature,
        contrast_warmup=config.steps // 4,
        queue_capacity=config.queue_capacity,
        queue_share=min(8, config.queue_capacity),
        seed=seed,
    )


def compute_losses_in_batch(
    model: Model, batch: Batch, anchors: Tensor, queue: ExpertQueue | None, config: TrainConfig
) -> Losses:
    """Return the losses of a batch with the in-batch contrast in place of the contrast with the queue."""
    losses = compute_losses(model, batch, anchors, None, config)
    contrast = contrast_in_batch(losses.routings, batch.answer_positions, anchors, config.contrast_temperature)
    return losses._replace(terms=losses.terms | {"contrast": contrast})


def contrast_in_batch(routings: list[Routing], answer_positions: Tensor, anchors: Tensor, temperature: float) -> Tensor:
    """Contrast the anchors (n,) with all other answer positions (m,), or, if these are few, half of them."""
    anchors = anchors[: max(1, len(answer_positions) // 2)]
    z, gates, _ = gather_routing(routings, anchors)  # (L, n, Z), (L, n, E)
    keys, _, top1 = gather_routing(routings, answer_positions[~torch.isin(answer_positions, anchors)])  # (L, m, Z)
    n_layers, n_keys, routing_dim = keys.shape
    # A queue of this step only, with a slot for every key.
    queue = ExpertQueue(n_layers, gates.shape[-1], max(1, n_keys), routing_dim)
    if n_keys:
        queue.enqueue(keys.detach(), top1, n_keys)
    return contrastive_routing_loss(z, gates, queue.keys, queue.filled(), temperature)
