"""Small models made in memory; nothing is downloaded."""

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from holitom_hf import HoliTomConfig, HoliTomLlavaOnevisionConfig, HoliTomLlavaOnevisionForConditionalGeneration
from holitom_hf.apps.demo import write_clip
from holitom_hf.bundled.tiny_model import tiny_model, tiny_processor

from .reference import PlainModel


# The same cases in every run, however slow the machine; `--fuzz-cases` other than the default draws new ones.
hypothesis_settings.register_profile(
    "suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis_settings.load_profile("suite")

IMAGE_TOKEN, VIDEO_TOKEN, PAD = 118, 119, 0
SIDE, TOKENS_PER_FRAME = 32, 16
FUZZ_CASES = 500
SMALL = {
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 4,
        "vision_use_head": False,
    },
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": 120,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": PAD,
    },
    "image_token_index": IMAGE_TOKEN,
    "video_token_index": VIDEO_TOKEN,
    "image_grid_pinpoints": [[SIDE, SIDE], [SIDE, 2 * SIDE]],
}
IDENTITY = HoliTomConfig(retention_ratio=1.0, inner_merge_layer=None)


@pytest.fixture(scope="session")
def settings() -> HoliTomConfig:
    """All three stages, at a depth that the small decoder has."""
    return HoliTomConfig(retention_ratio=0.3, inner_merge_layer=2)


@pytest.fixture(scope="session")
def model(settings) -> HoliTomLlavaOnevisionForConditionalGeneration:
    torch.manual_seed(0)
    config = HoliTomLlavaOnevisionConfig(**SMALL, holitom_config=settings)
    model = HoliTomLlavaOnevisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # logits far enough apart that no test hangs on a tie
            parameter.mul_(1.5 if parameter.ndim > 1 else 1.0)
    return model


@pytest.fixture(scope="session")
def upstream(model) -> LlavaOnevisionForConditionalGeneration:
    """Upstream's class with the same weights."""
    upstream = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**SMALL)).eval()
    upstream.load_state_dict(model.state_dict())
    return upstream


@pytest.fixture(scope="session")
def plain(model) -> PlainModel:
    return PlainModel(model)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder with clip.mp4 and a model of the bundled one's architecture with random weights."""
    folder = tmp_path_factory.mktemp("demo")
    write_clip(folder / "clip.mp4")
    processor = tiny_processor(num_frames=32)
    processor.save_pretrained(folder / "model")
    tiny_model(processor.tokenizer).save_pretrained(folder / "model")
    return folder


def make_video(num_frames: int, seed: int, num_scenes: int = 2, change: float = 0.2) -> torch.Tensor:
    """(F, 3, H, W): scenes that are mostly still, with a part that changes in every frame."""
    random = torch.Generator().manual_seed(seed)
    scenes = torch.randn(num_scenes, 3, SIDE, SIDE, generator=random)
    frames = torch.stack([scenes[f * num_scenes // num_frames] for f in range(num_frames)])
    frames = frames + change * torch.randn(frames.shape, generator=random)
    frames[:, :, : SIDE // 2, : SIDE // 2] = torch.randn(num_frames, 3, SIDE // 2, SIDE // 2, generator=random)
    return frames


def make_prompt(*parts: int | str, seed: int = 0) -> torch.Tensor:
    """(L,) ids of a prompt: a number stands for that many text tokens, "video:F" for a video of F frames."""
    random = torch.Generator().manual_seed(seed)
    ids = []
    for part in parts:
        if isinstance(part, int):
            ids.append(torch.randint(3, 110, (part,), generator=random))
        elif part.startswith("video:"):
            ids.append(torch.full((int(part.split(":")[1]) * TOKENS_PER_FRAME + 1,), VIDEO_TOKEN))
        else:
            ids.append(torch.full((int(part.split(":")[1]),), IMAGE_TOKEN))
    return torch.cat(ids)


def pad_batch(prompts: list[torch.Tensor], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of prompts of different lengths."""
    length = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), length), PAD), torch.zeros((len(prompts), length), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(length - len(prompt), None) if side == "left" else slice(0, len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # one of several processes, each on a processor of its own
        torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz-cases", type=int, default=FUZZ_CASES, help="random cases that tests/test_fuzzing.py tries"
    )
