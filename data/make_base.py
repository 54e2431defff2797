"""Makes `data/base/`: a tokenizer and a small bilingual model that has read statements and no question.

    python -m data.make_base

Uses the package's own model and the optimizer step of `train.py`, with all weights trainable.
"""

import argparse
import io
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
from torch import nn
from tqdm import tqdm

from data.make_data import declarative_text, read_table
from minidoctor.batching import Example, collate
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
    vocab_size=3200,
    dim=256,
    n_layers=4,
    n_heads=4,
    n_kv_heads=4,
    head_dim=64,
    ffn_dim=640,
    max_seq_len=512,
)
ROUNDS_FOR_THE_TOKENIZER = 20


def make_tokenizer(conditions: list[dict], out: Path) -> Tokenizer:
    """BPE with byte fallback; the chat markers are control pieces of it.

    Trained on the same text, but for the capital of a sentence that begins with a name or a value.
    """
    # Cut where names and values begin, so that no piece holds the end of a name and what follows it: Chinese
    # has no spaces to part them, and a name would be spelled differently in every sentence.
    text = declarative_text(conditions, ROUNDS_FOR_THE_TOKENIZER, seed=0, cut="\t")
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
        normalization_rule_name="identity",  # what is encoded is what decodes,
        remove_extra_whitespaces=False,  # spaces too
        split_digits=True,
        num_threads=1,  # the same model on every machine
        minloglevel=2,
    )
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "tokenizer.model", model.getvalue())
    return load_tokenizer(out)


def blocks(conditions: list[dict], tokenizer: Tokenizer, length: int, seed: int) -> Iterator[Example]:
    """The text as one endless row of tokens, each paragraph between <s> and </s>, cut into equal blocks."""
    tokens: list[int] = []
    for round_seed in itertools.count(seed * 1_000_003):
        for paragraph in declarative_text(conditions, 1, round_seed):
            tokens += [*tokenizer.start, *tokenizer.encode(paragraph), *tokenizer.eos_ids]
            while len(tokens) > length:
                yield Example(tokens[:length], tokens[1 : length + 1])
                tokens = tokens[length:]


def initialize(model: Model) -> None:
    """Normal with standard deviation 0.02; what writes into the residual stream less, for each layer adds to it.

    https://arxiv.org/abs/1909.08053, section 5 (the scheme of GPT-2).
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            depth = 2 * model.config.n_layers
            nn.init.normal_(parameter, std=0.02 / math.sqrt(depth) if writes else 0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="of 2,048 tokens (default 4000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="data/base")
    given = parser.parse_args()
    config = TrainConfig(steps=given.steps, batch_size=16, lr=3e-3, warmup=100, weight_decay=0.1, seed=given.seed)
    torch.manual_seed(given.seed)
    _, conditions = read_table()
    out, device = Path(given.out), choose_device(given.device)
    unfinished = out.with_name(out.name + ".unfinished")  # the tokenizer and the model of two runs would not fit
    tokenizer = make_tokenizer(conditions, unfinished)
    model = Model(SHAPE)
    initialize(model)
    model.to(device)
    optimizer = make_optimizer(model, config)
    examples = blocks(conditions, tokenizer, 128, given.seed)
    start, n_tokens = time.perf_counter(), 0
    with tqdm(range(given.steps), desc="training the base") as progress:
        for step in progress:
            batch = collate(list(itertools.islice(examples, config.batch_size)))
            figures = train_step(model, optimizer, None, [batch], step, config)
            n_tokens += figures.n_tokens
            if step % 100 == 99:
                speed = n_tokens / (time.perf_counter() - start)
                progress.write(f"step {step + 1:6d}  loss {figures.losses['loss']:.3f}  {speed:,.0f} tok/s")
    # bos and eos as the tokenizer has them, for other readers of the directory.
    save_model(model, out, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_ids[0])
    (unfinished / "tokenizer.model").replace(out / "tokenizer.model")
    unfinished.rmdir()


if __name__ == "__main__":
    run(main)
