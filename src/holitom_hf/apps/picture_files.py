"""A video before and after merging, as a picture, a video or a page."""

import base64
import html
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from transformers.video_utils import VideoMetadata

from ..answering.answerer import Answerer
from ..answering.prompts import PIXELS, encode_videos
from ..configuration import HoliTomConfig
from ..merging.merged_video import MergedVideo
from ..merging.registry import METHODS
from ..merging.segmentation import frame_similarity
from ..merging.tensors import merge_tokens
from ..merging.video_tokens import VideoTokens
from ..video.encoding import write_video
from .visualization import (
    COLORS,
    COUNTS_NAME,
    KEPT,
    NAMES,
    STAGES,
    Fate,
    cell,
    digit_size,
    draw_budget,
    draw_similarity,
    frame_legend,
    frame_spans,
    frames_text,
    numbers_text,
    paint_computed,
    paint_frame,
    plot_merging,
    segment_text,
    shown_sizes,
    token_fates,
)


MAX_SIDE = 384  # pixels of a frame in a picture or a page
VIDEO_SIDE = 448  # pixels of a frame's shorter side in a video
VIDEO_FPS = 2
MIN_DIGIT_PIXELS, MAX_DIGIT_PIXELS = 9, 16
QUESTION = "What happens in the video?"  # what stage 3 keeps depends on it


@dataclass
class MergingView:
    """
    A video and what was done to it.

    Attributes:
        name: Of the video.
        frames: (M, H, W, 3) uint8, as decoded.
        merged: The tokens, of F frames or temporal patches of several.
        grid: Rows and columns of the tokens of one of the F.
        similarity: (F-1, T) cosine similarity of neighbouring frames' tokens.
        threshold: Above which they count as the same; `None`: nothing does.
        question: Which stage 3 was asked; `None` if it did not run.
        survives: (N,) bool, the tokens that it left; `None` if it did not run.
        fold: Whether it folded the others into those.
        computed: (F, P) bool, the patches that the vision tower computed in its later layers; `None`: all.
        temporal_patch_size: How many of the M frames are one of the F; the first of them is shown.
        method: What merged before the decoder.
        counts: Whether tokens count for as many as they stand for.
        patch_grid: Rows and columns of a frame's P patches; `None`: a square.
    """

    name: str
    frames: np.ndarray
    merged: MergedVideo
    grid: tuple[int, int]
    similarity: torch.Tensor
    threshold: float | None
    question: str | None = None
    survives: torch.Tensor | None = None
    fold: bool = True
    computed: np.ndarray | None = None
    temporal_patch_size: int = 1
    method: str = STAGES
    counts: bool = False
    patch_grid: tuple[int, int] | None = None

    @property
    def sizes(self) -> torch.Tensor | None:
        """For how many tokens each of `merged` counts; `None`: for one."""
        return self.merged.sizes if self.counts else None

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Which of the M frames each of the F is."""
        return frame_spans(len(self.frames), self.temporal_patch_size)

    @property
    def shown(self) -> np.ndarray:
        """(F, H, W, 3), those of the frames that are shown."""
        return self.frames[:: self.temporal_patch_size]


@torch.inference_mode()
def merge_frames(
    answerer: Answerer,
    frames: torch.Tensor,
    settings: HoliTomConfig,
    question: str = QUESTION,
    metadata: VideoMetadata | None = None,
    **limits: float | None,
) -> MergingView:
    """
    Encodes and merges a video, and runs the decoder up to where stage 3 is done.

    Args:
        answerer: With its weights loaded.
        frames: (M, 3, H, W) uint8.
        settings: What to merge by.
        question: What stage 3 is asked.
        metadata: Of the video that the frames are of, for a model that is told their times; `None`: not known.
        limits: Of pixels, as in [`Answerer.prepare`].

    Raises:
        ValueError: If the settings merge nothing, or limits don't fit the backbone.
    """
    if not settings.has_outer_stage:
        raise ValueError(
            f"outer_method is {settings.outer_method!r} and retention_ratio {settings.retention_ratio:g}: before the "
            "decoder nothing is merged that could be shown"
        )
    model = answerer.model
    features = answerer.prepare(frames, question, metadata=metadata, **limits).features.to(model.device)
    encoded = encode_videos(model, features, holitom_config=settings)
    del features[PIXELS]
    [tokens] = model.model.video_tokens(encoded)
    threshold = settings.similarity_threshold if settings.similarity_threshold < 1 else None
    computed, grids = (getattr(encoded, name, None) for name in ("computed_patches", "grids"))
    view = MergingView(
        "video",
        frames.permute(0, 2, 3, 1).cpu().numpy(),
        merge_tokens(tokens, settings),
        tokens.grid_for("a picture"),
        frame_similarity(tokens.features),
        threshold,
        computed=None if computed is None else computed[0].cpu().numpy(),
        temporal_patch_size=getattr(answerer.processor.video_processor, "temporal_patch_size", 1),
        method=STAGES if settings.outer_method == "holitom" else METHODS[settings.outer_method].label,
        counts=settings.proportional_attention,
        patch_grid=grids[0][1:] if grids else None,
    )
    if not (settings.has_inner_stage or settings.needs_question):
        return view
    outputs = model.generate(
        **features,
        mm_encoder_outputs={"video": encoded},
        holitom_config=settings,
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
    )
    merged = outputs.merged_videos[0][0]  # in the order of the prompt
    view = replace(view, merged=merged, question=question)
    if not settings.has_inner_stage:
        return view
    places = _places_inside(model, merged, tokens, features["input_ids"][0])
    survives = torch.isin(places, outputs.inner_keep[0].to(places.device))
    return replace(view, survives=survives, fold=settings.inner_method == "merge")


def _places_inside(model, merged: MergedVideo, tokens: VideoTokens, input_ids: torch.Tensor) -> torch.Tensor:
    """(N,), which of the tokens that enter the decoder those of a prompt's only video are."""
    number = torch.arange(merged.num_tokens, device=input_ids.device)
    slots = model.model.token_slots(merged, tokens)
    slots = number if slots is None else slots.to(input_ids.device)
    placeholders = (input_ids == model.config.video_token_id).nonzero()[:, 0]
    # Behind the text that stands before a token, and the tokens before it; dropped placeholders are gone.
    return placeholders[slots] - slots + number


