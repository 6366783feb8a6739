"""A small model of each backbone with its plain loop, and prompts with videos as it takes them."""

import torch

from .. import conftest
from . import llava_video, qwen
from .qwen import PlainQwen2_5, seconds_of


SUBJECTS = ("llava_onevision", "llava_video", "qwen2_5_vl", "qwen3_vl")


class LlavaSubject:
    """
    LLaVA-OneVision.

    Attributes:
        model, plain: With random weights, and the plain loop over them.
        tower: What the vision tower is called.
        parts: Modules beside tower and decoder.
    """

    name, tower, parts = "llava_onevision", "vision_tower", ("model.multi_modal_projector", "model.image_newline")

    def __init__(self, model, plain):
        self.model, self.plain, self.config = model, plain, model.config

    def prompt(self, before: int, num_frames: int, after: int, seed: int = 0) -> torch.Tensor:
        """(L,) ids: text, a video, text."""
        return conftest.make_prompt(before, f"video:{num_frames}", after, seed=seed)

    def text(self, length: int, seed: int) -> torch.Tensor:
        """(L,) ids."""
        return conftest.make_prompt(length, seed=seed)

    def video(self, num_frames: int, seed: int):
        """Of so many of the method's frames, as `inputs` takes it."""
        return conftest.make_video(num_frames, seed=seed)

    def inputs(self, prompts: list[torch.Tensor], videos: list) -> dict:
        """A batch, padded on the left, with a video for each prompt."""
        ids, mask = conftest.pad_batch(prompts)
        inputs = {"input_ids": ids, "pixel_values_videos": videos}
        if len({len(video) for video in videos}) == 1:
            inputs["pixel_values_videos"] = torch.stack(videos)
        return inputs if mask.all() else inputs | {"attention_mask": mask}

    def logits(self, ids: torch.Tensor, video, settings, prompt_length: int | None = None) -> torch.Tensor:
        """The plain loop's, (L, vocabulary), of one prompt."""
        return self.plain.logits(ids, [video], settings, prompt_length)

    def positions(self, ids: torch.Tensor, video) -> torch.Tensor:
        """(L,) or (3, L), of one prompt as upstream counts."""
        return torch.arange(len(ids))


class LlavaVideoSubject(LlavaSubject):
    """LLaVA-Video, with newlines behind rows."""

    name = "llava_video"

    def __init__(self):
        model = llava_video.small_model()
        super().__init__(model, llava_video.PlainLlavaVideo(model))

    def prompt(self, before: int, num_frames: int, after: int, seed: int = 0) -> torch.Tensor:
        return llava_video.prompt(before, f"video:{num_frames}", after, seed=seed)

    def video(self, num_frames: int, seed: int):
        return llava_video.video(num_frames, seed)


class QwenSubject:
    """A Qwen-VL family; attributes and methods as in [`LlavaSubject`]."""

    tower, parts = "visual", ()

    def __init__(self, name: str):
        torch.manual_seed(0)
        self.name, family = name, qwen.FAMILIES[name]
        self.model = family.generation(family.ours("Config")(**family.values, holitom_config=qwen.ON)).eval()
        plain = PlainQwen2_5 if name == "qwen2_5_vl" else qwen.PlainQwen
        self.plain = plain(self.model, family.upstream, family.upstream.config_class(**family.values))
        self.config = self.model.config

    def prompt(self, before: int, num_frames: int, after: int, seed: int = 0) -> torch.Tensor:
        return qwen.make_prompt(before, (num_frames, 6, 8), after, seed=seed, is_timed=self.name == "qwen3_vl")

    def text(self, length: int, seed: int) -> torch.Tensor:
        return qwen.make_prompt(length, seed=seed)

    def video(self, num_frames: int, seed: int):
        return qwen.video((num_frames, 6, 8), seed)

    def inputs(self, prompts: list[torch.Tensor], videos: list) -> dict:
        inputs = qwen.inputs_of(prompts, videos)
        if self.name == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = seconds_of(inputs["video_grid_thw"])
        return inputs

    def logits(self, ids: torch.Tensor, video, settings, prompt_length: int | None = None) -> torch.Tensor:
        return self.plain.logits(ids, [self.plain.encode(*video, settings)], settings, prompt_length, [video])

    def positions(self, ids: torch.Tensor, video) -> torch.Tensor:
        inputs = self.inputs([ids], [video])
        counted = {name: inputs[name] for name in ("video_grid_thw", "second_per_grid_ts") if name in inputs}
        rope_index = self.plain.upstream.model.get_rope_index
        return rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], **counted)[0][:, 0]
