"""
Ranks the methods of the field on a real checkpoint by tasks of lmms-eval.

    pip install lmms-eval "filelock<4" && pip install .     # in this order
    python rank_methods.py llava-hf/llava-onevision-qwen2-7b-ov-hf --tasks mvbench videomme --retention-ratios 0.15

Every run of lmms-eval has a folder in --out, and is not repeated when this is started again. The table at the end has
the accuracy of each run in each task, their mean, and over all questions those that only this run (+) or only the
uncompressed model (-) has right, with McNemar's exact test. Needs GPUs, the tasks' videos (lmms-eval downloads them,
several 100 GB) and the weights. Arguments behind `--` go to lmms-eval as they are.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from compare_lmms_eval import read

from holitom_hf import HoliTomConfig
from holitom_hf.evaluation.methods import Run, method_runs
from holitom_hf.evaluation.statistics import mcnemar_probability


def run_task(checkpoint: str, run: Run, tasks: list[str], folder: Path, num_gpus: int, options: list[str]) -> None:
    """lmms-eval with a run's settings, its samples into a folder; raises an error if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "holitom_config.json"
    settings.write_text(json.dumps(run.settings.to_dict(), indent=1) + "\n")
    launch = [sys.executable, "-m"]
    if num_gpus > 1:
        launch += ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(num_gpus), "-m"]
    command = [*launch, "lmms_eval", "--model", "holitom", "--tasks", ",".join(tasks), "--batch_size", "1"]
    command += ["--model_args", f"pretrained={checkpoint},preset={settings.resolve()}"]
    subprocess.run([*command, "--log_samples", "--output_path", str(folder), *options], check=True)
    (folder / "done").touch()


def ranking(runs: list[Run], out: Path) -> str:
    """A table of Markdown, the best first."""
    samples = {run.name: read(out / run.name) for run in runs}
    tasks = sorted(samples["full"])
    rows = []
    for run in runs:
        scores, won, lost = [], 0, 0
        for task in tasks:
            own, full = samples[run.name][task], samples["full"][task]
            pairs = [(own[doc][0], full[doc][0]) for doc in full if None not in (own[doc][0], full[doc][0])]
            scores.append(sum(score for score, _ in pairs) / len(pairs) if pairs else float("nan"))
            won, lost = won + pairs.count((1, 0)), lost + pairs.count((0, 1))
        test = "" if run.name == "full" else f"+{won} -{lost}, p = {mcnemar_probability(won, lost):.2g}"
        rows.append((sum(scores) / len(scores), run.name, scores, test))
    lines = [f"| run | mean | {' | '.join(tasks)} | McNemar |", "| --- |" + " ---: |" * (len(tasks) + 2)]
    for mean, name, scores, test in sorted(rows, reverse=True):
        lines.append(f"| {name} | {mean:.1%} | {' | '.join(f'{score:.1%}' for score in scores)} | {test} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", help="folder or Hub repository")
    parser.add_argument("--methods", nargs="+", default=["all"], help="names as in `holitom-hf evaluate`")
    parser.add_argument("--retention-ratios", nargs="+", type=float, default=[0.25, 0.15, 0.1])
    parser.add_argument("--preset", help="settings that the methods' are laid over; default: the package's")
    parser.add_argument("--tasks", nargs="+", default=["mvbench", "egoschema", "longvideobench_val_v", "videomme"])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("ranking"))
    arguments = sys.argv[1:]
    options = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    args = parser.parse_args(arguments[: len(arguments) - len(options) - ("--" in arguments)])
    runs = method_runs(HoliTomConfig.coerce(args.preset), args.methods, args.retention_ratios)
    for run in runs:
        if not (args.out / run.name / "done").exists():
            run_task(args.checkpoint, run, args.tasks, args.out / run.name, args.gpus, options)
    table = ranking(runs, args.out)
    (args.out / "ranking.md").write_text(table + "\n")
    print(table)
