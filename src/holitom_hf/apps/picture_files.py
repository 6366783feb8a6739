"""A video before and after merging, as a picture, a video or a page."""

import base64
import html
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from ..answering.answerer import Answerer
from ..configuration import HoliTomConfig
from ..merging.merged_video import MergedVideo
from ..merging.outer import merge_video_tokens
from ..merging.segmentation import frame_similarity
from ..video.encoding import write_video
from .visualization import (
    COLORS,
    KEPT,
    NAMES,
    Fate,
    draw_budget,
    draw_similarity,
    paint_frame,
    plot_merging,
    token_fates,
)


MAX_SIDE = 384  # pixels of a frame in a picture or a page
VIDEO_SIDE = 448  # pixels of a frame's shorter side in a video
VIDEO_FPS = 2


@dataclass
class MergingView:
    """
    A video and what stages 1 and 2 did to it.

    Attributes:
        name: Of the video.
        frames: (F, H, W, 3) uint8, as decoded.
        merged: The tokens.
        similarity: (F-1, T) cosine similarity of neighbouring frames' tokens.
        threshold: Above which they count as the same.
    """

    name: str
    frames: np.ndarray
    merged: MergedVideo
    similarity: torch.Tensor
    threshold: float


@torch.inference_mode()
def merge_frames(answerer: Answerer, frames: torch.Tensor, settings: HoliTomConfig) -> MergingView:
    """
    Encodes and merges a video; the decoder is not run.

    Args:
        answerer: With its weights loaded.
        frames: (F, 3, H, W) uint8.
        settings: What to merge by.

    Raises:
        ValueError: If the settings merge nothing.
    """
    if not settings.has_outer_stage:
        raise ValueError("outer_method is 'none': before the decoder nothing is merged that could be shown")
    model = answerer.model
    pixels = answerer.processor.video_processor(frames, return_tensors="pt")["pixel_values_videos"]
    pixels = pixels.to(model.device, model.dtype)
    encoded = model.get_video_features(pixels, vision_batch_size=32, holitom_config=settings, return_dict=True)
    importance = encoded.importance[0]
    features = encoded.pooler_output[0]
    tokens = features[:-1].view(*importance.shape, -1)
    keys = encoded.attention_keys[0] if encoded.attention_keys is not None else None
    merged = merge_video_tokens(tokens, importance, settings, newline=features[-1], keys=keys)
    pictures = frames.permute(0, 2, 3, 1).cpu().numpy()
    return MergingView("video", pictures, merged, frame_similarity(tokens), settings.similarity_threshold)


def view_merging(answerer: Answerer, video: str, num_frames: int | None = None) -> MergingView:
    """
    Decodes, encodes and merges a video with the model's own settings.

    Args:
        answerer: With its weights loaded.
        video: Path or URL.
        num_frames: Frames to take; `None`: at most the processor's.

    Raises:
        OSError, ValueError: If the video can't be read or has fewer frames, or the settings merge nothing.
    """
    (frames,), _ = answerer.processor.video_processor.decode(video, num_frames=num_frames)
    return replace(merge_frames(answerer, frames, answerer.config.holitom_config), name=Path(video).name)


def figure_of(view: MergingView) -> Figure:
    """Everything in one figure; see [`plot_merging`]."""
    return plot_merging(view.merged, _resized(view.frames, MAX_SIDE), view.similarity, view.threshold)


def write_picture(view: MergingView, path: Path) -> None:
    """The figure as a PNG."""
    figure_of(view).savefig(path, dpi=150)


def write_clip(view: MergingView, path: Path) -> None:
    """A H.264 video, two frames a second: each frame beside what became of its tokens."""
    scale = VIDEO_SIDE / min(view.frames.shape[1:3])
    fates = token_fates(view.merged).numpy()
    segment_of = [number for number, (start, stop) in enumerate(view.merged.segments) for _ in range(start, stop)]
    font = ImageFont.load_default(size=17)
    pictures = []
    for number, frame in enumerate(view.frames):
        size = tuple(2 * round(side * scale / 2) for side in frame.shape[1::-1])
        original = Image.fromarray(frame).resize(size)
        painted = _outlined(paint_frame(np.asarray(original), fates[number]), fates[number])
        canvas = Image.new("RGB", (2 * size[0] + 24, size[1] + 96), "white")
        canvas.paste(original, (8, 40))
        canvas.paste(painted, (16 + size[0], 40))
        draw = ImageDraw.Draw(canvas)
        num_kept = int(np.isin(fates[number], KEPT).sum())
        start, stop = view.merged.segments[segment_of[number]]
        draw.text((8, 9), f"frame {number} of {len(view.frames)}", "black", font)
        text = (
            f"segment {segment_of[number] + 1}, frames {start}-{stop - 1}: {num_kept} of {fates.shape[1]} tokens kept"
        )
        draw.text((16 + size[0], 9), text, "black", font)
        _draw_legend(draw, size[1] + 46, ImageFont.load_default(size=14), canvas.width)
        pictures.append(np.asarray(canvas))
    write_video(path, np.stack(pictures), fps=VIDEO_FPS)