def view_merging(
    answerer: Answerer,
    video: str,
    num_frames: int | None = None,
    question: str = QUESTION,
    fps: float | None = None,
    **limits: float | None,
) -> MergingView:
    """
    Decodes, encodes and merges a video with the model's own settings.

    Args:
        answerer: With its weights loaded.
        video: Path or URL.
        num_frames: Frames to take; `None`: at most the processor's.
        question: What stage 3 is asked.
        fps: Frames to take of each second, in place of `num_frames`.
        limits: Of pixels, as in [`Answerer.prepare`].

    Raises:
        OSError, ValueError: If the video can't be read or has fewer frames, limits don't fit the backbone, or the
            settings merge nothing.
    """
    (frames,), (metadata,) = answerer.processor.video_processor.decode(video, num_frames=num_frames, fps=fps)
    view = merge_frames(answerer, frames, answerer.config.holitom_config, question, metadata, **limits)
    return replace(view, name=Path(video).name)


def figure_of(view: MergingView) -> Figure:
    """Everything in one figure; see [`plot_merging`]."""
    return plot_merging(
        view.merged,
        _resized(view.frames, MAX_SIDE),
        view.similarity,
        view.threshold,
        view.survives,
        view.fold,
        view.question,
        view.computed,
        view.grid,
        view.temporal_patch_size,
        view.method,
        view.sizes,
        view.patch_grid,
    )


def write_picture(view: MergingView, path: Path) -> None:
    """The figure as a PNG."""
    figure_of(view).savefig(path, dpi=150)


