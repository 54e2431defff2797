"""Baichuan-13B by its published definition, written plainly: one sequence, no cache, one head and bias at a time.

It is a Llama whose q, k and v are the rows of one matrix. Instead of rotary positions it has ALiBi
(https://arxiv.org/abs/2108.12409, section 3): head h adds -slope_h * (i - j) to the score of query i and key j. In the
second version each row of the output layer is divided by its length.
"""

import math

import torch


def slopes(n_heads):
    """Return 2^(-8/n), 2^(-16/n), ... for n heads. Where n is not a power of two, it takes every second slope of 2n."""
    n = 2 ** math.floor(math.log2(n_heads))
    powers = [2 ** (-8 * (h + 1) / n) for h in range(n)]
    return powers if n == n_heads else powers + slopes(2 * n)[0::2][: n_heads - n]


def rms_norm(x, weight, eps):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def attention(x, packed, n_heads):
    """(T, D) -> (T, D), before the output projection."""
    q, k, v = (x @ packed.T).chunk(3, dim=-1)
    dim, heads = x.shape[1] // n_heads, []
    for h, slope in enumerate(slopes(n_heads)):
        rows, out = slice(h * dim, (h + 1) * dim), []
        for i in range(len(x)):
            bias = torch.tensor([-slope * (i - j) for j in range(i + 1)])
            scores = k[: i + 1, rows] @ q[i, rows] / math.sqrt(dim) + bias
            out.append(scores.softmax(0) @ v[: i + 1, rows])
        heads.append(torch.stack(out))
    return torch.cat(heads, dim=-1)


def plain_logits(tensors, settings, tokens):
    """Return the logits (T, V) of tokens (T,) in float32, with the tensors and the config.json of a checkpoint."""
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    eps, x = settings["rms_norm_eps"], tensors["model.embed_tokens.weight"][tokens]
    for i in range(settings["num_hidden_layers"]):
        layer = {name: tensors[f"model.layers.{i}.{name}.weight"] for name in LAYER}
        normed = rms_norm(x, layer["input_layernorm"], eps)
        attended = attention(normed, layer["self_attn.W_pack"], settings["num_attention_heads"])
        x = x + attended @ layer["self_attn.o_proj"].T
        normed = rms_norm(x, layer["post_attention_layernorm"], eps)
        gate, up = normed @ layer["mlp.gate_proj"].T, normed @ layer["mlp.up_proj"].T
        x = x + (gate * gate.sigmoid() * up) @ layer["mlp.down_proj"].T
    head = tensors["lm_head.weight"]
    if "z_loss_weight" in settings:  # the second version
        head = head / head.square().sum(1, keepdim=True).sqrt()
    return rms_norm(x, tensors["model.norm.weight"], eps) @ head.T


LAYER = ["input_layernorm", "post_attention_layernorm", "self_attn.W_pack", "self_attn.o_proj"]
LAYER += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def plain_greedy(tensors, settings, tokens, n):
    """Return the n most probable next tokens, one after another."""
    for _ in range(n):
        tokens = torch.cat([tokens, plain_logits(tensors, settings, tokens)[-1:].argmax(-1)])
    return tokens[-n:]
