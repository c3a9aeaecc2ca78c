#!/usr/bin/env python3
"""A model of a real shape with random EXL3 weights, for measuring where the real one is too large to fetch.

    synthetic_exl3.py CONFIG.json OUT BITS [LAYERS]

Every matrix of a decoder like Llama's, Qwen3's with experts or GLM-4.7-Flash is random rings of mul1, BITS a weight, the head too; scales are random
signs, so that values stay of a size. Routers and the matrices of absorbed latent attention are halves, as exllamav3 leaves them. Needs PyTorch,
safetensors and an NVIDIA GPU, which draws the numbers.
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

MUL1 = torch.tensor(0x83DCD12D - (1 << 32), dtype=torch.int32)


def mixer(config, hidden):
    """Trellis-coded matrices, halves and norms of an attention, by name."""
    heads = config["num_attention_heads"]
    if rank := config.get("kv_lora_rank"):
        query, nope, rope, value = (config[k] for k in ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        matrices = [("q_a_proj", hidden, query), ("q_b_proj", query, heads * (nope + rope)), ("kv_a_proj_with_mqa", hidden, rank + rope), ("o_proj", heads * value, hidden)]
        return matrices, [("kv_b_proj", rank, heads * (nope + value))], [("q_a_layernorm", query), ("kv_a_layernorm", rank)]
    head_dim = config.get("head_dim") or hidden // heads
    wide, narrow = heads * head_dim, config["num_key_value_heads"] * head_dim
    norms = [("q_norm", head_dim), ("k_norm", head_dim)] if config["model_type"].startswith("qwen3") else []
    return [("q_proj", hidden, wide), ("k_proj", hidden, narrow), ("v_proj", hidden, narrow), ("o_proj", wide, hidden)], [], norms


def gated(prefix, hidden, inner):
    return [(f"{prefix}gate_proj", hidden, inner), (f"{prefix}up_proj", hidden, inner), (f"{prefix}down_proj", inner, hidden)]


def main():
    config, out, bits = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), int(sys.argv[3])
    if len(sys.argv) > 4:
        config["num_hidden_layers"] = int(sys.argv[4])
    out.mkdir(parents=True, exist_ok=True)
    hidden, inner, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    experts = config.get("n_routed_experts") or config.get("num_experts") or 0
    config["quantization_config"] = {"quant_method": "exl3", "bits": bits, "head_bits": bits, "codebook": "mul1"}
    (out / "config.json").write_text(json.dumps(config))
    random = torch.Generator(device="cuda")
    random.manual_seed(1)
    index = {}

    def integers(low, high, shape, dtype):
        return torch.randint(low, high, shape, generator=random, device="cuda", dtype=dtype).cpu()

    def normal(*shape):
        return torch.randn(*shape, generator=random, device="cuda")

    def matrices(tensors, named):
        """All of one shape are drawn at once; both sizes are multiples of 128 in the format."""
        named = [(key, -(-k // 128) * 128, -(-n // 128) * 128) for key, k, n in named]
        for k, n in dict.fromkeys((k, n) for _, k, n in named):
            keys = [key for key, *shape in named if shape == [k, n]]
            trellis = integers(-32768, 32767, (len(keys), k // 16, n // 16, 16 * bits), torch.int16)
            suh = (integers(0, 2, (len(keys), k), torch.int64) * 2 - 1).half() * k**-0.5
            svh = (integers(0, 2, (len(keys), n), torch.int64) * 2 - 1).half()
            for i, key in enumerate(keys):
                tensors |= {f"{key}.trellis": trellis[i].clone(), f"{key}.suh": suh[i].clone(), f"{key}.svh": svh[i].clone(), f"{key}.mul1": MUL1.clone()}

    def save(tensors, name):
        save_file(tensors, out / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    ends = {"model.embed_tokens.weight": normal(vocab, hidden).half().cpu(), "model.norm.weight": torch.ones(hidden).half()}
    matrices(ends, [("lm_head", hidden, vocab)])
    save(ends, "model-00000.safetensors")
    for layer in range(config["num_hidden_layers"]):
        tensors, key = {}, f"model.layers.{layer}"
        coded, plain, norms = mixer(config, hidden)
        named = [(f"{key}.self_attn.{name}", k, n) for name, k, n in coded]
        tensors |= {f"{key}.self_attn.{name}.weight": (normal(n, k) * k**-0.5).half().cpu() for name, k, n in plain}
        norms = [(f"self_attn.{name}", width) for name, width in norms] + [("input_layernorm", hidden), ("post_attention_layernorm", hidden)]
        tensors |= {f"{key}.{name}.weight": torch.ones(width).half() for name, width in norms}
        if experts and layer >= config.get("first_k_dense_replace", 0):
            width = config["moe_intermediate_size"]
            for e in range(experts):
                named += gated(f"{key}.mlp.experts.{e}.", hidden, width)
            if shared := config.get("n_shared_experts"):
                named += gated(f"{key}.mlp.shared_experts.", hidden, shared * width)
                tensors[f"{key}.mlp.gate.e_score_correction_bias"] = normal(experts).cpu() * 0.01
            tensors[f"{key}.mlp.gate.weight"] = (normal(experts, hidden) * hidden**-0.5).half().cpu()
        else:
            named += gated(f"{key}.mlp.", hidden, inner)
        matrices(tensors, named)
        save(tensors, f"model-{layer + 1:05}.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


if __name__ == "__main__":
    main()
