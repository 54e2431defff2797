"""Accuracy on multiple choice and open questions, and the loss on their answers.

    python -m minidoctor.evaluate --base DIR [--adapter DIR] --data FILE... [--out predictions.json]

Multiple choice is scored in two ways, and both are always reported:

    text      the option whose text is likeliest, per token, as the answer to the bare question (the headline:
              a small base knows facts long before it can point at them by letter)
    letter    the likeliest letter as the answer to the question with its options below it

An open question counts as right when the greedy answer contains the expected one. Ties go to the first option.
"""

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minidoctor.checkpoint import load
from minidoctor.config import SampleConfig, choose_device, choose_dtype, run
from minidoctor.data import IGNORE, Example, Row, collate, conversation, encode, read_rows
from minidoctor.files import write_json
from minidoctor.generate import complete
from minidoctor.model import Model
from minidoctor.tokenizer import Tokenizer

TOKENS_IN_A_BATCH = 4096
ANSWERS_IN_A_BATCH = 32
GREEDY = SampleConfig(temperature=0.0, max_new_tokens=64)


@torch.inference_mode()
def answer_losses(model: Model, examples: list[Example], progress: tqdm) -> list[float]:
    """The negative log-likelihood in nats of each example's targets, summed over them.

    Examples of like length are computed together; the order of the result is that of the examples.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    losses = [0.0] * len(examples)
    device = model.lm_head.weight.device
    while order:
        size = max(1, TOKENS_IN_A_BATCH // len(examples[order[-1]].tokens))
        chosen, order = order[-size:], order[:-size]  # longest first: what does not fit shows at once
        batch = collate([examples[i] for i in chosen])
        hidden, _ = model.hidden(batch.tokens.to(device))  # (B, T, D)
        answers = batch.answers.to(device)
        logits = model.lm_head(hidden.flatten(0, 1)[answers]).float()  # (n, V)
        nll = torch.zeros(batch.targets.shape, device=device).flatten()  # (B*T,)
        nll[answers] = F.cross_entropy(logits, batch.targets.flatten()[batch.answers].to(device), reduction="none")
        for i, loss in zip(chosen, nll.view_as(batch.targets).sum(1).tolist(), strict=True):
            if not math.isfinite(loss):  # compared with others it would pick an option all the same
                raise FloatingPointError(f"the model's likelihood of an answer is {loss}, its weights are damaged")
            losses[i] = loss
        progress.update(len(chosen))
    return losses


def letter_example(row: Row, letter: str, tokenizer: Tokenizer) -> Example:
    """The question with its options, answered by a letter alone; the targets are the letter."""
    answered = [*row.messages[:-1], {"role": "assistant", "content": letter}]
    letters = next(ids for ids, own in tokenizer.chat_turns(answered) if own)  # without the token that ends it
    prompt = tokenizer.chat(row.messages[:-1])
    return Example((prompt + letters)[:-1], [IGNORE] * (len(prompt) - 1) + letters)


def predict(model: Model, tokenizer: Tokenizer, rows: list[Row], show_progress: bool = True) -> list[dict[str, Any]]:
    """One prediction a row, in their order. Scores are log-likelihoods in nats, of a text per token."""
    limit = model.config.max_seq_len
    for row in rows:
        if (length := len(tokenizer.chat(row.messages[:-1]))) >= limit:
            raise ValueError(f"question {row.id} has {length} tokens, the model reads at most {limit} with its answer")
    choices = [(i, letter) for i, row in enumerate(rows) for letter in row.options]
    answers = [encode(row.messages, tokenizer, limit) for row in rows]
    texts = [encode(conversation(rows[i].question, rows[i].options[letter]), tokenizer, limit) for i, letter in choices]
    letters = [letter_example(rows[i], letter, tokenizer) for i, letter in choices]
    written = [i for i, row in enumerate(rows) if not row.options]
    total = len(answers) + len(texts) + len(letters) + len(written)
    with tqdm(total=total, desc="evaluating", leave=False, disable=not show_progress) as progress:
        nlls = answer_losses(model, answers, progress)
        text_losses = answer_losses(model, texts, progress)
        letter_losses = answer_losses(model, letters, progress)
        replies = write_answers(model, tokenizer, [rows[i] for i in written], progress)

    predictions: list[dict[str, Any]] = [
        {"id": row.id, "answer": row.answer, "language": row.language, "topic": row.topic, "scores": {},
         "nll": nll, "n_tokens": n_targets(example)}
        for row, nll, example in zip(rows, nlls, answers, strict=True)
    ]  # fmt: skip
    for (i, letter), text, loss, letter_loss in zip(choices, texts, text_losses, letter_losses, strict=True):
        predictions[i]["scores"].setdefault("text", {})[letter] = -loss / n_targets(text)
        predictions[i]["scores"].setdefault("letter", {})[letter] = -letter_loss
    for i, reply in zip(written, replies, strict=True):
        predictions[i] |= {"prediction": reply, "correct": contains(reply, rows[i].answer)}
    for prediction in predictions:
        if scores := prediction["scores"]:
            best = {way: max(of, key=of.__getitem__) for way, of in scores.items()}
            right = {way: letter == prediction["answer"] for way, letter in best.items()}
            prediction |= {"prediction": best["text"], "correct": right["text"], "letter": best["letter"]}
            prediction["letter_correct"] = right["letter"]
    return predictions


def n_targets(example: Example) -> int:
    return sum(target != IGNORE for target in example.targets)


def write_answers(model: Model, tokenizer: Tokenizer, rows: list[Row], progress: tqdm) -> list[str]:
    """Greedy answers to open questions, in their order."""
    prompts = [tokenizer.chat(row.messages[:-1]) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    answers = [""] * len(rows)
    for start in range(0, len(order), ANSWERS_IN_A_BATCH):
        chosen = order[start : start + ANSWERS_IN_A_BATCH]
        for i, answer in zip(chosen, complete(model, tokenizer, [prompts[i] for i in chosen], GREEDY), strict=True):
            answers[i] = answer
        progress.update(len(chosen))
    return answers


def contains(reply: str, answer: str) -> bool:
    """Whether the answer stands in the reply, upper or lower case, whatever the spaces."""
    return " ".join(answer.lower().split()) in " ".join(reply.lower().split())


def summarize(predictions: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy of multiple choice by text (the headline) and by letter, of open questions, and nats per token."""

    def share(rows: Iterable[dict[str, Any]], key: str) -> tuple[float | None, int]:
        marks = [bool(row[key]) for row in rows]
        return (sum(marks) / len(marks) if marks else None), len(marks)

    # A question with several right letters cannot be answered by one: left out, not counted wrong.
    choices = [p for p in predictions if p["scores"] and len(p["answer"]) == 1]
    accuracy, n = share(choices, "correct")
    open_accuracy, n_open = share((p for p in predictions if not p["scores"]), "correct")
    return {
        "accuracy": accuracy,
        "n": n,
        "nll": sum(p["nll"] for p in predictions) / max(1, sum(p["n_tokens"] for p in predictions)),
        "letter_accuracy": share(choices, "letter_correct")[0],
        "open_accuracy": open_accuracy,
        "n_open": n_open,
    }


