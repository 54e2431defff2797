"""The variants of the sequential experiment, and its settings."""

from dataclasses import dataclass

from minidoctor.config import check, check_range, flag
from minidoctor.study.variants import BASELINE, LORA, QUEUE, AblationConfig, Variant

SPLITS = ("language", "department", "form", "mixed")


@dataclass(frozen=True)
class SequenceConfig(AblationConfig):
    """Settings that all runs of the sequential experiment share."""

    steps: int = flag(100, "optimizer steps per run, or with --sequence per stage")
    balance_weight: float = flag(0.1, "weight of the load-balance loss; without --sequence 0.03 by default")
    stages: tuple[str, ...] = flag(SPLITS, "with --sequence: how the questions are split into two stages")
    text_paragraphs: int = flag(200, "with --sequence: paragraphs of the base's text that measure retention (0: none)")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "text_paragraphs", low=0)
        check(not self.loss_only, "loss_only has no meaning for the sequential experiment, which generates no answers")
        for name in self.stages:
            check(name in SPLITS, f"unknown stages {name!r}, expected some of {', '.join(SPLITS)}")


@dataclass(frozen=True)
class SequenceVariant(Variant):
    """The settings in which runs differ."""

    oracle: bool = False  # a question's stage is the number of its group of experts


MOE, ORACLE, GROUPS = "LoRA-MoE", "oracle groups + balance", "prompt groups + balance"
GROUPS_QUEUE = "prompt groups + balance + queue contrast"
SEQUENCE_VARIANTS = {
    LORA: SequenceVariant("lora_trainable"),
    MOE: SequenceVariant(balance_factor=0.0),
    BASELINE: SequenceVariant(),
    QUEUE: SequenceVariant(contrast="queue", contrast_weight=0.3, contrast_temperature=0.3),
    ORACLE: SequenceVariant(n_groups=2, oracle=True),
    GROUPS: SequenceVariant(n_groups=2),
    # The weight of train.py
    GROUPS_QUEUE: SequenceVariant(n_groups=2, contrast="queue", contrast_weight=0.03, contrast_temperature=0.3),
}
