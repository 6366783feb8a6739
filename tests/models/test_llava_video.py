"""LLaVA-Video against plain operations over upstream's weights: as its authors run it, and compressed."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    DynamicCache,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)
from typer.testing import CliRunner

from holitom_hf import (
    HoliTomConfig,
    HoliTomLlavaVideoConfig,
    HoliTomLlavaVideoForConditionalGeneration,
    HoliTomLlavaVideoModel,
)
from holitom_hf.apps.command_line.app import app
from holitom_hf.benchmarking.exact_flops import forward_flops, plan_video
from holitom_hf.merging import METHODS, merge_video_tokens
from holitom_hf.models.llava_video.layout import VideoLayout
from holitom_hf.models.registry import backbone_of, encoder_operations
from holitom_hf.models.upstream import cache_of

from ..checkpoints import test_checkpoint
from ..conftest import IDENTITY, make_prompt, pad_batch
from ..reference import PlainGenerator, PlainVideo
from ..videos import write_video
from .llava_video import LAYOUTS, ON, SIDE, VALUES, PlainLlavaVideo, prompt, save, small_model, small_processor, video


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
GREEDY = {"max_new_tokens": 5, "do_sample": False}
SETTINGS = {
    "all stages": ON,
    "stages 1 and 2": replace(ON, inner_merge_layer=None),
    "stage 3 alone": replace(ON, retention_ratio=1.0),
    "contextual tokens": replace(ON, contextual_ratio=0.4, retention_ratio=0.5),
    "places and sizes": replace(ON, position_ids="kept", proportional_attention=True),
    "nearly all, with sizes": replace(ON, retention_ratio=0.95, similarity_threshold=0.9, proportional_attention=True),
    "prune": replace(ON, inner_method="prune"),
    "exact budget": replace(ON, exact_budget=True, retention_ratio=0.15),
    "exact budget, places and sizes": replace(
        ON, exact_budget=True, retention_ratio=0.95, position_ids="kept", proportional_attention=True
    ),
}


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def plain(model):
    return PlainLlavaVideo(model)


def test_sizes_are_those_of_the_published_model():
    """27 patches along a side; the issue's numbers."""
    sizes = {
        (mode, newlines): VideoLayout(27, mode, 2, newlines).num_tokens(64)
        for mode in ("bilinear", "average", "max")
        for newlines in ("grid", "one_token")
    }
    assert sizes["average", "grid"] == sizes["max", "grid"] == 64 * 13 * 14 == 64 * 182
    assert sizes["bilinear", "grid"] == 64 * 14 * 15
    assert sizes["average", "one_token"] == 64 * 169 + 1
    assert sizes["bilinear", "one_token"] == 64 * 196 + 1