def evaluate(model: Model, tokenizer: Tokenizer, rows: list[Row], show_progress: bool = True) -> dict[str, Any]:
    """`{"summary": {..., "languages": {"en": {...}, "zh": {...}}}, "predictions": [...]}`."""
    predictions = predict(model, tokenizer, rows, show_progress)
    by_language = {
        language: summarize([p for p in predictions if p["language"] == language])
        for language in sorted({p["language"] for p in predictions})
    }
    return {"summary": summarize(predictions) | {"languages": by_language}, "predictions": predictions}


def table(summary: dict[str, Any]) -> str:
    """The summary for people, a line a language."""
    lines = [f"{'':10}{'choice':>8}{'(n)':>7}{'by letter':>11}{'open':>8}{'(n)':>7}{'nats/token':>12}"]
    for name, s in {"all": summary, **summary["languages"]}.items():
        percent = {k: "-" if s[k] is None else f"{s[k]:.1%}" for k in ("accuracy", "letter_accuracy", "open_accuracy")}
        lines.append(
            f"{name:10}{percent['accuracy']:>8}{s['n']:>7}{percent['letter_accuracy']:>11}"
            f"{percent['open_accuracy']:>8}{s['n_open']:>7}{s['nll']:>12.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m minidoctor.evaluate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", default="data/base", help="checkpoint directory (default data/base)")
    parser.add_argument("--adapter", help="directory that train.py wrote (default: the base alone)")
    parser.add_argument("--data", nargs="+", default=["data/heldout.jsonl"], help="files of questions")
    parser.add_argument("--out", help="write every prediction here, as JSON")
    parser.add_argument("--chat-format", default="auto", help="how conversations are written (auto: as trained)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    given = parser.parse_args()
    if given.out and (not Path(given.out).parent.is_dir() or Path(given.out).is_dir()):
        raise ValueError(f"--out {given.out}: must be a file in a directory that exists")
    device = choose_device(given.device)
    dtype = choose_dtype(given.dtype, device)
    rows = [row for path in given.data for row in read_rows(path)]
    model, tokenizer = load(given.base, given.adapter, dtype, device, given.chat_format)
    print(f"{given.base}: {tokenizer.note}", file=sys.stderr)
    result = evaluate(model, tokenizer, rows)
    print(table(result["summary"]))
    if given.out:
        write_json(Path(given.out), result)
        print(f"every prediction: {given.out}")


if __name__ == "__main__":
    run(main)
