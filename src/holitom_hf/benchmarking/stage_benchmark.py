"""HoliTom's own stages alone, against frames, redundancy, retention and batch, and against what the machine allows."""

from dataclasses import dataclass

import torch

from ..configuration import HoliTomConfig
from ..merging.hidden_states import merge_hidden_states
from ..merging.merged_video import TokenKind
from ..merging.patches import plan_patches
from ..merging.segmentation import choose_segments, count_static_tokens, frame_similarity, similarity_runs
from ..merging.tensors import merge_video_tokens
from ..sequence.compaction import compact_prompt
from .measuring import OperationCounts, Spread, alternate, count_operations, peak_bytes
from .synthetic import synthetic_features


STAGES = ("similarity", "segmentation", "stages 1+2", "compaction", "stage 3", "patch plan")
PATCHES_PER_FRAME, PATCH_DIM = 729, 1152  # of SigLIP, as LLaVA-OneVision has it


@dataclass
class StageResult:
    """
    The stages over one video, or over a batch of them.

    Attributes:
        num_frames, tokens_per_frame, dim: Of the features.
        retention_ratio, static_share, batch_size: What was asked for.
        num_tokens: Tokens that stages 1 and 2 left of a video.
        seconds: By stage. `segmentation` holds `similarity`, `stages 1+2` both; `patch plan` is what the vision tower
            decides before it leaves patches out.
        least_bytes, least_operations: By stage, what no implementation can do without: each input read and each
            output written once.
        floor: By stage, seconds that the machine needs for them, whichever takes longer.
        peak_bytes: Most memory of stages 1+2 beyond their input; `None` where it can't be told.
        operations: Launches and waits by stage, for one video.
    """

    num_frames: int
    tokens_per_frame: int
    dim: int
    retention_ratio: float
    static_share: float
    batch_size: int
    num_tokens: int
    seconds: dict[str, Spread]
    least_bytes: dict[str, float]
    least_operations: dict[str, float]
    floor: dict[str, float]
    peak_bytes: int | None
    operations: dict[str, OperationCounts]


@dataclass
class MachineLimits:
    """
    What a machine does at best.

    Attributes:
        bytes_per_second: Read from memory, by a sum over 256 MiB.
        operations_per_second: Of a product of large matrices, additions counted.
    """

    bytes_per_second: float
    operations_per_second: float


@torch.inference_mode()
def machine_limits(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, rounds: int = 5
) -> MachineLimits:
    """Measures reading, and multiplying in a dtype: the best of some rounds."""
    device = torch.device(device)
    values = torch.ones(2**26, device=device)
    side = 2048 if device.type == "cpu" else 8192
    # No zeros or ones: a GPU draws less power for them, and runs faster than it ever does otherwise.
    matrix = torch.randn((side, side), device=device).to(dtype)
    times = alternate({"read": values.sum, "multiply": lambda: matrix @ matrix}, device, rounds)
    return MachineLimits(values.nbytes / min(times["read"]), 2 * side**3 / min(times["multiply"]))