class TestAsItsAuthorsRunIt:
    @pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
    def test_logits_are_those_of_pooling_newlines_and_prompt_by_hand(self, layout):
        model = small_model(*layout)
        plain = PlainLlavaVideo(model)
        prompts = [prompt(3, "video:4", 5, layout=layout), prompt(2, "video:2", 3, layout=layout, seed=1)]
        videos = [video(4, seed=1), video(2, seed=2)]
        ids, mask = pad_batch(prompts)
        with torch.no_grad():
            ours = model(input_ids=ids, attention_mask=mask, pixel_values_videos=videos, holitom_config=IDENTITY)
        assert ours.merged_videos is None
        for row in range(2):
            expected = plain.logits(prompts[row], [videos[row]], IDENTITY)
            torch.testing.assert_close(ours.logits[row][mask[row].bool()], expected, **CLOSE)

    def test_its_decoder_is_upstreams_to_the_bit(self, model, plain):
        """Over the same embeddings: what stands between pixels and decoder is all that differs."""
        ids, frames = prompt(3, "video:4", 5), video(4, seed=1)
        features = model.get_video_features(frames[None], holitom_config=IDENTITY).pooler_output
        upstream = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**VALUES)).eval()
        upstream.load_state_dict(model.state_dict())
        with torch.no_grad():
            embeds = upstream.get_input_embeddings()(ids[None])
            embeds = embeds.masked_scatter((ids == model.config.video_token_id)[None, :, None], features)
            ours = model(input_ids=ids[None], pixel_values_videos=frames[None], holitom_config=IDENTITY).logits
            assert torch.equal(ours, upstream(inputs_embeds=embeds).logits)
        torch.testing.assert_close(features[0], plain.whole(plain.features(frames)), **CLOSE)

    def test_with_onevisions_layout_it_is_upstreams_onevision_to_the_bit(self):
        model = small_model("bilinear", "one_token")
        upstream = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**VALUES)).eval()
        upstream.load_state_dict(model.state_dict())
        ids = prompt(3, "video:4", 5, layout=("bilinear", "one_token"))
        inputs = {"input_ids": ids[None], "pixel_values_videos": video(4, seed=1)[None]}
        with torch.no_grad():
            assert torch.equal(model(**inputs, holitom_config=IDENTITY).logits, upstream(**inputs).logits)

    def test_other_strides(self):
        config = HoliTomLlavaVideoConfig(**VALUES, spatial_pool_stride=3, holitom_config=ON)
        model = HoliTomLlavaVideoModel(config)
        patches = torch.randn(2, 49, 8)
        grid = patches.view(2, 7, 7, 8).permute(0, 3, 1, 2)
        assert config.layout.num_tokens(2) == 2 * 2 * 3
        torch.testing.assert_close(model.apply_pooling(patches), F.avg_pool2d(grid, 3).flatten(2).mT)
        config.spatial_pool_mode = "bilinear"
        assert config.tokens_per_frame == 9
        expected = F.interpolate(grid, size=(3, 3), mode="bilinear").flatten(2).mT
        torch.testing.assert_close(model.apply_pooling(patches), expected)

    def test_images_are_onevisions(self, model, plain):
        images = {"pixel_values": torch.randn(1, 2, 3, SIDE, SIDE), "image_sizes": torch.tensor([[SIDE, SIDE]])}
        ids = make_prompt(4, f"image:{2 * 49 + 7}", 5)[None]
        with torch.no_grad():
            torch.testing.assert_close(
                model(input_ids=ids, **images).logits, plain.upstream(input_ids=ids, **images).logits
            )


