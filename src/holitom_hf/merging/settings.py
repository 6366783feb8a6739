"""The settings of the method, as plain values: what stages 1 to 3 need to know."""

import math
import numbers
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from .inner import INNER_METHODS, SKIP_METHODS
from .package import of_package
from .registry import METHODS
from .vision_methods import REUSE, VISION_METHODS


check_skipped = of_package("merging.skipping", "check_skipped")


def check_number(owner: str, name: str, value: Any, allowed: str, is_allowed) -> None:
    """Raises a `TypeError` or `ValueError` unless `value` is a finite number that `is_allowed`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}.{name} must be a number {allowed}, got {value!r} of type {type(value).__name__}")
    if not math.isfinite(value) or not is_allowed(value):
        raise ValueError(f"{owner}.{name} must be a number {allowed}, got {value!r}")


def check_cosine(*field: Any) -> None:
    """[`check_number`] of a cosine similarity."""
    check_number(*field, "in [-1, 1]", lambda value: -1 <= value <= 1)


def check_share(*field: Any) -> None:
    """[`check_number`] of a share."""
    check_number(*field, "with 0 < R <= 1", lambda value: 0 < value <= 1)


def check_cosines(owner: str, name: str, value: Any) -> None:
    """Raises a `TypeError` or `ValueError` unless `value` is `None` or a list of cosine similarities."""
    for each in value if isinstance(value, list) else [value]:
        if value is not None:
            check_cosine(owner, name, each)


def check_integer(owner: str, name: str, value: Any, minimum: int, is_optional: bool) -> None:
    """Raises a `TypeError` or `ValueError` unless `value` is an integer of at least `minimum`, or `None` if it may."""
    allowed = f"an integer >= {minimum}" + (" or None" if is_optional else "")
    if value is None and is_optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}.{name} must be {allowed}, got {value!r} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{owner}.{name} must be {allowed}, got {value!r}")


def check_choice(owner: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises a `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{owner}.{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_boolean(owner: str, name: str, value: Any) -> None:
    """Raises a `TypeError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}.{name} must be True or False, got {value!r} of type {type(value).__name__}")


def as_plain_number(value: Any) -> Any:
    """A number of NumPy's as Python's, which JSON knows; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


@dataclass
class MergingSettings:
    """
    Settings of HoliTom's token compression (arXiv 2505.21334).

    Args:
        retention_ratio: Share of a video's visual tokens that stages 1 and 2 keep, 0 < R <= 1 (R, section 3.2).
            At 1.0 these stages do nothing.
        similarity_threshold: Cosine similarity above which a token repeats the next frame's (tau, section 3.1).
        max_segment_frames: Longest segment in frames; `None` sets no limit.
        cluster_neighbors: Number of nearest neighbours in the density of DPC-KNN.
        cluster_center_weight: Weight of a cluster's centre against the mean of its members (beta).
        contextual_ratio: Share of a frame's kept dynamic tokens that is clustered instead of selected.
        inner_merge_layer: Decoder layer before which stage 3 runs (k, section 3.3); `None` leaves stage 3 out.
        inner_merge_ratio: Share of the visual tokens that stage 3 merges away, 0 <= r < 1.
        outer_method: What shortens the video before the decoder: a name in [`METHODS`] (`"holitom"`, its ablation
            `"fixed_windows"`, a baseline) or `"none"`.
        inner_method: What stage 3 does with the tokens it removes: `"merge"` (HoliTom), `"prune"` (FastV), `"none"`;
            `"prune_by_question"` (PruneVid, arXiv 2412.16117): as `"prune"`, by the attention of all tokens of the
            question. In its place, what visual tokens leave out in `skipped_layers`: `"skip_ffn"`,
            `"skip_attention"`, or both with `"freeze"` (ShortV, arXiv 2504.00502).
        skipped_layers: Decoder layers, from 0, that they leave it out in; `None`: none.
        newline_position: `"end"`: one newline token after the video (LLaVA-OneVision); `"row"`: one after every
            row of the grid that kept a token (LLaVA-Video).
        position_ids: `"packed"`: tokens are numbered anew after merging (HoliTom); `"kept"`: each stands where the
            token that it was, or the centre of what it stands for, stood in the uncompressed sequence, and text goes
            on behind all of it.
        proportional_attention: Whether a token that stands for n of the uncompressed ones has log n added to its
            attention scores in every decoder layer (ToMe, arXiv 2210.09461, section 3).
        virtual_unmerging: Whether attention is computed as if every token stood at all places of those that were
            merged into it, its outputs averaged (DyMU, arXiv 2504.17040, section 3.2): what `proportional_attention`
            is where all of them are one place.
        exact_budget: Whether stages 1 and 2 leave as many tokens as the sizes say, whatever the video shows: the least
            important go, or the most important dropped ones come back.
        min_frame_tokens: Tokens below which a frame is rather left out than shown, of methods that know how.
        importance_weight: Exponent of the importance that distances are weighted with, of methods that choose by
            distance; 0: importance does not matter.
        vision_method: What the vision tower leaves out: `"reuse"`: patches that repeat; for comparison `"frames"`
            (EarlyTom, arXiv 2605.30010): frames that are merged, `"tome"` (ToMe, arXiv 2210.09461): patches that are
            merged with others of their frame, as many in every layer, `"dymu"` (DyMU, arXiv 2504.17040): those more
            alike than `vision_merge_thresholds`. Features come back at full length with all of them, so that
            `retention_ratio` is of the original number of tokens.
        vision_reuse_layer: Layers of the vision tower after which it begins to, at least 1; `None`: it computes every
            patch of every frame.
        vision_reuse_threshold: Cosine similarity above which a patch repeats the next frame's there. With `"frames"`
            that of whole frames below which a segment ends (EarlyTom: 0.3 to 0.8). At 1 nothing is left out.
        vision_retention_ratio: With `"tome"`, the share of a frame's patches that is left in the end, 0 < R <= 1; with
            `"dymu"` what the thresholds were found for.
        vision_merge_thresholds: With `"dymu"`, the cosine similarity above which patches are merged, one for each
            layer that merges, as `holitom-hf calibrate-vision` finds them.
        vision_drift_guard: Whether a patch that repeats must be that like the one of its segment's first frame, too.

    Raises:
        TypeError, ValueError: When made or changed, naming the field, the value and what is allowed. A field that
            there is not is a `ValueError` however it is set.
    """

    retention_ratio: float = 0.15
    similarity_threshold: float = 0.80
    max_segment_frames: int | None = None
    cluster_neighbors: int = 7
    cluster_center_weight: float = 0.6
    contextual_ratio: float = 0.0
    inner_merge_layer: int | None = 18
    inner_merge_ratio: float = 0.5
    outer_method: str = "holitom"
    inner_method: str = "merge"
    skipped_layers: list[int] | None = None
    newline_position: str = "end"
    position_ids: str = "packed"
    proportional_attention: bool = False
    virtual_unmerging: bool = False
    exact_budget: bool = False
    min_frame_tokens: int = 4
    importance_weight: float = 0.0
    vision_method: str = REUSE
    vision_reuse_layer: int | None = None
    vision_reuse_threshold: float = 0.98
    vision_retention_ratio: float = 0.5
    vision_merge_thresholds: list[float] | None = None
    vision_drift_guard: bool = True

    # By field: raises an error unless a value is allowed. A subclass with more fields adds theirs.
    checks: ClassVar[dict[str, Any]] = {
        "retention_ratio": check_share,
        "similarity_threshold": check_cosine,
        "max_segment_frames": lambda *field: check_integer(*field, minimum=1, is_optional=True),
        "cluster_neighbors": lambda *field: check_integer(*field, minimum=1, is_optional=False),
        "cluster_center_weight": lambda *field: check_number(*field, "in [0, 1]", lambda value: 0 <= value <= 1),
        "contextual_ratio": lambda *field: check_number(*field, "in [0, 1]", lambda value: 0 <= value <= 1),
        "inner_merge_layer": lambda *field: check_integer(*field, minimum=1, is_optional=True),
        "inner_merge_ratio": lambda *field: check_number(*field, "with 0 <= r < 1", lambda value: 0 <= value < 1),
        "outer_method": lambda *field: check_choice(*field, (*METHODS, "none")),
        "inner_method": lambda *field: check_choice(*field, (*INNER_METHODS, "none", *SKIP_METHODS)),
        "skipped_layers": lambda *field: field[-1] is None or check_skipped(*field),
        "newline_position": lambda *field: check_choice(*field, ("end", "row")),
        "position_ids": lambda *field: check_choice(*field, ("packed", "kept")),
        "proportional_attention": check_boolean,
        "virtual_unmerging": check_boolean,
        "exact_budget": check_boolean,
        "min_frame_tokens": lambda *field: check_integer(*field, minimum=1, is_optional=False),
        "importance_weight": lambda *field: check_number(*field, "with w >= 0", lambda value: value >= 0),
        "vision_method": lambda *field: check_choice(*field, VISION_METHODS),
        "vision_reuse_layer": lambda *field: check_integer(*field, minimum=1, is_optional=True),
        "vision_reuse_threshold": check_cosine,
        "vision_retention_ratio": check_share,
        "vision_merge_thresholds": check_cosines,
        "vision_drift_guard": check_boolean,
    }

    # By layer of stage 3: the depth of the decoder it was chosen for.
    depth_of_layer: ClassVar[dict[int, int]] = {15: 24, 18: 28, 20: 32, 23: 36, 24: 40, 31: 48, 60: 80}

    def __new__(cls, *args, **values):
        cls.check_names(values)
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        self.check_names([name])
        value = as_plain_number(value)
        self.checks[name](type(self).__name__, name, value)
        super().__setattr__(name, value)

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Raises a `ValueError` unless all of `names` are fields."""
        unknown = ", ".join(repr(name) for name in names if name not in cls.checks)
        if unknown:
            raise ValueError(f"{cls.__name__} has no field {unknown}; its fields are {', '.join(cls.checks)}")

    @property
    def has_outer_stage(self) -> bool:
        """Whether the video is shortened before the decoder (stages 1 and 2)."""
        return self.outer_method != "none" and self.retention_ratio < 1

    @property
    def needs_importance(self) -> bool:
        """Whether what is kept of a video depends on the vision tower's attention."""
        return self.has_outer_stage and (METHODS[self.outer_method].needs_importance or self.importance_weight > 0)

    @property
    def needs_question(self) -> bool:
        """Whether what is kept of a video depends on the text it comes with."""
        return self.has_outer_stage and METHODS[self.outer_method].needs_question

    @property
    def has_inner_stage(self) -> bool:
        """Whether the video is shortened inside the decoder (stage 3)."""
        is_on = self.inner_merge_layer is not None and self.inner_merge_ratio > 0
        return is_on and self.inner_method in INNER_METHODS

    @property
    def skips(self) -> bool:
        """Whether visual tokens leave something out in some layers of the decoder."""
        return bool(self.skipped_layers) and self.inner_method in SKIP_METHODS

    @property
    def has_vision_stage(self) -> bool:
        """Whether the vision tower leaves out what repeats."""
        return self.vision_reuse_layer is not None

    @property
    def shortens(self) -> bool:
        """Whether the decoder sees fewer tokens than there are placeholders, in some layer at least."""
        return self.has_outer_stage or self.has_inner_stage

    @property
    def is_identity(self) -> bool:
        """Whether nothing is left out at all, so that the model is upstream's to the bit."""
        return not (self.shortens or self.has_vision_stage or self.skips)

    def check_decoder_depth(self, num_hidden_layers: int) -> None:
        """Raises a `ValueError` if settings name a layer that a decoder of this depth does not have."""
        if self.skips:
            check_skipped(type(self).__name__, "skipped_layers", self.skipped_layers, num_hidden_layers)
        layer, last = self.inner_merge_layer, num_hidden_layers - 1
        if self.has_inner_stage and layer > last:
            depth, hint = self.depth_of_layer.get(layer), ""
            if depth is not None:
                hint = f" (layer {layer} of {depth} is {min(max(round(layer / depth * (last + 1)), 1), last)} here)"
            raise ValueError(
                f"{type(self).__name__}.inner_merge_layer is {layer}, but the decoder has {last + 1} layers: choose 1 "
                f"to {last}{hint}, or None to leave stage 3 out"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary of JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]):
        """Makes settings from a dictionary; fields that it does not name have their defaults."""
        cls.check_names(values)
        return cls(**values)

    def overlaid(self, values: dict[str, Any]):
        """These settings with the fields that a dictionary names in place of their own."""
        return self.from_dict(vars(self) | values)
