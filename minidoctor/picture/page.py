"""A page for the browser: the routing of a question with its answer, the expert queue and the training of a run.

The numbers are embedded as JSON, mostly in thousandths, in page.html, which draws them without network or library.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidoctor.checkpoints.hugging_face import explain_non_finite
from minidoctor.config import UserError, check
from minidoctor.files.json_files import write_atomically
from minidoctor.files.safetensors import read_tensors
from minidoctor.model import Model
from minidoctor.picture.metrics import read_metrics
from minidoctor.picture.terminal import PALETTE, letter, question_start, routed_texts, sublayer_names
from minidoctor.router import Routing
from minidoctor.text.tokenizer import Tokenizer, encode_conversation
from minidoctor.training.log import METRICS
from minidoctor.training.state import STATE

MAX_TOKENS = 120  # displayed of a question and its answer
MAX_KEYS = 64  # displayed per expert; the default --queue-capacity
MAX_ROWS = 400  # displayed of metrics.jsonl


def thousandths(values: Tensor) -> Any:
    return (1000 * values).round().int().tolist()


def thin(items: Sequence[Any], limit: int) -> Sequence[Any]:
    """Return every n-th item, counted from the last, with the smallest n that leaves at most `limit`."""
    return items[:: -max(1, math.ceil(len(items) / limit))][::-1]


def principal_components(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Project vectors (n, Z) on the two directions of most variance. Return (n, 2) and the shares of variance (2,)."""
    vectors = torch.nn.functional.pad(vectors - vectors.mean(0), (0, 1))  # (n, Z + 1): two columns for Z = 1 too
    _, scales, directions = torch.linalg.svd(vectors, full_matrices=False)
    return vectors @ directions[:2].T, scales[:2] ** 2 / (scales**2).sum()


def mean_cosines(vectors: Tensor, experts: Tensor) -> list[int | None]:
    """Return the mean cosine of pairs of unit vectors (n, Z) with equal experts (n,), and with different ones."""
    # The sum over all pairs is the squared length of the sum of the vectors, which needs no (n, n) matrix.
    vectors, counts = vectors.double(), experts.bincount()  # (n, Z), (E,)
    sums = vectors.new_zeros(len(counts), vectors.shape[-1]).index_add(0, experts, vectors)  # (E, Z)
    n, itself = len(vectors), vectors.square().sum()
    equal, n_equal = sums.square().sum() - itself, counts.square().sum() - n
    every, n_every = sums.sum(0).square().sum() - itself, n * n - n
    pairs = ((equal, n_equal), (every - equal, n_every - n_equal))
    return [thousandths(total / count) if count else None for total, count in pairs]


def sublayer_numbers(name: str, routing: Routing, keys: Tensor, written: Tensor) -> dict[str, Any]:
    """Return the numbers of one sublayer from its routing of the tokens (T, ...), keys (E, Q, Z), written (E,)."""
    top1, z = routing.expert_ids[:, 0], routing.z  # (T,), (T, Z)
    rings = [ring[:n] for ring, n in zip(keys, written.tolist(), strict=True)]  # E of (n_e, Z)
    key_experts = torch.arange(len(rings)).repeat_interleave(torch.tensor([len(ring) for ring in rings]))  # (n,)
    coordinates, variance = principal_components(torch.cat([*rings, z]))  # (n + T, 2), (2,)
    *key_points, points = coordinates.split([*map(len, rings), len(z)])  # E of (n_e, 2), (T, 2)
    return {
        "name": name,
        "top1": top1.tolist(),
        "gates": thousandths(routing.gates),  # (T, E)
        "probs": thousandths(routing.probs),  # (T, E)
        "points": thousandths(points),
        "keys": [thin(thousandths(part), MAX_KEYS) for part in key_points],
        "variance": thousandths(variance),
        "cosines": [mean_cosines(torch.cat(rings), key_experts), mean_cosines(z, top1)],
    }


@torch.inference_mode()
def run_numbers(run: Path, model: Model, tokens: list[int], start: int) -> dict[str, Any]:
    """Return the numbers of a run whose model reads the tokens. Those from `start` on are displayed."""
    names, adapter, path = sublayer_names(model), model.adapter, run / STATE
    assert adapter
    hidden, routings = model.hidden(torch.tensor([tokens], device=model.lm_head.weight.device))
    if not hidden.isfinite().all():
        raise UserError(f"{run}: the hidden states are not finite: {explain_non_finite(model)}")
    displayed = [Routing(*(tensor[0, start:].cpu() for tensor in routing)) for routing in routings]
    shape = len(names), adapter.n_experts
    queue = dict(read_tensors(path, names=("queue.keys", "queue.written"))) if path.is_file() else {}
    keys = queue.get("queue.keys", torch.zeros(*shape, 0, adapter.routing_dim))  # (L, E, Q, Z)
    check(keys.shape[:2] == shape, f"{path}: the queue is for other sublayers or experts than the adapter in {run}")
    written = queue.get("queue.written", torch.zeros(shape, dtype=torch.long))  # (L, E)
    log = run / METRICS
    metrics = read_metrics(log) if log.is_file() and log.stat().st_size else []  # none in the first steps of a run
    rows, load_rows = thin(metrics, MAX_ROWS), thin([row for row in metrics if "expert_load" in row], MAX_ROWS // 4)
    losses = [name for name in ("loss", "lm", "balance", "contrast") if any(name in row for row in rows)]
    return {
        "name": str(run),
        "experts": [letter(expert, adapter.n_experts) for expert in range(adapter.n_experts)],
        "top_k": adapter.top_k,
        "sublayers": list(map(sublayer_numbers, names, displayed, keys, written)),
        "steps": [row["step"] + 1 for row in rows],
        "losses": {name: [float(f"{row[name]:.4g}") if name in row else None for row in rows] for name in losses},
        "load_steps": [row["step"] + 1 for row in load_rows],
        "load": thousandths(torch.tensor([row["expert_load"] for row in load_rows])),  # (steps, L, E)
    }


def write_page(
    path: Path, tokenizer: Tokenizer, messages: list[Any], note: str, runs: Iterable[tuple[Path, Model]]
) -> None:
    """Write the page of a conversation that ends with an answer, and of one or more runs on the same base.

    `note` is the origin of the answer. Raises UserError for a model without a router.
    """
    start, answer_start = question_start(tokenizer, messages[:-1]), len(tokenizer.chat(messages[:-1]))
    tokens = encode_conversation(messages, tokenizer, start + MAX_TOKENS + 1).tokens
    if len(tokens) > start + MAX_TOKENS:
        tokens = tokens[: start + MAX_TOKENS]
        note += f" Only the first {MAX_TOKENS} tokens are displayed."
    texts: list[str] = []
    for text, experts in routed_texts(tokenizer, tokens[start:], tokens[start:]):
        texts += ["\u25cc"] * (len(experts) - 1) + [text]  # a character of several tokens is displayed at the last one
    sentence = {"tokens": texts, "answer_start": answer_start - start, "note": note}
    page = {"palette": PALETTE, "sentence": sentence, "runs": [run_numbers(*run, tokens, start) for run in runs]}
    content = json.dumps(page, separators=(",", ":"))  # ASCII: U+2028 and U+2029 are escaped
    for char in "<>&":  # so that no text can end the script element
        content = content.replace(char, f"\\u{ord(char):04x}")
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    write_atomically(path, template.replace("{{DATA}}", content).encode())