class TestCompressed:
    @pytest.mark.parametrize("name", SETTINGS)
    def test_generation_of_a_padded_batch_of_videos_of_different_length(self, model, plain, name):
        prompts = [prompt(3, "video:6", 8, seed=1), prompt(2, "video:4", 3, seed=2)]
        videos = [[video(6, seed=3)], [video(4, seed=4, num_scenes=3)]]
        ids, mask = pad_batch(prompts)
        found = model.generate(
            input_ids=ids,
            attention_mask=mask,
            pixel_values_videos=[frames for row in videos for frames in row],
            holitom_config=SETTINGS[name],
            output_logits=True,
            return_dict_in_generate=True,
            **GREEDY,
        )
        generator = PlainGenerator.over(plain, prompts, videos, SETTINGS[name])
        expected = generator.generate(
            input_ids=ids,
            attention_mask=mask,
            output_logits=True,
            return_dict_in_generate=True,
            use_cache=False,
            **GREEDY,
        )
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE)

    @pytest.mark.parametrize("layout", [("bilinear", "grid"), ("max", "grid"), ("average", "one_token")], ids="-".join)
    @pytest.mark.parametrize("name", ["all stages", "stage 3 alone", "places and sizes"])
    def test_every_layout(self, layout, name):
        model = small_model(*layout)
        ids, frames = prompt(3, "video:5", 4, layout=layout), video(5, seed=5)
        with torch.no_grad():
            ours = model(input_ids=ids[None], pixel_values_videos=frames[None], holitom_config=SETTINGS[name])
        expected = PlainLlavaVideo(model).logits(ids, [frames], SETTINGS[name])
        torch.testing.assert_close(ours.logits[0], expected, **CLOSE)

    def test_stage_3_alone_keeps_all_newlines_in_the_prompt(self, model):
        ids, frames = prompt(3, "video:5", 4), video(5, seed=5)
        with torch.no_grad():
            outputs = model(
                input_ids=ids[None], pixel_values_videos=frames[None], holitom_config=SETTINGS["stage 3 alone"]
            )
        [[merged]] = outputs.merged_videos
        assert merged.num_tokens == 5 * 12
        assert merged.kind.view(5, 3, 4).eq(2).nonzero()[:, 2].tolist() == [3] * 15
        assert len(outputs.inner_keep[0]) == 7 + 30

    def test_settings_are_in_the_models_layout_whatever_they_say(self, model):
        assert ON.newline_position == "end"
        assert model.config.holitom_config.newline_position == "row"
        assert small_model("average", "one_token").config.holitom_config.newline_position == "end"
        config = HoliTomLlavaVideoConfig(**VALUES, holitom_config=ON)
        config.holitom_config = "llava-onevision-7b-r10"
        assert config.holitom_config.newline_position == "row"
        assert config.holitom_config.retention_ratio == 0.1
        config.holitom_config = {"retention_ratio": 0.2}
        assert config.holitom_config.newline_position == "row"

    @pytest.mark.parametrize("method", sorted(name for name, method in METHODS.items() if not method.needs_question))
    def test_every_method_with_rows(self, model, plain, method):
        """What the decoder gets is what the method makes of features and importance that were computed by hand."""
        settings = replace(ON, outer_method=method, retention_ratio=0.4, inner_merge_layer=None)
        ids, frames = prompt(3, "video:4", 4), video(4, seed=6)
        features, newline = plain.features(frames), plain.upstream.model.image_newline.detach()
        tower = plain.upstream.model.vision_tower
        layer = tower.encoder.layers[-1]
        states = tower(frames, output_hidden_states=True).hidden_states[-2]
        keys = layer.self_attn.k_proj(layer.layer_norm1(states)).unflatten(-1, (2, -1)).mean(2)
        merged = merge_video_tokens(
            features,
            plain.importance(frames),
            replace(settings, newline_position="row"),
            newline=newline,
            keys=plain.pooled(keys),
        )
        tokens = merged.embeddings
        assert (tokens == newline).all(1).sum() > 1
        encoded = [PlainVideo(tokens, 4 * 12, list(range(len(tokens))), [1] * len(tokens))]
        with torch.no_grad():
            ours = model(input_ids=ids[None], pixel_values_videos=frames[None], holitom_config=settings).logits[0]
            expected = plain.logits(ids, None, settings, encoded=encoded)
        torch.testing.assert_close(ours, expected, **CLOSE)

    def test_tokens_at_all_their_places_have_the_newlines_that_are_left(self, model):
        settings = replace(ON, outer_method="dymu_tokens", inner_method="none", virtual_unmerging=True)
        inputs = {"input_ids": prompt(3, "video:4", 4)[None], "pixel_values_videos": video(4, seed=6)[None]}
        with torch.no_grad():
            everything = model(**inputs, holitom_config=replace(settings, retention_ratio=0.999)).logits
            torch.testing.assert_close(everything, model(**inputs, holitom_config=IDENTITY).logits, **CLOSE)
            few = model(**inputs, holitom_config=replace(settings, retention_ratio=0.3))
        [[merged]] = few.merged_videos
        num_newlines = int(merged.kind.eq(2).sum())
        assert 0 < num_newlines < 4 * 3
        assert cache_of(few).get_seq_length() == 3 + 4 + 4 * 9 + num_newlines
        kwargs = {"do_sample": False, "max_new_tokens": 4, "holitom_config": settings}
        assert torch.equal(model.generate(**inputs, **kwargs), model.generate(**inputs, **kwargs, use_cache=False))

    def test_the_question(self, model):
        settings = replace(ON, outer_method="question_tokens", inner_merge_layer=None)
        ids, frames = prompt(3, "video:4", 4), video(4, seed=6)
        with torch.no_grad():
            [[merged]] = model(
                input_ids=ids[None], pixel_values_videos=frames[None], holitom_config=settings
            ).merged_videos
        assert merged.kind.eq(2).any()

    def test_two_videos_and_an_image_in_a_prompt_and_beams(self, model, plain):
        images = {"pixel_values": torch.randn(1, 2, 3, SIDE, SIDE), "image_sizes": torch.tensor([[SIDE, SIDE]])}
        ids = torch.cat([prompt(2, "video:4", 3), make_prompt(f"image:{2 * 49 + 7}"), prompt(1, "video:3", 5, seed=2)])
        videos = [video(4, seed=7), video(3, seed=8)]
        inputs = {"input_ids": ids[None], "pixel_values_videos": videos, **images}
        tokens, _ = plain.generate(ids, videos, ON, 4, images=images)
        found = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(found[0, len(ids) :], tokens)
        generator = PlainGenerator.over(plain, [ids], [videos], ON, images=[images])
        beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4}
        expected = generator.generate(input_ids=ids[None], use_cache=False, **beams)
        assert torch.equal(model.generate(**inputs, **beams), expected)

    def test_a_second_turn_brings_another_video(self, model, plain):
        past, first_video, second_video = DynamicCache(), video(4, seed=9), video(3, seed=10)
        start = prompt(3, "video:4", 5)
        first = model.generate(input_ids=start[None], pixel_values_videos=first_video[None], cache=past, **GREEDY)
        ids = torch.cat([first[0], prompt(2, "video:3", 4, seed=3)])
        second = model.generate(input_ids=ids[None], pixel_values_videos=second_video[None], cache=past, **GREEDY)
        encoded = [plain.encode(frames, ON) for frames in (first_video, second_video)]
        whole = ids
        for _ in range(5):
            logits = plain.logits(whole, None, ON, [len(start), len(ids)], encoded=encoded)
            whole = torch.cat([whole, logits[-1].argmax()[None]])
        assert torch.equal(second[0], whole)

    def test_changes_alone_in_the_tower(self, model):
        """With a threshold that nothing passes all is computed, and features are those of the whole tower."""
        ids, frames = prompt(3, "video:4", 4), video(4, seed=6)
        inputs = {"input_ids": ids[None], "pixel_values_videos": frames[None]}
        reuse = replace(ON, vision_reuse_layer=1, vision_reuse_threshold=1.0)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs, holitom_config=reuse).logits, model(**inputs).logits, **CLOSE)


