#!/usr/bin/env bash
# The paper's four benchmarks with lmms-eval: 32 uniform frames, the authors' conversation, greedy decoding. Needs GPUs,
# the benchmarks' videos (lmms-eval downloads them, several 100 GB) and the 7B weights.
#
#   pip install lmms-eval && pip install .     # in this order: see the README
#   examples/lmms_eval.sh [PRESET] [NUMBER OF GPUS] [TASKS]
set -euo pipefail
preset=${1:-llava-onevision-7b-r15}
gpus=${2:-1}
tasks=${3:-mvbench,egoschema,longvideobench_val_v,videomme}
launch=(python)
if [ "$gpus" -gt 1 ]; then
    launch=(accelerate launch --multi_gpu --num_processes "$gpus")
fi
"${launch[@]}" -m lmms_eval --model holitom \
    --model_args "pretrained=llava-hf/llava-onevision-qwen2-7b-ov-hf,preset=$preset" \
    --tasks "$tasks" \
    --batch_size 1 --log_samples --output_path "results/$preset"
