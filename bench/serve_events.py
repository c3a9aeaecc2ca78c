#!/usr/bin/env python3
"""How many events per second `marlin serve` streams when the model costs next to nothing.

    python bench/serve_events.py [--marlin MARLIN] [--streams 64] [--requests 512] [--max-tokens 256] [--rounds 5]

Makes a Llama of 260 thousand random parameters (seed 0: the same bytes everywhere) whose tokens are all plain text, serves it, and runs
`marlin bench serve` against it, which checks that every stream is whole and in order. Server and load share this machine. Prints the median
of the rounds or, with --json, everything. Standard library only.
"""

import argparse
import array
import json
import pathlib
import random
import shlex
import statistics
import string
import subprocess
import tempfile

from serve_vs_llama_server import READY, Server, free_port

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, INNER = 512, 64, 5, 4, 2, 172
END = "<|end|>"


def tokens():
    """Printable ASCII, then pairs of letters, then the end."""
    single = [chr(c) for c in range(33, 127)]
    pairs = [a + b for a in string.ascii_lowercase for b in string.ascii_lowercase]
    # U+0120 is how byte-level vocabularies write a space.
    vocabulary = ["\u0120", *single, *pairs][: VOCAB - 1]
    merges = [" ".join(token) for token in vocabulary if len(token) == 2]
    return [*vocabulary, END], merges


def checkpoint(folder):
    """Writes the model; returns its number of parameters."""
    vocabulary, merges = tokens()
    end = len(vocabulary) - 1
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, intermediate_size=INNER, max_position_embeddings=4096, rms_norm_eps=1e-5,
        rope_theta=10000.0, tie_word_embeddings=True, hidden_act="silu", torch_dtype="float32", eos_token_id=end)
    tokenizer = dict(
        version="1.0", truncation=None, padding=None, normalizer=None, post_processor=None,
        added_tokens=[dict(id=end, content=END, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)],
        pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True),
        decoder=dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=True),
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None, fuse_unk=False,
                   byte_fallback=False, vocab={token: id for id, token in enumerate(vocabulary)}, merges=merges))
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    files = {
        "config.json": config, "tokenizer.json": tokenizer,
        "tokenizer_config.json": dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=END, chat_template=template)}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))

    head = HIDDEN // HEADS
    shapes = {"model.embed_tokens.weight": [VOCAB, HIDDEN], "model.norm.weight": [HIDDEN]}
    for layer in range(LAYERS):
        for name, shape in {
            "input_layernorm": [HIDDEN], "post_attention_layernorm": [HIDDEN], "self_attn.q_proj": [HIDDEN, HIDDEN],
            "self_attn.k_proj": [KV_HEADS * head, HIDDEN], "self_attn.v_proj": [KV_HEADS * head, HIDDEN], "self_attn.o_proj": [HIDDEN, HIDDEN],
            "mlp.gate_proj": [INNER, HIDDEN], "mlp.up_proj": [INNER, HIDDEN], "mlp.down_proj": [HIDDEN, INNER],
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    source, header, data = random.Random(0), {}, bytearray()
    for name, shape in shapes.items():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        values = [1.0] * count if len(shape) == 1 else [source.gauss(0, shape[1] ** -0.5) for _ in range(count)]
        start = len(data)
        data += array.array("f", values).tobytes()
        header[name] = dict(dtype="F32", shape=shape, data_offsets=[start, len(data)])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return len(data) // 4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--marlin", default="marlin")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--prompt-words", type=int, default=8, help="about five tokens each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--least", type=float, help="exit with 1 if the median is below this")
    parser.add_argument("--serve-args", type=shlex.split, default=["--threads", "1"], metavar="OPTIONS",
                        help="more options of marlin serve (default: --threads 1, which leaves the other cores to the streams)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        parameters = checkpoint(folder)
        port = free_port()
        command = [args.marlin, "serve", "-m", name, "--port", port, "--parallel", args.streams, *args.serve_args]
        server = Server(command, port, READY["marlin"], folder / "log")
        try:
            rounds = []
            for _ in range(args.rounds):
                load = [args.marlin, "bench", "serve", server.base, "--concurrency", args.streams, "--requests", args.requests,
                        "--max-tokens", args.max_tokens, "--prompt-words", args.prompt_words, "--json"]
                done = subprocess.run(list(map(str, load)), capture_output=True, text=True)
                if done.returncode != 0:
                    raise SystemExit(done.stdout + done.stderr)
                rounds.append(json.loads(done.stdout))
        finally:
            server.stop()
    if args.json:
        print(json.dumps(dict(parameters=parameters, rounds=rounds)))
        return
    rates = [each["events_per_second"] for each in rounds]
    median = statistics.median(rates)
    print(f"{parameters} parameters, {args.streams} streams: {median:.0f} events/s (least {min(rates):.0f}, most {max(rates):.0f})")
    if args.least and median < args.least:
        raise SystemExit(f"below {args.least:.0f}")


if __name__ == "__main__":
    main()
