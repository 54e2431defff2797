"""minidoctor: SparseDoctor (https://arxiv.org/abs/2509.14269), a contrastive mixture of LoRA experts, in pure PyTorch.

    from minidoctor import load, generate, SampleConfig

The method is in the files of this directory. Read them in this order; each imports only files above it and ops/:
config, lora, router, kv_cache, model, expert_queue, losses, batching, step, generate. The subpackages contain
the rest (loading, data, training runs, evaluation, pictures, benchmarks, the ablation); each has a README.md.

Shapes in comments and docstrings use these letters:

    B  sequences in a batch       D  model dim            E  experts of a sublayer
    T  tokens in a sequence       H  query heads          K  experts per token
    N  tokens, flattened          G  key/value heads      R  rank of one expert
    S  positions in the cache     C  head dim             Z  routing dim
    L  sublayers with experts     F  feed-forward dim     Q  slots of the queue per expert
    V  vocabulary                 J  groups of experts      n  positions of answer tokens, or anchors among them

Expert e of a sublayer is one pair (A_e, B_e) in each adapted linear layer of that sublayer, under one gate. A sublayer
is the attention or the feed-forward part of a block.
"""

from minidoctor.checkpoints.adapters import load
from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.config import AdapterConfig, ModelConfig, SampleConfig, TrainConfig, UserError
from minidoctor.generate import complete, generate
from minidoctor.model import Model
from minidoctor.text.tokenizer import load_tokenizer

__all__ = [
    "AdapterConfig",
    "Model",
    "ModelConfig",
    "SampleConfig",
    "TrainConfig",
    "UserError",
    "complete",
    "generate",
    "load",
    "load_model",
    "load_tokenizer",
]
