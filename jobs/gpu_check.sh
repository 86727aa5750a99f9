#!/bin/bash
# Every proof that needs a GPU, in one run on a machine that has one:
#
#   jobs/gpu_check.sh [OUT]            # figures and logs into OUT, by default gpu-check/
#
# PYTHON names the interpreter (default python3). It needs torch with CUDA, triton and pytest; what else is missing costs only the parts
# that need it, which are named at the end. Wheels in the folder wheels/ are installed first.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
out=${1:-${OUT:-gpu-check}}
python=${PYTHON:-python3}
mkdir -p "$out"
if [[ -d wheels ]]; then "$python" -m pip install -q --no-index --no-deps wheels/*.whl; fi
"$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"' || exit 2
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.csv"

failed=()
part() { # NAME COMMAND...
    local name=$1
    shift
    echo "[$name] $*"
    if "$@" >"$out/$name.log" 2>&1; then tail -n 25 "$out/$name.log"; else
        failed+=("$name")
        tail -n 8 "$out/$name.log"
    fi
}
part kernels "$python" -m pytest -p no:cacheprovider --noconftest tests/test_gpu.py
part head_1m "$python" -m harness.bench.head --num-classes 1000000 --embedding-dim 512 --ranks 1 --batch 1024 --pairs 9 --json "$out/head_1m.json"
part head_10m "$python" -m harness.bench.head --num-classes 10000000 --embedding-dim 512 --ranks 1 --batch 1024 --pairs 5 --json "$out/head_10m.json"
part towers_vision "$python" -m harness.bench.towers --model vit_b16,vit_l14 --batch 256 --dtype bf16 --json "$out/towers_vision.json"
part towers_text "$python" -m harness.bench.towers --model bert_base --batch 256 --tokens 128 --dtype bf16 --json "$out/towers_text.json"
if ((${#failed[@]})); then
    echo "failed, or what they need is missing: ${failed[*]} (logs in $out)"
    exit 1
fi
echo "all parts passed; figures in $out"
