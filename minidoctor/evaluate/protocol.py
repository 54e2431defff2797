"""The configuration of an evaluation, and the comparison of two protocols.

A protocol is stored with each result: everything that can change it, except the text of the prompts, whose hashes are
in the predictions. Two accuracies are comparable only under the same prompt, few-shot examples and scoring method.
"""

from dataclasses import dataclass
from typing import Any

from minidoctor.config import check, check_range, flag

METHODS = ("logits", "sets", "text", "generate", "loss")


@dataclass(frozen=True)
class EvalConfig:
    """Prompt and scoring methods."""

    score: tuple[str, ...] = flag(
        ("auto",),
        "scoring methods separated by commas, the first gives the headline accuracy: logits (option letters), sets "
        "(sets of letters), text (option texts), generate (generated answers), loss (auto: logits for a benchmark, "
        "sets,logits if several letters are correct; else text,logits,loss; generate for a model that reasons)",
    )
    prompt: str = flag("auto", "own, cmb, cmmlu, cmexam, huatuo, huatuo-o1 or a file (auto: that of the benchmark)")
    shots: int = flag(0, "few-shot examples per prompt, taken from --dev")
    raw: bool = flag(False, "text completion: the prompt without a chat format")
    batch_size: int = flag(16, "maximum number of questions per batch; does not change the answers in float32")
    max_new_tokens: int = flag(0, "maximum length of a generated answer in tokens (0: that of the chat format)")

    def __post_init__(self) -> None:
        check_range(self, "shots", "max_new_tokens", low=0)
        check_range(self, "batch_size")
        for method in self.score:
            check(method in (*METHODS, "auto"), f"score must be some of auto, {', '.join(METHODS)}, got {method!r}")
        check(len(set(self.score)) == len(self.score) > 0, f"score must list each method once, got {self.score}")
        check(not (self.raw and "loss" in self.score), "score loss needs a conversation, it does not work with --raw")
        no_prompt = set(self.score) <= {"text", "loss"} and (self.shots or self.prompt != "auto")
        check(not no_prompt, "score text and loss use the bare question: --prompt and --shots need logits or generate")
        check(self.score[0] != "loss", "score must begin with another method: the loss gives no accuracy")


def protocol_differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return the keys in which two protocols, in their JSON form, differ. Of files only the content counts."""

    def content(value: Any) -> Any:
        is_files = isinstance(value, list) and value and isinstance(value[0], dict)
        return [file.get("sha256") for file in value] if is_files else value

    keys = [key for key in a | b if key != "first_prompts"]  # the hash of every prompt is compared instead
    return [key for key in keys if content(a.get(key)) != content(b.get(key))]
