"""The variants of the sequential experiment, and its settings."""

from dataclasses import dataclass, replace

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
    """The settings in which runs differ. `contrast` can also be "pair"."""

    groups: str = ""  # choice of a sequence's group of experts: "oracle" (by its stage), "k-means", "contrast"
    n_groups: int = 2
    only_in_use: bool = False  # balance only the experts in use
    reservoir: bool = False  # the queue is a reservoir
    proportional: bool = False  # scale the update of a group's experts by the group's share of the batch
    router_factor: float = 1.0  # multiplies the learning rate of the router in the second stage

    def __post_init__(self) -> None:
        assert not (self.groups and self.only_in_use), "within groups, all experts are balanced"


MOE, ORACLE, K_MEANS = "LoRA-MoE", "oracle groups", "k-means groups + balance"
NO_BALANCE = SequenceVariant(balance_factor=0.0)
TOKENS = SequenceVariant(contrast="queue", contrast_weight=0.3, contrast_temperature=0.3)
PAIRS = SequenceVariant(balance_factor=0.0, contrast="pair", contrast_weight=0.1)
SEQUENCE_VARIANTS = {
    LORA: SequenceVariant("lora_trainable"),
    MOE: NO_BALANCE,
    BASELINE: SequenceVariant(),
    QUEUE: TOKENS,
    ORACLE: replace(NO_BALANCE, groups="oracle"),
    "oracle groups + balance": SequenceVariant(groups="oracle"),
    # Similar sequences are routed alike.
    "pair contrast, 0.1x weight": replace(PAIRS, contrast_weight=0.01),
    "pair contrast": PAIRS,
    "pair contrast, 10x weight": replace(PAIRS, contrast_weight=1.0),
    "+ balance + pair contrast": replace(PAIRS, balance_factor=1.0),
    # The queue remembers the first stage.
    "+ balance + reservoir contrast": replace(TOKENS, reservoir=True),
    "pair contrast, reservoir": replace(PAIRS, reservoir=True),
    "pair contrast, 10x weight, reservoir": replace(PAIRS, contrast_weight=1.0, reservoir=True),
    # The prompt chooses a group of experts.
    "k-means groups": replace(NO_BALANCE, groups="k-means"),
    K_MEANS: SequenceVariant(groups="k-means"),
    "k-means groups + balance, four": SequenceVariant(groups="k-means", n_groups=4),
    "contrast groups + balance": SequenceVariant(groups="contrast"),
    "contrast groups + balance, proportional": SequenceVariant(groups="contrast", proportional=True),
    "k-means groups + balance, proportional": SequenceVariant(groups="k-means", proportional=True),
    "contrast groups + balance, four": SequenceVariant(groups="contrast", n_groups=4),
    # Unused experts stay free.
    "+ balance in use": SequenceVariant(only_in_use=True),
    "+ balance in use + pair contrast": replace(PAIRS, balance_factor=1.0, only_in_use=True, reservoir=True),
    # The router learns less, or nothing, in the second stage.
    "+ balance, router at 0.1x": SequenceVariant(router_factor=0.1),
    "+ balance, router frozen": SequenceVariant(router_factor=0.0),
    "pair contrast, router frozen": replace(PAIRS, router_factor=0.0),
    "k-means groups + balance, router frozen": SequenceVariant(groups="k-means", router_factor=0.0),
    "contrast groups + balance, router frozen": SequenceVariant(groups="contrast", router_factor=0.0),
}
MAIN = (LORA, MOE, BASELINE, QUEUE, ORACLE)
