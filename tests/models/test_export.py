"""torch.export of what has fixed shapes: steps on a compressed cache, and the decoder with stage 3."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import StaticCache

from holitom_hf import HoliTomConfig
from holitom_hf.sequence import inner_stage, packed_rows
from holitom_hf.sequence.inner_stage import InnerStage

from ..conftest import IDENTITY, VIDEO_TOKEN, make_prompt, make_video, pad_batch
from .subjects import SUBJECTS


class StepOnACache(nn.Module):
    """As transformers exports decoding: cache tensors are buffers, so the graph knows none of the numbers."""

    def __init__(self, model, cache: StaticCache):
        super().__init__()
        self.model, self.cache = model, cache
        for index, layer in enumerate(cache.layers):
            for name in ("keys", "values", "cumulative_length"):
                self.register_buffer(f"{name}_{index}", getattr(layer, name), persistent=False)

    def forward(self, input_ids, **kwargs):
        return self.model(input_ids=input_ids, cache=self.cache, use_cache=True, **kwargs).logits


# LLaVA-Video's decoder is LLaVA-OneVision's.
@pytest.mark.parametrize("subject", [name for name in SUBJECTS if name != "llava_video"], indirect=True)
@pytest.mark.parametrize("num_new", [1, 3])
@pytest.mark.parametrize("given", ["ids alone", "mask", "positions"])
def test_a_step_on_a_compressed_static_cache_is_exported(subject, num_new, given):
    model, settings = subject.model, subject.config.holitom_config
    prompt, video = subject.prompt(3, 4, 5, seed=1), subject.video(4, seed=2)
    new = subject.text(num_new, seed=3)
    whole = torch.cat([prompt, new])
    cache = StaticCache(model.config, max_cache_len=100)
    with torch.no_grad():
        model(**subject.inputs([prompt], [video]), cache=cache, use_cache=True)
        first = int(subject.positions(prompt, video)[..., -1].max()) + 1
        kwargs = {
            "ids alone": {},
            "mask": {"attention_mask": torch.ones(1, len(whole), dtype=torch.long)},
            "positions": {"position_ids": torch.arange(first, first + num_new)[None]},
        }[given]
        traced_with = subject.text(num_new, seed=4)[None]
        program = torch.export.export(StepOnACache(model, cache), (traced_with,), kwargs, strict=True)
        logits = program.module()(new[None], **kwargs)[0]
    expected = subject.logits(whole, video, settings, prompt_length=len(prompt))[-num_new:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_step_of_padded_rows_is_exported_with_the_mask(model, plain, settings):
    prompts, videos = [make_prompt(3, "video:4", n, seed=n) for n in (5, 2)], [make_video(4, seed=n) for n in (2, 3)]
    ids, mask = pad_batch(prompts)
    new = torch.stack([make_prompt(2, seed=6), make_prompt(2, seed=7)])
    cache = StaticCache(model.config, max_cache_len=100)
    given = {"attention_mask": torch.cat([mask, torch.ones_like(new)], 1)}
    with torch.no_grad():
        pixels = torch.stack(videos)
        model(input_ids=ids, attention_mask=mask, pixel_values_videos=pixels, cache=cache, use_cache=True)
        program = torch.export.export(StepOnACache(model, cache), (new.flip(0),), given, strict=True)
        logits = program.module()(new, **given)
    for row, (prompt, video) in enumerate(zip(prompts, videos)):
        whole = torch.cat([prompt, new[row]])
        expected = plain.logits(whole, [video], settings, prompt_length=len(prompt))[-2:]
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)


def test_a_decoder_with_stage_3_is_exported(model, plain):
    """What survives depends on the content, how much does not."""
    settings = HoliTomConfig(outer_method="none", inner_merge_layer=2)
    prompt = make_prompt(3, "video:4", 5, seed=1)
    is_video = prompt == VIDEO_TOKEN
    videos = [make_video(4, seed=seed) for seed in (5, 6)]
    inputs = []
    for video in videos:
        embeds = model.get_input_embeddings()(prompt).detach().clone()
        embeds[is_video] = plain.encode(video, settings).tokens
        stage = InnerStage(
            layer=2,
            past_mask=torch.ones(1, 0, dtype=torch.bool),
            mask=torch.ones(1, len(prompt), dtype=torch.bool),
            videos=[[is_video.nonzero()[:, 0]]],
            merge_ratio=settings.inner_merge_ratio,
            num_real=[len(prompt)],
            padding_side="left",
            query=torch.tensor([len(prompt) - 1]),
        )
        positions = torch.arange(len(prompt))[None]
        inputs.append({"inputs_embeds": embeds[None], "inner_stage": stage, "position_ids": positions})
    with torch.no_grad():
        program = torch.export.export(
            model.model.language_model, (), inputs[0] | {"use_cache": False}, strict=False
        ).module()
        for video, given in zip(videos, inputs):
            outputs = program(**given, use_cache=False)
            logits = model.lm_head(outputs.last_hidden_state)[0]
            survived = outputs.survivors.index[0]
            expected = plain.logits(prompt, [video], settings)
            assert len(survived) == len(prompt) - 33  # half of 65 video tokens, rounded to even, is 32
            torch.testing.assert_close(logits, expected[survived], atol=1e-5, rtol=1e-5)


class Prompt(nn.Module):
    """A prompt with a video, as the only inputs."""

    def __init__(self, model, **kwargs):
        super().__init__()
        self.model, self.kwargs = model, kwargs

    def forward(self, input_ids, pixel_values_videos):
        return self.model(input_ids=input_ids, pixel_values_videos=pixel_values_videos, **self.kwargs).logits


@pytest.mark.parametrize("strict", [False, True])
def test_a_prompt_of_which_nothing_is_compressed_is_exported(model, upstream, strict):
    prompt = make_prompt(3, "video:4", 5, seed=1)[None]
    traced_with, video = make_video(4, seed=2)[None], make_video(4, seed=3)[None]
    with torch.no_grad():
        module = Prompt(model, holitom_config=IDENTITY, use_cache=False)
        program = torch.export.export(module, (prompt, traced_with), strict=strict)
        logits = program.module()(prompt, video)
        expected = upstream(input_ids=prompt, pixel_values_videos=video).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("module", [inner_stage, packed_rows])
def test_code_of_a_checkpoint_may_be_run_beside_the_package_and_again(module):
    """transformers runs a checkpoint's files as modules of their own, and anew when they changed."""
    source = Path(module.__file__).read_text()
    for _ in range(2):
        exec(
            compile(source, module.__file__, "exec"), {"__name__": module.__name__, "__package__": module.__package__}
        )