def write_clip(view: MergingView, path: Path) -> None:
    """A H.264 video, two frames a second: each frame beside what became of its tokens."""
    frames, spans = view.shown, view.spans
    scale = VIDEO_SIDE / min(frames.shape[1:3])
    size = tuple(2 * round(side * scale / 2) for side in frames.shape[2:0:-1])  # width, height
    fates = token_fates(view.merged).numpy()
    segment_of = [number for number, (start, stop) in enumerate(view.merged.segments) for _ in range(start, stop)]
    legend = frame_legend(fates)
    numbers = shown_sizes(view.merged, fates, view.sizes)
    digits = min(digit_size(numbers, view.grid, *size), MAX_DIGIT_PIXELS)
    numbers = numbers if digits >= MIN_DIGIT_PIXELS else {}
    if numbers:
        legend.append((None, f"12: {COUNTS_NAME}"))
    pictures = []
    for number, frame in enumerate(frames):
        original = Image.fromarray(frame).resize(size)
        painted = paint_frame(np.asarray(original), fates[number], view.grid)
        painted = _outlined(painted, fates[number], view.grid)
        of_frame = {position: count for (of, position), count in numbers.items() if of == number}
        _write_numbers(painted, of_frame, view.grid, ImageFont.load_default(size=digits))
        title = f"{frames_text(*spans[number])} of {len(view.frames)}"
        if view.computed is not None:
            computed = view.computed[number]
            original = Image.fromarray(paint_computed(np.asarray(original), computed, view.patch_grid))
            title += f": {computed.sum()} of {len(computed)} patches computed"
        num_kept = int(np.isin(fates[number], KEPT).sum())
        segment = segment_text(view.merged.segments[segment_of[number]], spans)
        segment = f"segment {segment_of[number] + 1}, {segment}: {num_kept} of {fates.shape[1]} tokens kept"
        pictures.append(_beside(original, painted, title, segment, legend))
    write_video(path, np.stack(pictures), fps=VIDEO_FPS)


def _beside(
    original: Image.Image, painted: Image.Image, title: str, segment: str, legend: list[tuple[str | None, str]]
) -> np.ndarray:
    """Two pictures of one size beside each other, with what stands above and below them."""
    width, height = original.size
    canvas = Image.new("RGB", (2 * width + 24, height + 96), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=17)
    for left, picture, text in ((8, original, title), (16 + width, painted, segment)):
        canvas.paste(picture, (left, 40))
        draw.text((left, 9), text, "black", font)
    _draw_legend(draw, legend, height + 46, ImageFont.load_default(size=14), canvas.width)
    return np.asarray(canvas)


def write_page(view: MergingView, path: Path) -> None:
    """One HTML file that needs nothing else: pointing at a token shows all tokens that became one with it."""
    fates, assignment = token_fates(view.merged).numpy(), view.merged.assignment.tolist()
    frames, spans = _resized(view.shown, MAX_SIDE), view.spans
    sizes = shown_sizes(view.merged, fates, view.sizes)
    survives = view.survives.cpu().numpy() if view.survives is not None else None
    figures = [_svg(lambda axes: draw_budget(axes, fates, view.merged, survives), 1.0 + 0.3 * (survives is not None))]
    if len(frames) > 1:
        curve = _svg(lambda axes: draw_similarity(axes, view.merged, view.similarity, view.threshold, spans), 1.6)
        figures.insert(0, curve)
    pictures = []
    for number, (start, stop) in enumerate(view.merged.segments):
        for frame in range(start, stop):
            name = f"segment {number + 1}, {segment_text((start, stop), spans)}" if frame == start else "&nbsp;"
            of_frame = {place: size for (of, place), size in sizes.items() if of == frame}
            markup = _frame_markup(frames[frame], fates[frame], assignment[frame], survives, view.grid, of_frame)
            markup += f"<figcaption>{numbers_text(*spans[frame])}</figcaption>"
            joined = "" if frame == stop - 1 else " on"
            pictures.append(f'<figure><h2 class="s{number % 2}{joined}">{name}</h2>{markup}</figure>')
    legend = "".join(f'<span><i style="background:{color}"></i>{name}</span>' for color, name in frame_legend(fates))
    merged, num_frames = view.merged, len(view.frames)
    summary = [
        f"{merged.num_input_tokens} tokens of {num_frames} frames in {len(merged.segments)} segments became",
        f"{merged.num_tokens} ({merged.num_tokens / merged.num_input_tokens:.1%}) after {view.method}.",
    ]
    if view.computed is not None:
        summary.append(f"The vision tower computed {view.computed.mean():.1%} of the patches in its later layers.")
    if survives is not None:
        summary.append(
            f"Stage 3, asked <q>{html.escape(view.question)}</q>, left {int(survives.sum())}: "
            "those that went have a dashed outline."
        )
    page = PAGE.format(
        title=html.escape(view.name),
        summary=" ".join(summary),
        legend=legend,
        figures="".join(figures),
        frames="".join(pictures),
        colors="".join(f"rect.f{int(fate)}{{fill:{COLORS[fate]}}}" for fate in (*KEPT, Fate.DROPPED))
        + "".join(f"rect.f{int(fate)}{{stroke:{COLORS[fate]}}}" for fate in KEPT),
        names=json.dumps({int(fate): name for fate, name in NAMES.items()}),
    )
    path.write_text(page, encoding="utf-8")