@torch.inference_mode()
def run_stage_benchmark(
    settings: HoliTomConfig,
    num_frames: int = 32,
    tokens_per_frame: int = 196,
    dim: int = 3584,
    static_share: float = 0.6,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounds: int = 15,
    limits: MachineLimits | None = None,
) -> StageResult:
    """
    Measures the stages over synthetic features.

    Args:
        settings: `retention_ratio`, `similarity_threshold` and so on.
        num_frames, tokens_per_frame, dim: F, T and D. Patches in the vision tower are SigLIP's.
        static_share: Share of the tokens and patches that repeat.
        batch_size: Videos, one after another as in a batch of prompts.
        device, dtype: Of the features.
        rounds: How often each stage is measured.
        limits: Of the machine; default: measured.
    """
    device = torch.device(device)
    limits = limits or machine_limits(device)
    features = synthetic_features(num_frames, tokens_per_frame, dim, static_share, device=device, dtype=dtype)
    random = torch.Generator(device).manual_seed(0)
    importance = torch.rand((num_frames, tokens_per_frame), device=device, generator=random)
    merged = merge_video_tokens(features, importance, settings)
    prompt = torch.cat([features.flatten(0, 1), features[0, :1]])[None].repeat(batch_size, 1, 1)
    is_video = torch.ones(prompt.shape[:2], dtype=torch.bool, device=device)
    hidden = merged.embeddings[None]
    asked = torch.rand(merged.num_tokens, device=device, generator=random)

    patches = synthetic_features(
        num_frames, PATCHES_PER_FRAME, PATCH_DIM, static_share, seed=1, device=device, dtype=dtype
    )
    planned = settings.overlaid({"vision_reuse_threshold": 0.8})  # those that repeat are alike to 0.9

    def similarity():
        return frame_similarity(features)

    def segmentation():
        return choose_segments(count_static_tokens(similarity_runs(similarity(), settings.similarity_threshold)))

    def merging():
        return merge_video_tokens(features, importance, settings)

    def compaction():
        # One pass for the whole batch, as in the model.
        tokens = [merged.embeddings] * batch_size
        return compact_prompt(prompt, is_video, is_video, tokens, [prompt.shape[1]] * batch_size)

    def inner():
        return merge_hidden_states(hidden, asked, 0, merged.num_tokens, settings.inner_merge_ratio)

    def patch_plan():
        return plan_patches(patches, [num_frames], planned)

    single = {
        "similarity": similarity,
        "segmentation": segmentation,
        "stages 1+2": merging,
        "stage 3": inner,
        "patch plan": patch_plan,
    }

    def repeated(function):
        return lambda: [function() for _ in range(batch_size)]

    calls = {name: repeated(function) for name, function in single.items()} | {"compaction": compaction}
    times = alternate(calls, device, rounds, warmup=2)
    peak = peak_bytes(calls["stages 1+2"], device)
    least_bytes, least_operations = _least_work(features, merged, settings)
    return StageResult(
        num_frames=num_frames,
        tokens_per_frame=tokens_per_frame,
        dim=dim,
        retention_ratio=settings.retention_ratio,
        static_share=static_share,
        batch_size=batch_size,
        num_tokens=merged.num_tokens,
        seconds={stage: Spread.of(times[stage]) for stage in STAGES},
        least_bytes={stage: batch_size * least_bytes[stage] for stage in STAGES},
        least_operations={stage: batch_size * least_operations[stage] for stage in STAGES},
        floor={
            stage: batch_size
            * max(least_bytes[stage] / limits.bytes_per_second, least_operations[stage] / limits.operations_per_second)
            for stage in STAGES
        },
        peak_bytes=peak,
        operations={
            name: count_operations(function) for name, function in (single | {"compaction": compaction}).items()
        },
    )


def _least_work(features: torch.Tensor, merged, settings: HoliTomConfig) -> tuple[dict, dict]:
    """Bytes and operations by stage, for one video."""
    num_frames, tokens_per_frame, dim = features.shape
    token_bytes = dim * features.element_size()
    num_inputs, num_outputs = num_frames * tokens_per_frame, merged.num_tokens
    segments = [(start, stop - start) for start, stop in merged.segments if stop - start > 1]
    is_static = merged.kind[merged.assignment] == TokenKind.STATIC  # (F, T), wrong where assignment is -1
    sizes = [int((is_static[start] & (merged.assignment[start] >= 0)).sum()) for start, _ in segments]
    clusters = [int(((merged.kind == TokenKind.STATIC) & (merged.frame == start)).sum()) for start, _ in segments]
    # Static tokens are read a second time: which they are is not known before all are compared.
    averaged = sum(size * length for size, (_, length) in zip(sizes, segments))
    kept = round(num_outputs * (1 - settings.inner_merge_ratio))
    patch_values = PATCHES_PER_FRAME * PATCH_DIM
    comparing = 2 * dim * tokens_per_frame * (2 * num_frames - 1)
    clustering = sum(n * n + 2 * n * m for n, m in zip(sizes, clusters)) * dim  # distances are symmetric
    least_bytes = {
        "similarity": num_inputs * token_bytes,
        "segmentation": num_inputs * token_bytes,
        "stages 1+2": (num_inputs + averaged + 2 * num_outputs) * token_bytes,
        "compaction": 2 * num_outputs * token_bytes,
        "stage 3": (num_outputs + kept) * token_bytes,
        "patch plan": (2 * num_frames - 1) * patch_values * features.element_size(),  # the later frames once more
    }
    least_operations = {
        "similarity": comparing,
        "segmentation": comparing,
        "stages 1+2": comparing + averaged * dim + clustering,
        "compaction": 0,
        "stage 3": 2 * kept * (num_outputs - kept) * dim,
        "patch plan": 2 * patch_values * (3 * num_frames - 2),  # norms, products with the frame before and the first
    }
    return least_bytes, least_operations
