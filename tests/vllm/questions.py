"""Questions about drawn clips as both sides of the comparison ask them: frames in memory, and the whole prompt."""

from collections.abc import Iterator

import numpy as np

from holitom_hf.bundled.questions import NUM_FRAMES, draw_set, uniform_times


SIDE = 112  # of the bundled model's frames
PROMPT = "<|im_start|>user {video}\n{question}<|im_end|><|im_start|>assistant\n"


def prompt_of(question: str, num_videos: int = 1) -> str:
    """As the bundled model's chat template writes it."""
    return PROMPT.format(video="<video>" * num_videos, question=question)


def drawn_questions(number: int) -> Iterator[tuple[np.ndarray, str, str]]:
    """Frames (F, H, W, 3) of uint8, the question, and its right answer."""
    for clip, questions in draw_set(number):
        frames = clip.render(uniform_times(clip.num_frames or NUM_FRAMES), SIDE)
        for question in questions:
            yield frames, question.text, question.answer