WRITERS: dict[str, Callable[[MergingView, Path], None]] = {
    ".png": write_picture,
    ".mp4": write_clip,
    ".html": write_page,
}


def writer_for(path: Path) -> Callable[[MergingView, Path], None]:
    """
    The function that writes a file of this name's kind.

    Raises:
        ValueError: If there is none.
    """
    if path.suffix.lower() not in WRITERS:
        raise ValueError(f"can't write {str(path)!r}: name a file that ends in {', '.join(WRITERS)}")
    return WRITERS[path.suffix.lower()]


def _resized(frames: np.ndarray, longest: int) -> np.ndarray:
    """(F, h, w, 3), no side longer than that."""
    height, width = frames.shape[1:3]
    if max(height, width) <= longest:
        return frames
    scale = longest / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in frames])


def _outlined(painted: np.ndarray, fates: np.ndarray, grid: tuple[int, int]) -> Image.Image:
    """A painted frame with outlines around the tokens that were kept."""
    picture = Image.fromarray(painted)
    draw = ImageDraw.Draw(picture)
    for position in np.flatnonzero(np.isin(fates, KEPT)):
        row, column = divmod(int(position), grid[1])
        # The first pixel that is painted as this cell, and the last.
        left, right = (-(-side * picture.width // grid[1]) for side in (column, column + 1))
        top, bottom = (-(-side * picture.height // grid[0]) for side in (row, row + 1))
        draw.rectangle([left, top, right - 1, bottom - 1], outline=COLORS[Fate(fates[position])], width=3)
    return picture


def _write_numbers(
    picture: Image.Image, numbers: dict[int, int], grid: tuple[int, int], font: ImageFont.FreeTypeFont
) -> None:
    """Into a frame's cells, by position."""
    draw = ImageDraw.Draw(picture)
    for position, number in numbers.items():
        left, top, width, height = cell(position, grid)
        middle = (left + width / 2) * picture.width, (top + height / 2) * picture.height
        draw.text(middle, str(number), "white", font, anchor="mm", stroke_width=1, stroke_fill="black")


def _draw_legend(
    draw: ImageDraw.ImageDraw, legend: list[tuple[str | None, str]], top: int, font: ImageFont.FreeTypeFont, width: int
) -> None:
    """The colours' names, in as many lines as they need, and text without a colour."""
    left = 8
    for color, name in legend:
        indent = 0 if color is None else 20
        length = indent + draw.textlength(name, font) + 18
        if left + length > width:
            left, top = 8, top + 22
        if color is not None:
            draw.rectangle([left, top, left + 14, top + 14], fill=color, outline="#999999")
        draw.text((left + indent, top - 2), name, "black", font)
        left += length


def _svg(draw: Callable, height: float) -> str:
    """A figure of one drawing, as markup."""
    figure = Figure(figsize=(10, height), layout="constrained")
    draw(figure.subplots())
    file = io.StringIO()
    figure.savefig(file, format="svg")
    return file.getvalue()[file.getvalue().index("<svg") :]


def _frame_markup(
    picture: np.ndarray,
    fates: np.ndarray,
    assignment: list[int],
    survives: np.ndarray | None,
    grid: tuple[int, int],
    sizes: dict[int, int],
) -> str:
    """A frame with one rectangle for each token; those that count for several in the attention say so."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=85)
    address = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    height, width = picture.shape[:2]
    boxes = []
    for place, (fate, target) in enumerate(zip(fates, assignment)):
        classes = f"f{int(fate)}"
        if fate in KEPT:
            classes += " kept" if survives is None or survives[target] else " kept gone"
        counts = f' data-n="{sizes[place]}"' if place in sizes else ""
        left, top, cell_width, cell_height = cell(place, grid)
        boxes.append(
            f'<rect class="{classes}" data-t="{target}" data-f="{int(fate)}"{counts} '
            f'x="{left * width:.2f}" y="{top * height:.2f}" '
            f'width="{cell_width * width:.2f}" height="{cell_height * height:.2f}"/>'
        )
    return (
        f'<svg viewBox="0 0 {width} {height}"><image href="{address}" width="{width}" height="{height}"/>'
        f"{''.join(boxes)}</svg>"
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}: what HoliTom merged</title><style>
body{{font:15px/1.45 system-ui,sans-serif;margin:1.5rem 2rem;color:#1b1b1b}}
h1{{font-size:1.35rem;margin:0}}
h2{{font-size:.75rem;font-weight:600;color:#fff;margin:0 0 4px;padding:1px 5px;white-space:nowrap;overflow:hidden}}
h2.s0{{background:#444}} h2.s1{{background:#8a8a8a}} h2.on{{margin-right:-8px}}
.frames{{display:grid;grid-template-columns:repeat(auto-fill,minmax(max(150px,10%),1fr));gap:8px;overflow:hidden}}
figure{{margin:0;min-width:0}} .drawn{{display:grid;grid-template-columns:repeat(auto-fit,minmax(600px,1fr));gap:1rem}}
figcaption{{font-size:.72rem;color:#666}} svg{{width:100%;height:auto;display:block}}
#bar{{position:sticky;top:0;background:#fffffff2;padding:.5rem 0;border-bottom:1px solid #ddd;z-index:1}}
.legend span{{margin-right:1.1rem;white-space:nowrap}} .legend i{{display:inline-block;width:.9em;height:.9em;
margin-right:.35em;vertical-align:-.08em;outline:1px solid #999}} #said{{min-height:1.45em;color:#444}}
rect[data-t]{{fill:#fff;fill-opacity:.6;stroke:none}} rect.f0{{fill-opacity:.75}} {colors}
rect.kept{{fill-opacity:.4;stroke-width:3}} rect.gone{{stroke-dasharray:6 6}}
rect.on{{fill-opacity:.1;stroke:#000;stroke-width:4}}
</style></head><body><h1>{title}</h1><p>{summary}</p>
<div id="bar"><div class="legend">{legend}</div>
<div id="said">Point at a token: all that became one with it are framed.</div></div>
<div class="drawn">{figures}</div><div class="frames">{frames}</div>
<script>
const names={names}, said=document.getElementById("said"), all=[...document.querySelectorAll("rect[data-t]")];
const groups=new Map(); for(const r of all){{const t=r.dataset.t;if(t>=0){{if(!groups.has(t))groups.set(t,[]);
groups.get(t).push(r);}}}}
let lit=[];
function clear(){{for(const r of lit)r.classList.remove("on");lit=[];}}
document.addEventListener("pointerover",e=>{{const r=e.target.closest&&e.target.closest("rect[data-t]");if(!r)return;
clear();const group=groups.get(r.dataset.t)||[r];lit=group;for(const g of group)g.classList.add("on");
const n=group.length;said.textContent=names[r.dataset.f]+(r.dataset.t>=0?": one of "+n+(n>1?" tokens":" token")+
" that became output token "+r.dataset.t:"")+(r.dataset.n?"; it counts for "+r.dataset.n:"");}});
</script></body></html>
"""
