"""Makes tests/fixtures: a tiny random checkpoint and what `transformers` computes for it.

    pip install transformers && python tests/make_fixtures.py

Not needed to run the tests: its results are stored.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

OUT = Path(__file__).parent / "fixtures"


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        initializer_range=0.3,  # large, so that a wrong order of operations shows in the logits
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.3)
    directory = OUT / "llama"
    directory.mkdir(parents=True, exist_ok=True)
    tokens = torch.randint(0, 50, (2, 12))
    with torch.no_grad():
        logits = model(tokens).logits
        greedy = model.generate(tokens[:1], max_new_tokens=20, do_sample=False, eos_token_id=None)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    save_file({"tokens": tokens, "logits": logits, "greedy": greedy}, directory / "expected.safetensors")
    settings = {"model_type": "llama", "head_dim": 8, "hidden_act": "silu", "rope_theta": 10000.0}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        settings[key] = getattr(config, key)
    for key in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        settings[key] = getattr(config, key)
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "names.json").write_text(json.dumps(sorted(state), indent=2) + "\n")


if __name__ == "__main__":
    main()
