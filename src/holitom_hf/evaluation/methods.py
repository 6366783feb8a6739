"""What `holitom-hf evaluate` compares: a row per method, and the paper's ablations."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..configuration import HoliTomConfig
from ..merging.registry import METHODS
from ..merging.vision_methods import DYMU, FRAMES, REUSE, TOME


@dataclass
class Row:
    """
    A row of the table.

    Attributes:
        label: Its name there.
        settings: Makes the settings from the model's own and the retention ratio.
        color: Its colour in the plots, from Okabe and Ito's palette for the colour-blind.
        marker: Its marker there.
        is_control: Whether it is there only to be compared with.
    """

    label: str
    settings: Callable[[HoliTomConfig, float], HoliTomConfig]
    color: str
    marker: str
    is_control: bool


@dataclass
class Run:
    """
    Settings to evaluate under a unique `name`: a `method` at a `retention_ratio`, an entry of an `ablation`, or
    neither where they are given one by one. It is compared with the run called `baseline`.
    """

    name: str
    settings: HoliTomConfig
    method: str | None = None
    retention_ratio: float | None = None
    ablation: str | None = None
    baseline: str = "full"


def _outer(name: str) -> Callable[[HoliTomConfig, float], HoliTomConfig]:
    fields = {"outer_method": name, "inner_method": "none"} | METHODS[name].fields
    return lambda own, ratio: replace(own, retention_ratio=ratio, **fields)


def _fastv(own: HoliTomConfig, ratio: float) -> HoliTomConfig:
    """FastV keeps the share R of the tokens from layer 2 on; what the layers before cost, the FLOPs show."""
    return replace(own, outer_method="none", inner_method="prune", inner_merge_layer=2, inner_merge_ratio=1 - ratio)


def _skipping(name: str) -> Callable[[HoliTomConfig, float], HoliTomConfig]:
    """HoliTom before the decoder; inside, layers that `holitom-hf calibrate` wrote, or that of stage 3 alone."""

    def settings(own: HoliTomConfig, ratio: float) -> HoliTomConfig:
        layers = own.skipped_layers or [own.inner_merge_layer or 0]
        return replace(own, retention_ratio=ratio, inner_method=name, skipped_layers=layers)

    return settings


SKIPPING = {
    "skip_ffn": "HoliTom, FFN skipped",
    "skip_attention": "HoliTom, attention skipped",
    "freeze": "HoliTom, both skipped (ShortV)",
}


def _rows() -> dict[str, Row]:
    """HoliTom with and without stage 3, every other method of the registry, and those that work inside alone."""
    found: dict[str, tuple[str, Callable[[HoliTomConfig, float], HoliTomConfig]]] = {
        "holitom": ("HoliTom", lambda own, ratio: replace(own, retention_ratio=ratio)),
        "holitom-outer": ("HoliTom w/o stage 3", _outer("holitom")),
    }
    for group in ("ours", "published", "control"):
        for name, method in METHODS.items():
            if method.group == group and name != "holitom":
                found[method.short_name or name] = (method.label, _outer(name))
        if group == "published":
            found["fastv"] = ("FastV", _fastv)
            found |= {name: (label, _skipping(name)) for name, label in SKIPPING.items()}
    controls = {method.short_name or name for name, method in METHODS.items() if method.group == "control"}
    looks = zip(itertools.cycle(COLORS), itertools.cycle(MARKERS))
    return {name: Row(*row, *look, name in controls) for (name, row), look in zip(found.items(), looks)}


COLORS = ("#D55E00", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#999999", "#56B4E9")
MARKERS = "os^vDxP*<>hX"  # another number than of colours, so that no two rows look alike
ROWS = _rows()
RETENTION_RATIOS = (0.25, 0.20, 0.15, 0.10, 0.05, 0.02)


def full_run(own: HoliTomConfig) -> Run:
    """The uncompressed model."""
    return Run("full", replace(own, outer_method="none", inner_method="none"), method="full")


def method_runs(own: HoliTomConfig, methods: list[str], ratios: list[float]) -> list[Run]:
    """
    Every method at every ratio, after the uncompressed model; `"all"` stands for all of [`ROWS`].

    Raises:
        ValueError: If a method is not one of [`ROWS`] or a ratio is out of range.
    """
    methods = list(ROWS) if "all" in methods else methods
    unknown = [name for name in methods if name not in ROWS]
    if unknown:
        raise ValueError(f"there is no method {', '.join(unknown)}; choose from {', '.join(ROWS)}")
    runs = [full_run(own)]
    for name in methods:
        for ratio in ratios:
            runs.append(Run(f"{name}@{ratio:g}", ROWS[name].settings(own, ratio), name, ratio))
    return runs


def settings_runs(own: HoliTomConfig, given: list[str | dict], ratios: list[float] | None = None) -> list[Run]:
    """
    Rows of any settings, named by their preset or file, or by what differs from the model's own.

    Args:
        own: The model's.
        given: Presets, files, or fields that replace the model's.
        ratios: Each is evaluated at these; `None`: at its own.

    Raises:
        TypeError, ValueError: If there is no such preset, or a field or its value is not allowed.
    """
    runs = {}
    for value, base in ((value, HoliTomConfig.coerce(value, own)) for value in given):
        for ratio in ratios or [base.retention_ratio]:
            settings = replace(base, retention_ratio=ratio)
            before = own.to_dict()
            changes = [f"{name}={field}" for name, field in settings.to_dict().items() if field != before[name]]
            name = ", ".join(changes) or "the model's own settings"
            if isinstance(value, str):
                name = value if ratio == base.retention_ratio else f"{value} at {ratio:g}"
            runs[name] = Run(name, settings, retention_ratio=ratio)
    return list(runs.values())


def _places_and_sizes(settings: HoliTomConfig) -> dict[str, HoliTomConfig]:
    """Settings with and without kept positions and proportional attention."""
    return {
        f"{position_ids}, {'sized' if sized else 'plain'}": replace(
            settings, position_ids=position_ids, proportional_attention=sized
        )
        for sized in (False, True)
        for position_ids in ("packed", "kept")
    }


def ablation_runs(own: HoliTomConfig, num_layers: int, ratio: float = 0.15) -> list[Run]:
    """The paper's ablations and ours, one field changed at a time, at one retention ratio."""
    base = replace(own, retention_ratio=ratio)
    outer = replace(base, inner_method="none")
    farthest = ROWS["farthest"].settings(own, ratio)
    layers = range(1, num_layers)
    entries: dict[str, dict[str, HoliTomConfig]] = {
        "similarity threshold tau": {
            f"tau = {tau:g}": replace(base, similarity_threshold=tau) for tau in (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
        },
        "layer k of stage 3": {"without": outer}
        | {f"k = {layer}": replace(base, inner_merge_layer=layer) for layer in layers},
        "stage 3, r = 0.5": {"merge": base, "prune": replace(base, inner_method="prune")},
        "stage 3, r = 0.75": {
            "merge": replace(base, inner_merge_ratio=0.75),
            "prune": replace(base, inner_merge_ratio=0.75, inner_method="prune"),
        },
        "weight of cluster centres beta": {
            f"beta = {beta:g}": replace(base, cluster_center_weight=beta) for beta in (0.0, 0.3, 0.6, 1.0)
        },
        "share of clustered dynamic tokens": {
            f"{share:g}": replace(base, contextual_ratio=share) for share in (0.0, 0.2, 0.5)
        },
        "segmentation": {"global": base}
        | {
            f"windows of {window}": replace(base, outer_method="fixed_windows", max_segment_frames=window)
            for window in (2, 4, 8, 16)
        },
        "places and sizes, HoliTom w/o stage 3": _places_and_sizes(outer),
        "places and sizes, random tokens": _places_and_sizes(ROWS["random"].settings(own, ratio)),
        "places and sizes, farthest points": _places_and_sizes(farthest),
        "farthest points": {"as they are": farthest}
        | {f"at least {n} tokens a frame": replace(farthest, min_frame_tokens=n) for n in (1, 8, 16)}
        | {f"weighted by importance ^ {w:g}": replace(farthest, importance_weight=w) for w in (0.5, 1.0)}
        | {
            f"repeated ones left out, tau = {tau:g}": replace(farthest, similarity_threshold=tau)
            for tau in (0.8, 0.95)
        }
        | {"with stage 3": replace(farthest, inner_method="merge")},
    }
    return [
        Run(f"{group}: {label}", settings, retention_ratio=ratio, ablation=group)
        for group, members in entries.items()
        for label, settings in members.items()
    ]


def vision_runs(own: HoliTomConfig, ratio: float = 0.15, layer: int = 1) -> list[Run]:
    """Everything that the vision tower may leave out after `layer` layers, before a few ways to go on behind it."""
    full = full_run(own)
    decoders = {
        "all tokens": full.settings,
        "HoliTom": replace(own, retention_ratio=ratio),
        "farthest points": ROWS["farthest"].settings(own, ratio),
    }
    varied = {
        REUSE: ("vision_reuse_threshold", (0.95, 0.98, 0.99)),
        FRAMES: ("vision_reuse_threshold", (0.8, 0.95)),
        TOME: ("vision_retention_ratio", (0.5, 0.35, 0.25)),
        DYMU: ("vision_retention_ratio", (own.vision_retention_ratio,) if own.vision_merge_thresholds else ()),
    }
    runs = []
    for decoder, settings in decoders.items():
        group = f"vision tower, {decoder}"
        whole = full
        if settings.shortens:
            whole = Run(f"{group}: all patches", settings, retention_ratio=ratio, ablation=group)
            runs.append(whole)
        for method, (field, values) in varied.items():
            for value in values:
                fields = {"vision_method": method, "vision_reuse_layer": layer, field: value}
                name = f"{group}: {method} {value:g}"
                runs.append(Run(name, replace(settings, **fields), None, ratio, group, baseline=whole.name))
    return runs
