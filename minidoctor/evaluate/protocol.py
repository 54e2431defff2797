"""TODO"""

from dataclasses import dataclass

from minidoctor.config import check, check_range, flag

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
