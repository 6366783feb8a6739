"""Measurements as tables and JSON, and what got slower since the last ones."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from .exact_flops import ForwardFlops
from .measuring import Spread
from .model_benchmark import OWN_STEPS, SHARED_STEPS, ModelResult


# A step counts as slower if its median grew by more than this and the middle halves of both measurements don't meet,
# both after what all steps together grew by: that is the machine.
SLOWER = 0.15
# Peaks count from more bytes and a larger share on: a system hands out memory in batches. Other bytes are exact.
MORE_PEAK, MORE_PEAK_BYTES = 0.05, 16 * 2**20
STEP_NAMES = {
    "decode": "decode the file",
    "preprocess": "preprocess",
    "vision_tower": "vision tower, projector",
    "importance": "importance",
    "segmentation": "segmentation",
    "merging": "merging",
    "compaction": "compaction",
    "prefill": "decoder prefill",
    "first_token": "first token (tower to logits)",
    "answer": "tokens after the first",
    "end_to_end": "file to answer",
}


def write_result(path: Path, command: str, machine: dict, result) -> dict:
    """Writes a result (a dataclass or a list of them) with what it was measured with, and returns what was written."""
    values = [asdict(entry) for entry in result] if isinstance(result, list) else asdict(result)
    record = {"command": command, "machine": machine, "result": values}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return record


def read_result(path: Path) -> dict:
    """
    What [`write_result`] wrote.

    Raises:
        FileNotFoundError, ValueError: If it is not there, or no such file.
    """
    try:
        record = json.loads(path.read_text())
        record["machine"], record["result"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of this benchmark") from error
    return record


def compare(old: dict, new: dict) -> list[str]:
    """
    Lines that tell what got slower, larger or more since an earlier result; and first, if other things changed, which.

    Args:
        old, new: Records of [`write_result`].

    Returns:
        Nothing if nothing got worse on the same machine.
    """
    lines = [
        f"{name} was {old['machine'].get(name)}, is {value}"
        for name, value in new["machine"].items()
        if old["machine"].get(name) != value
    ]
    before = dict(_leaves(old["result"]))
    growth = [
        value.median / before[path].median
        for path, value in _leaves(new["result"])
        if isinstance(value, Spread) and isinstance(before.get(path), Spread) and before[path].median
    ]
    drift = statistics.median(growth) if growth else 1.0
    if abs(drift - 1) > SLOWER:
        lines.append(f"all steps together take {drift - 1:+.0%}: the machine is not as it was, or all of them changed")
    for path, value in _leaves(new["result"]):
        was = before.get(path)
        if isinstance(value, Spread) and isinstance(was, Spread):
            if value.median > (1 + SLOWER) * drift * was.median and value.lower > drift * was.upper:
                growth = value.median / was.median - 1
                lines.append(
                    f"SLOWER {path}: {milliseconds(was.median)} -> {milliseconds(value.median)} ({growth:+.0%})"
                )
        elif isinstance(value, int) and isinstance(was, int):
            if path.endswith(("launches", "waits")) and value > was:
                lines.append(f"MORE {path}: {was} -> {value}")
            allowed = was + max(MORE_PEAK * was, MORE_PEAK_BYTES) if "peak" in path else was
            if "bytes" in path and value > allowed:
                lines.append(f"LARGER {path}: {_mebibytes(was)} -> {_mebibytes(value)}")
    missing = sorted(set(before) - {path for path, _ in _leaves(new["result"])})
    return lines + [f"NOT MEASURED {path}" for path in missing]


def _leaves(value, path: str = "") -> Iterator[tuple[str, Spread | int]]:
    """Spreads and integers of nested JSON, by path; members of lists by what was asked of them."""
    if isinstance(value, dict) and set(value) == {"median", "lower", "upper", "count"}:
        yield path, Spread(**value)
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _leaves(entry, f"{path}/{name}" if path else name)
    elif isinstance(value, list):
        for entry in value:
            names = ("num_frames", "retention_ratio", "static_share", "batch_size")
            label = ",".join(f"{name}={entry[name]}" for name in names) if isinstance(entry, dict) else ""
            yield from _leaves(entry, f"{path}[{label}]")
    elif isinstance(value, int) and not isinstance(value, bool):
        yield path, value


def model_table(result: ModelResult) -> str:
    """A contest as a Markdown table, and below it what a sentence says better."""
    variants = [name for name in result.steps["first_token"] if name not in ("plain", "holitom")]
    rows = [
        "".join([f"| step | {result.plain} | HoliTom | |", *(f" {name} | |" for name in variants)]),
        "| --- | ---: | ---: | ---: |" + " ---: | ---: |" * len(variants),
    ]
    order = [*SHARED_STEPS[:3], *OWN_STEPS, *SHARED_STEPS[3:]]
    for step in order:
        spreads = result.steps[step]
        plain = _spread(spreads["plain"]) if "plain" in spreads else ""
        ratio = f"{result.ratio(step):.2f}x" if "plain" in spreads and step not in ("decode", "preprocess") else ""
        row = f"| {STEP_NAMES[step]} | {plain} | {_spread(spreads['holitom'])} | {ratio} |"
        for name in variants:
            row += f" {_spread(spreads[name])} | {result.ratio(step, name):.2f}x |" if name in spreads else " | |"
        rows.append(row)
    new = result.new_tokens - 1
    rates = [new / result.steps["answer"][model].median for model in ("plain", "holitom")]
    rows.append(f"| tokens/s after the first | {rates[0]:.1f} | {rates[1]:.1f} | {rates[1] / rates[0]:.2f}x |")
    sizes = {"KV cache after the prompt": result.cache_bytes} | {
        f"peak memory, {STEP_NAMES['first_token'] if step == 'first_token' else 'whole answer'}": peak
        for step, peak in result.peak_bytes.items()
    }
    for name, value in sizes.items():
        if None not in value.values():
            plain, ours = value["plain"], value["holitom"]
            rows.append(f"| {name} | {_mebibytes(plain)} | {_mebibytes(ours)} | {plain / max(ours, 1):.2f}x |")
    for name, best in result.throughput.items():
        if best:
            rows.append(
                f"| throughput, {name}, batch {best['batch_size']:.0f} | {best['prompts_per_second']:.2f} prompts/s | "
                f"{best['tokens_per_second']:.1f} tokens/s | |"
            )
    tokens, operations = result.tokens, result.operations
    waits = operations["merging_waits"]
    return "\n".join(rows) + (
        f"\n\nPrompt: {tokens['plain']} tokens, {tokens['outer']} in the decoder, {tokens['inner']} from stage 3 on. "
        f"HoliTom's own work before the decoder: {result.own_share:.1%} of the uncompressed model's first token, "
        f"{operations['merging_launches']} launches in stages 1 and 2"
        + (f", {waits} waits for the device." if waits is not None else ".")
        + f" The vision tower runs at {result.tower_share:.0%} of the speed of a large matrix product here."
        + "".join(
            f" Of the patches {share:.1%} are computed in the tower's later layers ({name})."
            for name, share in result.computed_patches.items()
        )
        + "\nMedians, in brackets the quartiles; launches counted with the budgets of this device."
    )


def flops_table(plain: ForwardFlops, ours: ForwardFlops, paper: tuple[float, float]) -> str:
    """
    Operations as a Markdown table.

    Args:
        plain, ours: Exact, without and with compression.
        paper: The decoder's by the paper's formula, without and with.
    """
    rows = ["| | uncompressed | HoliTom | |", "| --- | ---: | ---: | ---: |"]
    entries = {"decoder, video tokens, the paper's formula": paper}
    names = {
        "vision_tower": "vision tower",
        "projector": "projector",
        "importance": "importance",
        "segmentation": "segmentation",
        "clustering": "clustering",
        "choosing": "choosing, other methods",
        "decoder": "decoder",
        "inner_merging": "stage 3",
        "output_layer": "output layer, one token",
    }
    exact = asdict(plain), asdict(ours)
    entries |= {f"{text}, exact": (exact[0][name], exact[1][name]) for name, text in names.items()}
    entries["all, exact"] = (plain.total, ours.total)
    entries["of it HoliTom's own work"] = (plain.own, ours.own)
    for name, (before, after) in entries.items():
        share = f"{after / before:.1%}" if before else ""
        rows.append(f"| {name} | {_operations(before)} | {_operations(after)} | {share} |")
    return "\n".join(rows)


def milliseconds(value: float) -> str:
    """Seconds as text."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms" if value < 0.1 else f"{1000 * value:.0f} ms"


def _spread(spread: Spread) -> str:
    if spread.count == 1:
        return milliseconds(spread.median)
    lower, upper = milliseconds(spread.lower).split()[0], milliseconds(spread.upper).split()[0]
    return f"{milliseconds(spread.median)} [{lower}, {upper}]"


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:.1f} MiB" if value < 2**30 else f"{value / 2**30:.2f} GiB"


def _operations(value: float) -> str:
    return f"{value / 1e12:.2f} T" if value >= 1e11 else f"{value / 1e9:.2f} G" if value else "0"
