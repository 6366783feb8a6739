"""What `holitom-hf evaluate` compares: a row per method, and the paper's ablations."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .configuration_holitom import HoliTomConfig


@dataclass
class Method:
    """
    A row of the table.

    Attributes:
        label: Its name there.
        settings: Makes the settings from the model's own and the retention ratio.
        color: Its colour in the plots, from Okabe and Ito's palette for the colour-blind.
        marker: Its marker there.
    """

    label: str
    settings: Callable[[HoliTomConfig, float], HoliTomConfig]
    color: str
    marker: str


@dataclass
class Run:
    """Settings to evaluate under a unique `name`: a `method` at a `retention_ratio`, or an entry of an `ablation`."""

    name: str
    settings: HoliTomConfig
    method: str | None = None
    retention_ratio: float | None = None
    ablation: str | None = None


def _outer(name: str) -> Callable[[HoliTomConfig, float], HoliTomConfig]:
    return lambda own, ratio: replace(own, retention_ratio=ratio, outer_method=name, inner_method="none")


METHODS = {
    "holitom": Method("HoliTom", lambda own, ratio: replace(own, retention_ratio=ratio), "#D55E00", "o"),
    "holitom-outer": Method("HoliTom w/o stage 3", _outer("holitom"), "#E69F00", "s"),
    "visionzip": Method("VisionZip", _outer("visionzip"), "#0072B2", "^"),
    # FastV keeps the share R of the tokens from layer 2 on; what the layers before cost, the FLOPs show.
    "fastv": Method(
        "FastV",
        lambda own, ratio: replace(
            own, outer_method="none", inner_method="prune", inner_merge_layer=2, inner_merge_ratio=1 - ratio
        ),
        "#009E73",
        "v",
    ),
    "frames": Method("fewer frames", _outer("frame_subsampling"), "#CC79A7", "D"),
    "random": Method("random tokens", _outer("random_tokens"), "#999999", "x"),
    "pooling": Method("average pooling", _outer("average_pooling"), "#56B4E9", "P"),
}
RETENTION_RATIOS = (0.25, 0.20, 0.15, 0.10, 0.05, 0.02)


def full_run(own: HoliTomConfig) -> Run:
    """The uncompressed model."""
    return Run("full", replace(own, outer_method="none", inner_method="none"), method="full")


def method_runs(own: HoliTomConfig, methods: list[str], ratios: list[float]) -> list[Run]:
    """
    Every method at every ratio, after the uncompressed model.

    Raises:
        ValueError: If a method is not one of [`METHODS`] or a ratio is out of range.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ValueError(f"there is no method {', '.join(unknown)}; choose from {', '.join(METHODS)}")
    runs = [full_run(own)]
    for name in methods:
        for ratio in ratios:
            runs.append(Run(f"{name}@{ratio:g}", METHODS[name].settings(own, ratio), name, ratio))
    return runs


def ablation_runs(own: HoliTomConfig, num_layers: int, ratio: float = 0.15) -> list[Run]:
    """The paper's ablations, one field changed at a time, at one retention ratio."""
    base = replace(own, retention_ratio=ratio)
    outer = replace(base, inner_method="none")
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
    }
    return [
        Run(f"{group}: {label}", settings, retention_ratio=ratio, ablation=group)
        for group, members in entries.items()
        for label, settings in members.items()
    ]
