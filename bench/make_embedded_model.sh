#!/usr/bin/env bash
# Makes the model inside the binary from its bf16 directory, by our own quantizer:
#
#     bench/make_embedded_model.sh GLM_STORIES CALIBRATION.txt [BITS]
#
# GLM_STORIES is the Hugging Face directory of the trained model, CALIBRATION.txt text sampled like its training text.
# Resumes when interrupted. The binary `marlin` must be on PATH; it is built without the embedded model by
# `cargo build --release -p marlin-cli --no-default-features --features hub`.
set -euo pipefail

model=$1 text=$2 bits=${3:-3.15}
assets="$(cd "$(dirname "$0")/.." && pwd)/crates/cli/assets/glm-stories"
work="${TMPDIR:-/tmp}/glm-stories-exl3-$bits"

if [ ! -e "$work/config.json" ]; then
    marlin quantize "$model" -o "$work" --bits "$bits" --head-bits 6 --measure --calibration "$text"
fi
for file in config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja model.safetensors; do
    cp "$work/$file" "$assets/$file"
done
# It was trained on sequences of 512 tokens, goes in circles unless repetition costs something, and may begin another turn by itself.
python3 - "$assets/generation_config.json" <<'EOF'
import json, sys
fields = json.load(open(sys.argv[1])) | {"eos_token_id": [2, 0, 1], "max_new_tokens": 512, "repetition_penalty": 1.1}
open(sys.argv[1], "w").write(json.dumps(fields, indent=2) + "\n")
EOF
ls -l "$assets"
