"""What the small Qwen2.5-VL is asked, on both sides of the comparison."""

from dataclasses import dataclass

import numpy as np

from .questions import QWEN_PROMPT, drawn_questions, metadata_of


SHOWN = "<|vision_start|><|{kind}_pad|><|vision_end|>"
RATES = (2.0, 1.0, 3.0, 0.7)  # frames a second, so that times of patches differ, and are rounded
NUM_FRAMES = 14  # as many as vLLM makes room for where a step has few tokens
RATIOS = (1.0, 0.25, 0.15, 0.05)


@dataclass
class Request:
    """
    A prompt and what it shows.

    Attributes:
        prompt: As text.
        videos: Frames (F, H, W, 3) of uint8 of each, and its frames a second.
        images: (H, W, 3) of uint8.
    """

    prompt: str
    videos: list[tuple[np.ndarray, float]]
    images: list[np.ndarray]

    @property
    def metadata(self) -> list[dict]:
        """Of the videos, whose frames are all taken."""
        return [
            metadata_of(frames) | {"fps": rate, "duration": len(frames) / rate, "do_sample_frames": False}
            for frames, rate in self.videos
        ]


def request_of(question: str, kinds: str, videos: list[tuple[np.ndarray, float]], images: list | tuple = ()):
    """`kinds`: in the prompt's order, v for a video and i for an image."""
    shown = "".join(SHOWN.format(kind={"v": "video", "i": "image"}[kind]) for kind in kinds)
    prompt = QWEN_PROMPT.replace(SHOWN.format(kind="video"), shown).format(question=question)
    return Request(prompt, videos, list(images))


def drawn_requests(number: int) -> list[Request]:
    """A video each, at rates that take turns."""
    return [
        request_of(question, "v", [(frames[:NUM_FRAMES], RATES[index % len(RATES)])])
        for index, (frames, question, _) in enumerate(drawn_questions(number))
    ]


def mixed_requests() -> list[Request]:
    """Frames that are no square, two videos, and images before and behind a video."""
    (first, question, _), *_, (second, other, _) = drawn_questions(9)
    first, second = first[:NUM_FRAMES], second[:NUM_FRAMES]
    wide, image = first[:, 16:96], second[3, :, :64]
    return [
        request_of(question, "v", [(wide, 1.0)]),
        request_of(question, "vv", [(first, 2.0), (second[:9], 0.7)]),
        request_of(question, "iv", [(second, 1.0)], [image]),
        request_of(other, "vi", [(wide, 3.0)], [image]),
    ]
