#!/usr/bin/env python3
"""Perplexity of the test models computed in f32 by transformers from their dequantized GGUF weights.

    pip install torch==2.15.0 transformers==5.23.0 gguf==0.19.0 llama-cpp-python==0.3.36 accelerate==1.15.0 diskcache
    python bench/reference_perplexity.py --models DIR --text wiki.test.raw -o docs/measurements/perplexity_reference.json

This is what `marlin eval perplexity --window 512 --score-from 256 --windows 20` must reproduce: tokens of the whole
file without special tokens (llama.cpp's tokenizer), cut into consecutive windows; in each, positions 256 ... 511 are
scored given all before them in the window.

Every tensor that transformers loaded is compared with the `gguf` package's own dequantization first, so that the
figure is known to belong to the file's weights.
"""

import argparse
import hashlib
import json
import math
import pathlib
import platform
import time

import gguf
import llama_cpp
import numpy as np
import torch
import transformers

MODELS = ["smollm2-135m-q4_1", "qwen2.5-coder-0.5b-q4_k_m", "gemma3-270m-q4_k_m"]
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}
# Gemma 3 norms around both halves of a layer.
GEMMA_NAMES = NAMES | {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hub_name(name, architecture):
    stem, kind = name.rsplit(".", 1)
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{(GEMMA_NAMES if architecture == 'gemma3' else NAMES)[part]}.{kind}"


def unpermute(w, heads):
    """Llama's GGUF rows alternate the two halves that rotate together; transformers keeps them apart."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def weight_difference(model, reader, architecture):
    """Largest absolute difference of any tensor between the loaded model and the file."""
    state, seen, worst = model.state_dict(), set(), 0.0
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape([int(d) for d in reversed(tensor.shape)])
        name = hub_name(tensor.name, architecture)
        if architecture == "llama" and ("attn_q." in tensor.name or "attn_k." in tensor.name):
            values = unpermute(values, model.config.num_attention_heads if "attn_q." in tensor.name else model.config.num_key_value_heads)
        if architecture == "gemma3" and "norm" in tensor.name:
            values = values - np.float32(1)
        worst = max(worst, float(np.abs(state[name].numpy() - values).max()))
        seen.add(name)
    missing = set(state) - seen - {"lm_head.weight"}
    if missing:
        raise SystemExit(f"tensors that the file does not give: {sorted(missing)[:5]}")
    return worst


def negative_log_likelihoods(model, ids, window, score_from, windows):
    """Summed over the scored positions of each window, natural logarithm."""
    sums = []
    for i in range(windows):
        chunk = torch.tensor(ids[i * window : (i + 1) * window])[None]
        with torch.no_grad():
            logits = model(chunk, use_cache=False).logits[0, score_from - 1 : window - 1].double()
        picked = logits.log_softmax(-1).gather(1, chunk[0, score_from:, None])
        sums.append(-picked.sum().item())
    return sums


def measure(path, text, args):
    tokenizer = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    ids = tokenizer.tokenize(text, add_bos=False, special=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32, attn_implementation="eager").eval()
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    difference = weight_difference(model, reader, architecture)
    start = time.time()
    sums = negative_log_likelihoods(model, ids, args.window, args.score_from, args.windows)
    scored = args.windows * (args.window - args.score_from)
    nll = sum(sums) / scored
    return dict(
        model=path.name, model_sha256=hashlib.sha256(path.read_bytes()).hexdigest(), perplexity=math.exp(nll), nll=nll,
        tokens_in_file=len(ids), first_ids=ids[:16], tokens_scored=scored, windows=args.windows, window=args.window,
        score_from=args.score_from, window_nll=[round(s / (args.window - args.score_from), 6) for s in sums],
        largest_weight_difference=difference, rope=model.config.rope_parameters, seconds=round(time.time() - start, 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=pathlib.Path, required=True)
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--score-from", type=int, default=256)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("-o", "--output", type=pathlib.Path, required=True)
    parser.add_argument("names", nargs="*", default=MODELS)
    args = parser.parse_args()
    text = args.text.read_bytes()
    report = dict(
        command=f"python bench/reference_perplexity.py --models DIR --text {args.text.name} --window {args.window}"
        f" --score-from {args.score_from} --windows {args.windows}",
        text=args.text.name, text_sha256=hashlib.sha256(text).hexdigest(),
        versions=dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__,
                      llama_cpp_python=llama_cpp.__version__), results=[])
    for name in args.names:
        result = measure(args.models / f"{name}.gguf", text, args)
        print(f"{name}: perplexity {result['perplexity']:.4f}, weights differ by {result['largest_weight_difference']:.1e}")
        report["results"].append(result)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
