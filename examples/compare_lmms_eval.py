"""
Compares two runs of lmms-eval over the same tasks, question by question.

    python compare_lmms_eval.py results/uncompressed results/farthest-points-r15

Both folders are `--output_path`s of runs with `--log_samples`. Told for each task: accuracy of both, how many
questions only one has right, McNemar's exact test, and whether the second run shows that anything ran at all: a
compression whose answers are all those of the first run letter by letter did not.
"""

import argparse
import json
from pathlib import Path

from holitom_hf.evaluation.statistics import mcnemar_probability


def score_of(sample: dict) -> float | None:
    """
    A sample's score: that of its first metric which has one under "score", as mvbench's and videomme's do, or else its
    first metric that is a number, as exact matches are.
    """
    metrics = [value for name, value in sample.items() if name != "doc_id"]
    for value in [*(value.get("score") for value in metrics if isinstance(value, dict)), *metrics]:
        if isinstance(value, (int, float)):
            return float(value)
    return None


def read(folder: Path) -> dict[str, dict]:
    """Task -> question -> (score, answer), of the newest samples of each task below a folder."""
    tasks = {}
    for file in sorted(folder.rglob("*_samples_*.jsonl")):
        task = file.stem.split("_samples_")[1]
        samples = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        tasks[task] = {sample["doc_id"]: (score_of(sample), str(sample["filtered_resps"])) for sample in samples}
    return tasks


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("first", type=Path, help="folder of the uncompressed run")
    parser.add_argument("second", type=Path, help="folder of the run to compare with it")
    folders = parser.parse_args()
    first, second = read(folders.first), read(folders.second)
    if not set(first) & set(second):
        raise SystemExit("no task has samples in both folders: run lmms-eval with --log_samples and --output_path")
    for task in sorted(set(first) & set(second)):
        pairs = [(first[task][doc], second[task][doc]) for doc in first[task] if doc in second[task]]
        if all(a[1] == b[1] for a, b in pairs):
            print(f"{task}: all {len(pairs)} answers are the same: the second run is not compressed, or not running")
            continue
        scored = [(a[0] == 1, b[0] == 1) for a, b in pairs if a[0] in (0, 1) and b[0] in (0, 1)]
        if not scored:
            print(f"{task}: no scores of 0 and 1 in the samples; see lmms-eval's own results")
            continue
        won, lost = scored.count((False, True)), scored.count((True, False))
        probability = mcnemar_probability(won, lost)
        shares = [sum(right[i] for right in scored) / len(scored) for i in (0, 1)]
        verdict = "a difference" if probability < 0.05 else "no difference"
        counts = f"{shares[0]:.1%} -> {shares[1]:.1%} of {len(scored)}; +{won} -{lost}"
        print(f"{task}: {counts}, p = {probability:.2g}: {verdict}")
