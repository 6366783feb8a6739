"""`exact_budget` in the models: the decoder gets as many tokens whatever a video shows, and the right ones."""

from dataclasses import replace

import pytest
import torch

from holitom_hf import HoliTomConfig, HoliTomLlavaOnevisionConfig, HoliTomLlavaOnevisionForConditionalGeneration
from holitom_hf.merging.budget import newline_budget, token_budget

from .. import conftest
from . import llava_video, qwen


SETTINGS = HoliTomConfig(retention_ratio=0.35, similarity_threshold=0.3, inner_merge_layer=None, exact_budget=True)
FRAMES = 4


def contents(make) -> list:
    """A picture that does not change, one with a cut, noise."""
    still, cut, noise = (make(seed) for seed in (1, 2, 3))
    frame = len(still) // FRAMES
    noise = torch.randn(noise.shape, generator=torch.Generator().manual_seed(4))
    return [still[:frame].repeat(FRAMES, *(1,) * (still.ndim - 1)), cut, noise]


def onevision():
    torch.manual_seed(0)
    config = HoliTomLlavaOnevisionConfig(**conftest.SMALL, holitom_config=SETTINGS)
    model = HoliTomLlavaOnevisionForConditionalGeneration(config).eval()
    videos = contents(lambda seed: conftest.make_video(FRAMES, seed=seed))
    ids = conftest.make_prompt(3, f"video:{FRAMES}", 8)
    inputs = [{"input_ids": ids[None], "pixel_values_videos": video[None]} for video in videos]
    return model, inputs, 11 + 1, token_budget(SETTINGS, FRAMES, conftest.TOKENS_PER_FRAME)


def llava_video_model():
    model = llava_video.small_model(**SETTINGS.to_dict())
    videos = contents(lambda seed: llava_video.video(FRAMES, seed=seed))
    ids = llava_video.prompt(3, f"video:{FRAMES}", 8)
    inputs = [{"input_ids": ids[None], "pixel_values_videos": video[None]} for video in videos]
    budget = token_budget(SETTINGS, FRAMES, 9)
    return model, inputs, 11, budget + newline_budget(budget, FRAMES, 3)


def qwen_model(name):
    def make():
        torch.manual_seed(0)
        family, grid = qwen.FAMILIES[name], (FRAMES, 6, 8)
        config = family.ours("Config")(**family.values, holitom_config=SETTINGS)
        ids = qwen.make_prompt(3, grid, 8, is_timed=family.is_timed)
        inputs = [
            qwen.inputs_of([ids], [(grid, patches)]) for patches in contents(lambda s: qwen.make_patches(grid, s))
        ]
        num_text = int((ids != qwen.VIDEO).sum())
        return family.generation(config).eval(), inputs, num_text, token_budget(SETTINGS, FRAMES, 12)

    return make


BACKBONES = {"llava_onevision": onevision, "llava_video": llava_video_model} | {
    name: qwen_model(name) for name in qwen.FAMILIES
}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_decoder_gets_the_same_number_whatever_is_shown(backbone):
    model, inputs, num_text, budget = BACKBONES[backbone]()
    lengths = []

    def look(module, args, kwargs):
        lengths.append(kwargs["inputs_embeds"].shape[1])

    model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        for settings in ({}, {"position_ids": "kept", "proportional_attention": True}):
            outputs = [model(**video, holitom_config=settings) for video in inputs]
            assert lengths == [num_text + budget] * 3
            assert [output.merged_videos[0][0].num_tokens for output in outputs] == [budget] * 3
            lengths.clear()
        for video in inputs:
            model(**video, holitom_config={"exact_budget": False})
        assert len(set(lengths)) > 1, "what is shown makes a difference otherwise"
        layer = qwen.FAMILIES[backbone].layers[0] if backbone in qwen.FAMILIES else 2
        inside = [model(**video, holitom_config={"inner_merge_layer": layer}).inner_keep[0] for video in inputs]
    assert len({len(keep) for keep in inside}) == 1


@pytest.mark.parametrize("ratio", [0.1, 0.9])
def test_logits_are_those_of_the_plain_loop(subject, ratio):
    """Of rows of different length in a batch; tokens come back at 0.9, go at 0.1."""
    settings = replace(SETTINGS, retention_ratio=ratio, inner_merge_layer=2)
    prompts = [subject.prompt(3, 4, 8, seed=1), subject.prompt(2, 5, 3, seed=2)]
    # What comes back stands beside a mean that it is in: of some videos stage 3 has ties, which rounding decides.
    videos = [subject.video(4, seed=3), subject.video(5, seed=5)]
    with torch.no_grad():
        together = subject.model(**subject.inputs(prompts, videos), holitom_config=settings).logits[:, -1]
    for row, (ids, video) in enumerate(zip(prompts, videos)):
        with torch.no_grad():
            alone = subject.model(**subject.inputs([ids], [video]), holitom_config=settings).logits[0]
        expected = subject.logits(ids, video, settings)
        torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together[row], expected[-1], atol=1e-4, rtol=1e-4)


def test_generation_goes_on_with_its_cache_as_without_one(subject):
    settings = replace(SETTINGS, inner_merge_layer=2)
    inputs = subject.inputs([subject.prompt(3, 4, 8, seed=1)], [subject.video(4, seed=3)])
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "holitom_config": settings}
    assert torch.equal(
        subject.model.generate(**inputs, **options), subject.model.generate(**inputs, **options, use_cache=False)
    )