def write_page(view: MergingView, path: Path) -> None:
    """One HTML file that needs nothing else: pointing at a token shows all tokens that became one with it."""
    fates, assignment = token_fates(view.merged).numpy(), view.merged.assignment.tolist()
    frames = _resized(view.frames, MAX_SIDE)
    figures = [_svg(lambda axes: draw_budget(axes, fates, view.merged), 1.0)]
    if len(frames) > 1:
        curve = _svg(lambda axes: draw_similarity(axes, view.merged, view.similarity, view.threshold), 1.6)
        figures.insert(0, curve)
    segments = []
    for number, (start, stop) in enumerate(view.merged.segments):
        pictures = "".join(
            _frame_markup(frame, frames[frame], fates[frame], assignment[frame]) for frame in range(start, stop)
        )
        span = f"frame {start}" if stop - start == 1 else f"frames {start}-{stop - 1}"
        segments.append(f"<section><h2>segment {number + 1}, {span}</h2><div class=row>{pictures}</div></section>")
    legend = "".join(
        f'<span><i style="background:{COLORS[fate]}"></i>{NAMES[fate]}</span>' for fate in map(Fate, (1, 2, 3, 4, 0))
    )
    share = view.merged.num_tokens / view.merged.num_input_tokens
    page = PAGE.format(
        title=html.escape(view.name),
        summary=f"{view.merged.num_input_tokens} tokens of {len(frames)} frames in {len(view.merged.segments)} "
        f"segments became {view.merged.num_tokens} ({share:.1%}).",
        legend=legend,
        figures="".join(figures),
        segments="".join(segments),
        colors="".join(f".f{int(fate)}{{fill:{color}}}" for fate, color in COLORS.items()),
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


def _outlined(painted: np.ndarray, fates: np.ndarray) -> Image.Image:
    """A painted frame with outlines around the tokens that were kept."""
    picture = Image.fromarray(painted)
    draw = ImageDraw.Draw(picture)
    side = math.isqrt(len(fates))
    for position in np.flatnonzero(np.isin(fates, KEPT)):
        row, column = divmod(int(position), side)
        box = [
            column * picture.width // side,
            row * picture.height // side,
            (column + 1) * picture.width // side - 1,
            (row + 1) * picture.height // side - 1,
        ]
        draw.rectangle(box, outline=COLORS[Fate(fates[position])], width=3)
    return picture


def _draw_legend(draw: ImageDraw.ImageDraw, top: int, font, width: int) -> None:
    """The colours' names, in as many lines as they need."""
    left = 8
    for fate in map(Fate, (1, 2, 3, 4, 0)):
        length = 20 + draw.textlength(NAMES[fate], font) + 18
        if left + length > width:
            left, top = 8, top + 22
        draw.rectangle([left, top, left + 14, top + 14], fill=COLORS[fate])
        draw.text((left + 20, top - 2), NAMES[fate], "black", font)
        left += length


def _svg(draw: Callable, height: float) -> str:
    """A figure of one drawing, as markup."""
    figure = Figure(figsize=(10, height), layout="constrained")
    draw(figure.subplots())
    file = io.StringIO()
    figure.savefig(file, format="svg")
    return file.getvalue()[file.getvalue().index("<svg") :]


def _frame_markup(number: int, picture: np.ndarray, fates: np.ndarray, assignment: list[int]) -> str:
    """A frame with one rectangle for each token."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=85)
    address = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    side = math.isqrt(len(fates))
    height, width = picture.shape[:2]
    boxes = "".join(
        f'<rect class="f{int(fate)}{" kept" if fate in KEPT else ""}" data-t="{target}" data-f="{int(fate)}" '
        f'x="{place % side * width / side:.2f}" y="{place // side * height / side:.2f}" '
        f'width="{width / side:.2f}" height="{height / side:.2f}"/>'
        for place, (fate, target) in enumerate(zip(fates, assignment))
    )
    return (
        f'<figure><svg viewBox="0 0 {width} {height}"><image href="{address}" width="{width}" height="{height}"/>'
        f"{boxes}</svg><figcaption>{number}</figcaption></figure>"
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}: what HoliTom merged</title><style>
body{{font:15px/1.45 system-ui,sans-serif;margin:1.5rem auto;max-width:1200px;padding:0 1rem;color:#1b1b1b}}
h1{{font-size:1.35rem;margin:0}}
h2{{font-size:.95rem;margin:1.1rem 0 .35rem;border-top:2px solid #444;padding-top:.35rem}}
.row{{display:grid;grid-template-columns:repeat(auto-fill,minmax(135px,1fr));gap:7px}} figure{{margin:0}}
figcaption{{font-size:.72rem;color:#666}} svg{{width:100%;height:auto;display:block}}
#bar{{position:sticky;top:0;background:#fffffff2;padding:.5rem 0;border-bottom:1px solid #ddd;z-index:1}}
.legend span{{margin-right:1.1rem;white-space:nowrap}} .legend i{{display:inline-block;width:.9em;height:.9em;
margin-right:.35em;vertical-align:-.08em}} #said{{min-height:1.45em;color:#444}}
rect[data-t]{{fill-opacity:.36;stroke:none}} rect.f0{{fill-opacity:.74}} {colors}
rect.kept{{stroke:#fff;stroke-width:2}} rect.on{{fill-opacity:.1;stroke:#000;stroke-width:4}}
</style></head><body><h1>{title}</h1><p>{summary}</p>
<div id="bar"><div class="legend">{legend}</div>
<div id="said">Point at a token: all that became one with it are framed.</div></div>{figures}{segments}
<script>
const names={names}, said=document.getElementById("said"), all=[...document.querySelectorAll("rect[data-t]")];
const groups=new Map(); for(const r of all){{const t=r.dataset.t;if(t>=0){{if(!groups.has(t))groups.set(t,[]);
groups.get(t).push(r);}}}}
let lit=[];
function clear(){{for(const r of lit)r.classList.remove("on");lit=[];}}
document.addEventListener("pointerover",e=>{{const r=e.target.closest&&e.target.closest("rect[data-t]");if(!r)return;
clear();const group=groups.get(r.dataset.t)||[r];lit=group;for(const g of group)g.classList.add("on");
const n=group.length;said.textContent=names[r.dataset.f]+(r.dataset.t>=0?": one of "+n+(n>1?" tokens":" token")+
" that became output token "+r.dataset.t:"");}});
</script></body></html>
"""
