#!/usr/bin/env python3
"""How fast `marlin quantize` is on a device: a model of Llama 3.1 8B's shape with random bf16 weights and few layers is quantized, and the time of all 32 follows.

    quantize_speed.py MARLIN [--device cuda] [--bits 3] [--layers 2] [--vocab 128256] [--tokens 131072] [--work DIR] [-- OPTION ...]

What a layer takes does not depend on the others; the head is quantized alone after them. Options after `--` go to `marlin quantize`. Needs PyTorch and
safetensors, and a GPU only to draw the weights faster. Prints JSON.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4096, 14336, 32, 8, 128, 32
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def config(layers, vocab):
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocab_size": vocab, "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16"}


def tokenizer():
    """One token a byte, as byte-level tokenizers write bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    letters = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "vocab": {letters[b]: b for b in range(256)}, "merges": []}}


def write(folder, layers, vocab):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator(device=device)
    random.manual_seed(1)

    def matrix(n, k):
        return (torch.randn(n, k, generator=random, device=device, dtype=torch.bfloat16) * k**-0.5).cpu()

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(layers, vocab)))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    parts = [{"model.embed_tokens.weight": matrix(vocab, HIDDEN) * HIDDEN**0.5, "lm_head.weight": matrix(vocab, HIDDEN),
              "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}]
    for layer in range(layers):
        key = f"model.layers.{layer}"
        norms = ("input_layernorm", "post_attention_layernorm")
        parts.append({f"{key}.{name}.weight": matrix(n, k) for name, (n, k) in SHAPES.items()}
                     | {f"{key}.{name}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16) for name in norms})
    index = {}
    for i, part in enumerate(parts):
        save_file(part, folder / f"model-{i:05}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(part, f"model-{i:05}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("marlin")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--bits", default="3")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--tokens", default="131072")
    parser.add_argument("--work", type=Path)
    parser.add_argument("options", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        source = Path(work) / "source"
        write(source, args.layers, args.vocab)
        command = [args.marlin, "quantize", str(source), "-o", str(Path(work) / "made"), "--bits", args.bits, "--device", args.device,
                   "--calibration-tokens", args.tokens, "--json", *args.options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"marlin quantize: exit status {done.returncode}")
        report = json.loads(done.stdout)
    tensors = report["tensors"]
    weights = {head: sum(t["shape"][0] * t["shape"][1] for t in tensors if ("lm_head" in t["key"]) == head) for head in (False, True)}
    clock = report["clock"]
    head = next((t["seconds"] for t in tensors if "lm_head" in t["key"]), 0.0)
    of_layers = clock["moments"] + clock["matrices"] + clock["advance"] - head
    whole = LAYERS * of_layers / args.layers + head + clock["writing"] * LAYERS / args.layers
    all_weights = LAYERS * weights[False] / args.layers + weights[True]
    print(json.dumps({
        "encoder": report["encoder"], "bits": float(args.bits), "layers": args.layers, "calibration_tokens": int(args.tokens), "seconds": report["seconds"],
        "clock": clock, "phases": report["phases"], "encoder_seconds": report["encoder_seconds"],
        "layer_seconds": of_layers / args.layers, "layer_weights": weights[False] // args.layers,
        "layers_weights_per_second": weights[False] / of_layers, "head_seconds": head, "head_weights": weights[True],
        "all_layers_seconds": whole, "all_layers_weights_per_second": all_weights / whole,
        "matrices": {t["key"]: {k: t[k] for k in ("seconds", "encoder_seconds", "phases", "proxy_error")} for t in tensors},
    }, indent=1))


if __name__ == "__main__":
    main()
