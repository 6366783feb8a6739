#!/usr/bin/env bash
# Many videos at once: draws a set of questions, answers all of them, and counts the right ones. Stop it whenever you
# like and start it again: it goes on. With GPUs, or on several machines, put `accelerate launch` in front:
#
#   accelerate launch --multi_gpu --num_processes 8 -m holitom_hf batch INPUTS OUTPUT.jsonl --model ...
#
#   examples/batch.sh [FOLDER] [NUMBER OF QUESTIONS]
set -euo pipefail
folder=${1:-my-batch}
number=${2:-50}
mkdir -p "$folder"
test -f "$folder/questions/questions.jsonl" || holitom-hf questions "$folder/questions" --num-questions "$number"
holitom-hf batch "$folder/questions/questions.jsonl" "$folder/answers.jsonl" --batch-size 8
python - "$folder" <<'PYTHON'
import json, sys
from pathlib import Path

folder = Path(sys.argv[1])
truth = {q["id"]: q["answer"] for q in map(json.loads, (folder / "questions/questions.jsonl").open())}
answers = list(map(json.loads, (folder / "answers.jsonl").open()))
print(sum(a.get("answer") == truth[a["id"]] for a in answers), "of", len(answers), "answers are right")
PYTHON
