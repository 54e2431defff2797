"""Pretrain `data/base/`, a tokenizer and a small bilingual model, on statements without a question.

    python -m data.make_base

The model is minidoctor's and the optimizer step that of `train.py`, with all parameters trainable.
"""

import argparse
import io
import itertools
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
from torch import nn
from tqdm import tqdm

from data.make_text import declarative_text, names_and_values, read_table
from minidoctor.batching import IGNORE, Example, collate
from minidoctor.checkpoints.hugging_face import save_model
from minidoctor.cli.device import choose_device
from minidoctor.cli.main import run
from minidoctor.config import ModelConfig, TrainConfig
from minidoctor.files.json_files import write_atomically
from minidoctor.model import Model
from minidoctor.step import make_optimizer, train_step
from minidoctor.text.chat_formats import CHAT_FORMATS
from minidoctor.text.tokenizer import Tokenizer, load_tokenizer

SHAPE = ModelConfig(
    vocab_size=8000,
    dim=256,
    n_layers=4,
    n_heads=4,
    n_kv_heads=4,
    head_dim=64,
    ffn_dim=640,
    max_seq_len=512,
)
TOKENIZER_ROUNDS = 40  # of text
P_WORDING = 0.2  # of a token outside names and values to be a target


def make_tokenizer(conditions: list[dict], out: Path) -> Tokenizer:
    """Train BPE with byte fallback, write it to `out` and load it. The chat format's special tokens are control pieces.

    The text is that of the model, except that a sentence that begins with a name or a value begins in lower case.
    """
    # No piece crosses the boundary of a name or value. Chinese has no spaces at these boundaries, and with such pieces
    # a name would have other tokens in every sentence. Standing alone, too, names and values get longer pieces.
    text = declarative_text(conditions, TOKENIZER_ROUNDS, seed=0, cut="\t")
    text = itertools.chain(text, names_and_values(conditions) * (TOKENIZER_ROUNDS // 2))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text,
        pretokenization_delimiter="\t",
        model_writer=model,
        model_type="bpe",
        vocab_size=SHAPE.vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        control_symbols=list(CHAT_FORMATS["minidoctor"].needs),
        normalization_rule_name="identity",  # decoding returns the encoded text,
        remove_extra_whitespaces=False,  # with its spaces
        split_digits=True,
        num_threads=1,  # the same model on every machine
        minloglevel=2,
    )
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "tokenizer.model", model.getvalue())
    return load_tokenizer(out)


def find_slots(text: str, tokens: list[int], tokenizer: Tokenizer) -> list[bool]:
    """Return, for each token of a text with "\\t" around names and values, whether its last character is in one."""
    inside = [i % 2 == 1 for i, part in enumerate(text.split("\t")) for _ in part]
    end, found = -1, []  # the encoder puts a space before the text
    for token in tokens:
        end += len(tokenizer.decode([tokens[0], token])) - len(tokenizer.decode([tokens[0]]))
        found.append(inside[min(max(end, 1), len(inside)) - 1])
    return found


def make_blocks(conditions: list[dict], tokenizer: Tokenizer, length: int, seed: int) -> Iterator[Example]:
    """Yield blocks of `length` tokens from an endless text whose paragraphs are between <s> and </s>.

    All tokens of names and values are targets, but only a part of the others: the wording is drawn at random, so most
    of its loss cannot be reduced, and its gradient is noise for the facts.
    """
    rng, tokens, targets = random.Random(seed), list[int](), list[int]()
    for round_seed in itertools.count(seed * 1_000_003):
        for text in declarative_text(conditions, 1, round_seed, cut="\t"):
            ids = tokenizer.encode(text.replace("\t", ""))
            kept = [slot or rng.random() < P_WORDING for slot in find_slots(text, ids, tokenizer)]
            tokens += [*tokenizer.start, *ids, *tokenizer.eos_ids]
            targets += [IGNORE, *(i if keep else IGNORE for i, keep in zip(ids, kept, strict=True)), *tokenizer.eos_ids]
            while len(tokens) > length:
                yield Example(tokens[:length], targets[1 : length + 1])
                tokens, targets = tokens[length:], targets[length:]


def initialize(model: Model) -> None:
    """Draw matrices from a normal distribution with standard deviation 0.02, as GPT-2 does.

    The standard deviation of output projections is divided by the root of their number, because each adds to the
    residual stream: https://arxiv.org/abs/1909.08053, section 5.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
            depth = 2 * model.config.n_layers
            nn.init.normal_(parameter, std=0.02 / math.sqrt(depth) if is_output else 0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25000, help="optimizer steps of 2,048 tokens (default 25000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of text and initialization (default 0)")
    parser.add_argument("--bfloat16", action="store_true", help="autocast, faster on processors with bfloat16 products")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument("--out", default="data/base", help="directory to write (default data/base)")
    args = parser.parse_args()
    config = TrainConfig(steps=args.steps, batch_size=8, lr=3e-3, warmup=100, weight_decay=0.1, seed=args.seed)
    torch.manual_seed(args.seed)
    _, conditions = read_table()
    out, device = Path(args.out), choose_device(args.device)
    unfinished = out.with_name(out.name + ".unfinished")  # a tokenizer without its model is useless
    tokenizer = make_tokenizer(conditions, unfinished)
    model = Model(SHAPE)
    initialize(model)
    model.to(device)
    optimizer = make_optimizer(model, config)
    examples = make_blocks(conditions, tokenizer, 256, args.seed)
    start, n_tokens = time.perf_counter(), 0
    with tqdm(range(args.steps), desc="training the base") as progress:
        for step in progress:
            batch = collate(list(itertools.islice(examples, config.batch_size)))
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bfloat16):
                metrics = train_step(model, optimizer, None, [batch], step, config)
            n_tokens += metrics.n_tokens
            if step % 100 == 99:
                speed = n_tokens / (time.perf_counter() - start)
                progress.write(f"step {step + 1:6d}  loss {metrics.losses['loss']:.3f}  {speed:,.0f} tok/s")
    # Other readers of the directory expect bos and eos of the tokenizer in config.json.
    save_model(model, out, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_ids[0])
    (unfinished / "tokenizer.model").replace(out / "tokenizer.model")
    unfinished.rmdir()


if __name__ == "__main__":
    run(main)
