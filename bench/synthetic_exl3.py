#!/usr/bin/env python3
"""A model of a real shape with random EXL3 weights, for measuring where the real one is too large to fetch.

    synthetic_exl3.py CONFIG.json OUT BITS

Every matrix of a Llama-like decoder is random rings of mul1, BITS a weight, the head too; scales are random signs, so that
values stay of a size. Needs PyTorch, safetensors and an NVIDIA GPU, which draws the numbers.
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

MUL1 = torch.tensor(0x83DCD12D - (1 << 32), dtype=torch.int32)


def main():
    config, out, bits = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), int(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    hidden, inner, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    config["quantization_config"] = {"quant_method": "exl3", "bits": bits, "head_bits": bits, "codebook": "mul1"}
    (out / "config.json").write_text(json.dumps(config))
    random = torch.Generator(device="cuda")
    random.manual_seed(1)
    index = {}

    def integers(low, high, shape, dtype):
        return torch.randint(low, high, shape, generator=random, device="cuda", dtype=dtype).cpu()

    def matrix(tensors, key, k, n):
        tensors[f"{key}.trellis"] = integers(-32768, 32767, (k // 16, n // 16, 16 * bits), torch.int16)
        tensors[f"{key}.suh"] = (integers(0, 2, (k,), torch.int64) * 2 - 1).half() * k**-0.5
        tensors[f"{key}.svh"] = (integers(0, 2, (n,), torch.int64) * 2 - 1).half()
        tensors[f"{key}.mul1"] = MUL1.clone()

    def save(tensors, name):
        save_file(tensors, out / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    ends = {
        "model.embed_tokens.weight": torch.randn(vocab, hidden, generator=random, device="cuda").half().cpu(),
        "model.norm.weight": torch.ones(hidden).half(),
    }
    matrix(ends, "lm_head", hidden, vocab)
    save(ends, "model-00000.safetensors")
    for layer in range(config["num_hidden_layers"]):
        tensors, key = {}, f"model.layers.{layer}"
        for name, k, n in [
            ("self_attn.q_proj", hidden, heads * head_dim),
            ("self_attn.k_proj", hidden, kv_heads * head_dim),
            ("self_attn.v_proj", hidden, kv_heads * head_dim),
            ("self_attn.o_proj", heads * head_dim, hidden),
            ("mlp.gate_proj", hidden, inner),
            ("mlp.up_proj", hidden, inner),
            ("mlp.down_proj", inner, hidden),
        ]:
            matrix(tensors, f"{key}.{name}", k, n)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{key}.{norm}.weight"] = torch.ones(hidden).half()
        save(tensors, f"model-{layer + 1:05}.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


if __name__ == "__main__":
    main()