class TestBadInput:
    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("spatial_pool_mode", "nearest", "spatial_pool_mode must be one of 'bilinear', 'average', 'max'"),
            ("newline_layout", "frame", "newline_layout must be one of 'one_token', 'grid', got 'frame'"),
            ("spatial_pool_stride", 0, "spatial_pool_stride must be an integer from 1 to 7, got 0"),
            ("spatial_pool_stride", 8, "spatial_pool_stride must be an integer from 1 to 7, got 8"),
        ],
    )
    def test_a_field_out_of_range_is_named(self, field, value, message):
        with pytest.raises(ValueError, match=message):
            HoliTomLlavaVideoConfig(**VALUES, **{field: value})

    def test_placeholders_of_another_layout_are_refused_before_anything_is_computed(self, model, monkeypatch):
        monkeypatch.setattr(type(model.model.vision_tower), "forward", None)
        ids = prompt(3, "video:4", 4, layout=("average", "one_token"))
        with pytest.raises(ValueError, match="has 37 video placeholders, but its videos need 48"):
            model(input_ids=ids[None], pixel_values_videos=video(4, seed=1)[None])


class TestCheckpoints:
    @pytest.fixture(scope="class")
    def folder(self, model, tmp_path_factory):
        folder = tmp_path_factory.mktemp("llava_video")
        model.save_pretrained(folder)
        small_processor().save_pretrained(folder)
        return folder

    @pytest.fixture(scope="class")
    def inputs(self):
        return {"input_ids": prompt(3, "video:5", 6)[None], "pixel_values_videos": video(5, seed=1)[None]}

    def test_a_round_trip_keeps_layout_settings_and_weights(self, model, folder):
        values = json.loads((folder / "config.json").read_text())
        assert values["model_type"] == "llava_video"
        assert (values["spatial_pool_mode"], values["newline_layout"]) == ("average", "grid")
        for cls, unexpected in (
            (HoliTomLlavaVideoForConditionalGeneration, set()),
            (HoliTomLlavaVideoModel, test_checkpoint.HEAD),
        ):
            loaded, report = cls.from_pretrained(folder, output_loading_info=True)
            assert not report["missing_keys"]
            assert report["unexpected_keys"] == unexpected
            assert loaded.config.holitom_config == model.config.holitom_config
            assert loaded.config.layout == model.config.layout
            expected = (model if cls is type(model) else model.model).state_dict()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
        assert backbone_of(str(folder)).title == "LLaVA-Video"

    def test_auto_classes_give_ours_with_remote_code(self, model, folder, tmp_path, inputs):
        from holitom_hf.apps.demo import write_clip

        write_clip(tmp_path / "clip.mp4", num_frames=16, side=112)
        report = test_checkpoint.TestWithoutThePackage().run(folder, tmp_path, inputs, "trust")
        name = "HoliTomLlavaVideoForConditionalGeneration"
        assert report["config"] == "HoliTomLlavaVideoConfig"
        assert report["processor"] == ["HoliTomLlavaVideoProcessor", "HoliTomLlavaVideoVideoProcessor"]
        assert (
            report["AutoModelForImageTextToText"] == report["AutoModelForMultimodalLM"] == [name, "HoliTomQwen2Model"]
        )
        assert report["again"] == name
        assert report["frames"] == [1, 3, 3, SIDE, SIDE]
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert report["tokens"] == expected.tolist()

    def test_plain_upstream_says_that_it_does_not_know_the_model(self, folder):
        """And what to do: it names the option."""
        load = f"AutoConfig.from_pretrained({str(folder)!r}, trust_remote_code=False)"
        code = f"from transformers import AutoConfig; {load}"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "ValueError: The repository" in run.stderr
        assert "pass the argument `trust_remote_code=True`" in run.stderr.strip().splitlines()[-1]

    def test_with_the_package_nobody_is_asked_whether_its_code_may_be_run(self, folder):
        code = (
            "from holitom_hf import HoliTomLlavaVideoProcessor as P, HoliTomLlavaVideoForConditionalGeneration as M\n"
            f"P.from_pretrained({str(folder)!r}); M.from_pretrained({str(folder)!r})"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, input="")
        assert run.returncode == 0, run.stderr
        assert run.stdout == ""

    def test_the_command_line_answers(self, tmp_path):
        """A clip of 4 seconds, a frame a second."""
        folder = tmp_path / "model"
        save(folder)
        clip = write_video(tmp_path / "clip.mp4", num_frames=100)
        runner = CliRunner(env={"COLUMNS": "200"})
        options = ["--model", str(folder), "--max-new-tokens", "3", "--json"]
        result = runner.invoke(app, ["answer", str(clip), "What?", *options])
        assert result.exit_code == 0, result.stderr
        answer = json.loads(result.stdout)
        assert (answer["num_frames"], answer["visual_tokens_before"]) == (4, 48)
        assert answer["visual_tokens_inner"] < answer["visual_tokens_outer"] < 48
        summary = runner.invoke(app, ["answer", str(clip), "What?", *options[:-1]])
        assert "(newlines after rows are among them)" in summary.stdout
        drawn = runner.invoke(app, ["visualize", str(clip), "-o", str(tmp_path / "a.png"), "--model", str(folder)])
        kept, left = map(int, re.search(r": 36 tokens of 4 frames .*, (\d+) kept, (\d+) left", drawn.stdout).groups())
        processor, loaded = small_processor(), HoliTomLlavaVideoForConditionalGeneration.from_pretrained(folder).eval()
        inputs = processor(text="<video>", videos=str(clip), return_tensors="pt")
        with torch.no_grad():
            [[merged]] = loaded(**inputs).merged_videos
        assert kept == int((merged.kind < 2).sum()) == answer["visual_tokens_outer"] - int((merged.kind == 2).sum())
        assert left <= answer["visual_tokens_inner"]

    def test_without_weights_of_its_own(self, model, folder, tmp_path, inputs):
        loaded = HoliTomLlavaVideoForConditionalGeneration.from_pretrained(folder)
        loaded.save_pretrained(tmp_path, config_only=True)
        assert not list(tmp_path.glob("*.safetensors"))
        again = HoliTomLlavaVideoForConditionalGeneration.from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(again(**inputs).logits, model(**inputs).logits)

    def test_a_onevision_checkpoint_is_not_taken_for_one(self, tmp_path):
        LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**VALUES)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"needs a 'llava_video' checkpoint \(LLaVA-Video\); this one is"):
            HoliTomLlavaVideoForConditionalGeneration.from_pretrained(tmp_path)


def test_operations_count_the_newlines():
    config = HoliTomLlavaVideoConfig(**VALUES, holitom_config=IDENTITY)
    operations = encoder_operations(config, 4)
    assert (operations.tokens_per_frame, operations.num_newlines) == (9, 12)
    flops = forward_flops(config, 4, 10, plan_video(IDENTITY, 4, 9))
    config.newline_layout = "one_token"
    assert flops.decoder > forward_flops(config, 4, 10, plan_video(IDENTITY, 4, 9)).decoder
    assert HoliTomConfig.from_preset("llava-video-7b-r15").newline_position == "row"
