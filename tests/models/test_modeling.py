"""The model against upstream's class and against the plain loop."""

import copy

import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from holitom_hf import HoliTomConfig
from holitom_hf.models.upstream import cache_of

from ..conftest import IDENTITY, TOKENS_PER_FRAME, VIDEO_TOKEN, make_prompt, make_video, pad_batch


def real(row: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return row[mask.bool()]


@pytest.fixture(scope="module")
def batch():
    """Two rows of different length with videos of different content."""
    prompts = [make_prompt(3, "video:6", 9, seed=1), make_prompt(2, "video:6", 4, seed=2)]
    return prompts, [make_video(6, seed=3), make_video(6, seed=4, num_scenes=3)]


SETTINGS = {
    "all stages": HoliTomConfig(retention_ratio=0.3, inner_merge_layer=2),
    "first inner layer": HoliTomConfig(retention_ratio=0.5, inner_merge_layer=1, inner_merge_ratio=0.75),
    "last inner layer": HoliTomConfig(retention_ratio=0.2, inner_merge_layer=4, inner_merge_ratio=0.25),
    "no inner stage": HoliTomConfig(retention_ratio=0.25, inner_merge_layer=None),
    "inner stage alone": HoliTomConfig(retention_ratio=1.0, inner_merge_layer=3),
    "low threshold": HoliTomConfig(retention_ratio=0.4, similarity_threshold=0.1, inner_merge_layer=2),
    "contextual tokens": HoliTomConfig(retention_ratio=0.5, contextual_ratio=0.4, inner_merge_layer=2),
    "short segments": HoliTomConfig(retention_ratio=0.3, max_segment_frames=2, inner_merge_layer=2),
    "newline per row": HoliTomConfig(retention_ratio=0.3, newline_position="row", inner_merge_layer=2),
    "prune": HoliTomConfig(retention_ratio=0.3, inner_method="prune", inner_merge_layer=2),
    "prune by question": HoliTomConfig(
        retention_ratio=0.3, inner_method="prune_by_question", inner_merge_layer=2, inner_merge_ratio=0.6
    ),
}


class TestIdentity:
    """With a retention ratio of 1 and no inner stage nothing differs from upstream, to the bit."""

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_logits_are_those_of_the_upstream_class(self, model, upstream, batch, side):
        prompts, videos = batch
        ids, mask = pad_batch(prompts, side)
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": torch.stack(videos)}
        with torch.no_grad():
            ours, theirs = model(**inputs, holitom_config=IDENTITY), upstream(**inputs)
        assert torch.equal(ours.logits, theirs.logits)
        assert ours.merged_videos is None

    def test_generations_are_those_of_the_upstream_class(self, model, upstream, batch):
        prompts, videos = batch
        ids, mask = pad_batch(prompts)
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": torch.stack(videos)}
        greedy = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        ours, theirs = (
            model.generate(**inputs, **greedy, holitom_config=IDENTITY),
            upstream.generate(**inputs, **greedy),
        )
        assert torch.equal(ours.sequences, theirs.sequences)
        assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits))

    def test_text_and_images_are_not_touched_by_any_setting(self, model, upstream):
        ids, mask = pad_batch([make_prompt(4, f"image:{2 * 64 + 8}", 5), make_prompt(7)])
        images = {"pixel_values": torch.randn(1, 2, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]])}
        with torch.no_grad():
            ours = model(input_ids=ids, attention_mask=mask, **images)
            theirs = upstream(input_ids=ids, attention_mask=mask, **images)
        assert torch.equal(ours.logits, theirs.logits)


class TestAgainstThePlainLoop:
    @pytest.mark.parametrize("name", SETTINGS)
    def test_logits_at_every_position(self, model, plain, batch, name):
        prompts, videos = batch
        with torch.no_grad():
            ours = model(
                input_ids=prompts[0][None], pixel_values_videos=videos[0][None], holitom_config=SETTINGS[name]
            ).logits[0]
        torch.testing.assert_close(ours, plain.logits(prompts[0], videos[:1], SETTINGS[name]), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("name", SETTINGS)
    def test_greedy_generation_with_the_cache(self, model, plain, batch, name):
        prompts, videos = batch
        ids, mask = pad_batch(prompts)
        outputs = model.generate(
            input_ids=ids,
            attention_mask=mask,
            pixel_values_videos=torch.stack(videos),
            holitom_config=SETTINGS[name],
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert torch.equal(outputs.sequences[:, : ids.shape[1]], ids)
        for row, (prompt, video) in enumerate(zip(prompts, videos)):
            tokens, logits = plain.generate(prompt, [video], SETTINGS[name], 6)
            assert torch.equal(outputs.sequences[row, ids.shape[1] :], tokens)
            torch.testing.assert_close(
                torch.stack([step[row] for step in outputs.logits]), logits, atol=1e-5, rtol=1e-5
            )

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded_rows_give_what_they_give_alone(self, model, plain, batch, settings, side):
        prompts, videos = batch
        ids, mask = pad_batch(prompts, side)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, pixel_values_videos=torch.stack(videos)).logits
        for row in range(2):
            expected = plain.logits(prompts[row], [videos[row]], settings)
            torch.testing.assert_close(real(logits[row], mask[row]), expected, atol=1e-5, rtol=1e-5)

    def test_a_hand_written_decoding_loop_with_the_cache(self, model, plain, batch, settings):
        prompts, videos = batch
        ids, mask = pad_batch(prompts)
        with torch.no_grad():
            outputs = model(input_ids=ids, attention_mask=mask, pixel_values_videos=torch.stack(videos))
            steps = [outputs.logits[:, -1]]
            for _ in range(4):
                mask = torch.cat([mask, mask.new_ones((2, 1))], 1)
                outputs = model(
                    input_ids=steps[-1].argmax(-1, keepdim=True),
                    attention_mask=mask,
                    cache=cache_of(outputs),
                )
                steps.append(outputs.logits[:, -1])
        for row in range(2):
            _, expected = plain.generate(prompts[row], [videos[row]], settings, 5)
            torch.testing.assert_close(torch.stack([s[row] for s in steps]), expected, atol=1e-5, rtol=1e-5)

    def test_several_videos_and_an_image_in_one_prompt(self, model, plain, settings):
        prompt = make_prompt(2, "video:4", 3, f"image:{2 * 64 + 8}", 1, "video:4", 5)
        videos = [make_video(4, seed=5), make_video(4, seed=6)]
        images = {"pixel_values": torch.randn(1, 2, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]])}
        outputs = model.generate(
            input_ids=prompt[None],
            pixel_values_videos=torch.stack(videos),
            **images,
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens, logits = plain.generate(prompt, videos, settings, 4, images=images)
        assert torch.equal(outputs.sequences[0, len(prompt) :], tokens)
        torch.testing.assert_close(torch.stack([s[0] for s in outputs.logits]), logits, atol=1e-5, rtol=1e-5)

    def test_rows_with_one_video_two_videos_and_none(self, model, plain, settings):
        prompts = [make_prompt(3, "video:4", 2), make_prompt(1, "video:4", "video:4", 6), make_prompt(11)]
        videos = [make_video(4, seed=7), make_video(4, seed=8), make_video(4, seed=9)]
        ids, mask = pad_batch(prompts)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, pixel_values_videos=torch.stack(videos)).logits
        for row, its_videos in enumerate([videos[:1], videos[1:], []]):
            expected = plain.logits(prompts[row], its_videos, settings)
            torch.testing.assert_close(real(logits[row], mask[row]), expected, atol=1e-5, rtol=1e-5)

    def test_rows_with_an_image_two_videos_text_and_both_in_one_batch(self, model, plain, settings):
        image = f"image:{2 * 64 + 8}"
        prompts = [
            make_prompt(2, image, 6),
            make_prompt(1, "video:3", 2, "video:5", 4),
            make_prompt(9),
            make_prompt(2, "video:4", 3, image, 5),
        ]
        videos = [[], [make_video(3, seed=51), make_video(5, seed=52)], [], [make_video(4, seed=53)]]
        pixels = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(54))
        sizes = torch.tensor([[32, 32]])
        images = [{"pixel_values": picture[None], "image_sizes": sizes} for picture in pixels]
        ids, mask = pad_batch(prompts)
        with torch.no_grad():
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                pixel_values=pixels,
                image_sizes=sizes.expand(2, -1),
                pixel_values_videos=[video for row in videos for video in row],
            ).logits
        for row, its_images in enumerate([images[0], None, None, images[1]]):
            expected = plain.logits(prompts[row], videos[row], settings, images=its_images)
            torch.testing.assert_close(real(logits[row], mask[row]), expected, atol=1e-5, rtol=1e-5)

    def test_videos_of_different_numbers_of_frames(self, model, plain, settings):
        prompts = [make_prompt(3, "video:3", 4), make_prompt(2, "video:7", 4)]
        videos = [make_video(3, seed=10), make_video(7, seed=11)]
        ids, mask = pad_batch(prompts)
        outputs = model.generate(
            input_ids=ids, attention_mask=mask, pixel_values_videos=videos, max_new_tokens=4, do_sample=False
        )
        for row in range(2):
            tokens, _ = plain.generate(prompts[row], [videos[row]], settings, 4)
            assert torch.equal(outputs[row, ids.shape[1] :], tokens)

    def test_without_a_cache_generate_keeps_the_choice_of_the_prompt(self, model, batch):
        prompts, videos = batch
        ids, mask = pad_batch(prompts)
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": torch.stack(videos)}
        cached = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False), cached)

    def test_the_prompt_length_fixes_stage_3s_choice_for_longer_inputs(self, model, plain, batch, settings):
        prompts, videos = batch
        longer = torch.cat([prompts[0], torch.tensor([7, 8, 9])])
        inputs = {"input_ids": longer[None], "pixel_values_videos": videos[0][None]}
        with torch.no_grad():
            fixed = model(**inputs, prompt_length=len(prompts[0]))
            anew = model(**inputs)
        expected = plain.logits(longer, videos[:1], settings, prompt_length=len(prompts[0]))
        torch.testing.assert_close(fixed.logits[0], expected, atol=1e-5, rtol=1e-5)
        assert not torch.equal(fixed.inner_keep[0], anew.inner_keep[0])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_keeps_the_same_share_and_comes_close(self, model, plain, batch, settings, dtype):
        prompts, videos = batch
        half = type(model)(model.config).to(dtype).eval()
        half.load_state_dict(model.state_dict())
        with torch.no_grad():
            ours = half(input_ids=prompts[0][None], pixel_values_videos=videos[0][None].to(dtype))
        expected = plain.logits(prompts[0], videos[:1], settings)
        assert ours.logits.dtype == dtype
        assert torch.nn.functional.cosine_similarity(ours.logits[0].float(), expected, dim=-1).mean() > 0.95


class TestInputs:
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_every_attention_implementation_keeps_the_same_tokens(self, model, batch, implementation):
        prompts, videos = batch
        other = type(model)._from_config(copy.deepcopy(model.config), attn_implementation=implementation).eval()
        other.load_state_dict(model.state_dict())
        ids, mask = pad_batch(prompts)
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": torch.stack(videos)}
        with torch.no_grad():
            ours, theirs = model(**inputs), other(**inputs)
        for row in range(2):
            assert torch.equal(ours.inner_keep[row], theirs.inner_keep[row])
            assert torch.equal(ours.merged_videos[row][0].assignment, theirs.merged_videos[row][0].assignment)
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)

    def test_chunks_of_frames_change_nothing(self, model, batch):
        prompts, videos = batch
        inputs = {"input_ids": prompts[0][None], "pixel_values_videos": videos[0][None]}
        with torch.no_grad():
            whole, chunked = model(**inputs), model(**inputs, vision_batch_size=4)
        torch.testing.assert_close(whole.logits, chunked.logits, atol=1e-5, rtol=1e-5)
        seen = []
        handle = model.model.vision_tower.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
        )
        model.generate(**inputs, vision_batch_size=4, max_new_tokens=1)
        handle.remove()
        assert seen == [4, 2]

    def test_pre_encoded_videos_and_embeddings(self, model, batch):
        prompts, videos = batch
        inputs = {"input_ids": prompts[0][None], "pixel_values_videos": videos[0][None]}
        with torch.no_grad():
            expected = model(**inputs).logits
            features = model.get_video_features(videos[0][None])
            assert features.pooler_output.shape == (1, 6 * TOKENS_PER_FRAME + 1, 32)
            encoded = model(input_ids=prompts[0][None], mm_encoder_outputs={"video": features}).logits
            embeds = model.get_input_embeddings()(prompts[0][None])
            embedded = model(inputs_embeds=embeds, pixel_values_videos=videos[0][None]).logits
        assert torch.equal(encoded, expected)
        assert torch.equal(embedded, expected)

    def test_position_ids_are_shifted_by_what_was_dropped_before(self, model, batch):
        prompts, videos = batch
        ids, mask = pad_batch(prompts)
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": torch.stack(videos)}
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            default, given = model(**inputs), model(**inputs, position_ids=positions)
        assert torch.equal(default.logits, given.logits)

    def test_logits_to_keep_counts_the_full_length(self, model, batch):
        prompts, videos = batch
        inputs = {"input_ids": prompts[0][None], "pixel_values_videos": videos[0][None]}
        places = torch.tensor([0, 2, 50, len(prompts[0]) - 1])
        with torch.no_grad():
            everything = model(**inputs).logits
            torch.testing.assert_close(model(**inputs, logits_to_keep=4).logits, everything[:, -4:])
            torch.testing.assert_close(model(**inputs, logits_to_keep=places).logits, everything[:, places])
        assert everything.shape[1] == len(prompts[0])

    def test_return_dict_false_gives_a_tuple(self, model, batch):
        prompts, videos = batch
        outputs = model(input_ids=prompts[0][None], pixel_values_videos=videos[0][None], return_dict=False)
        assert isinstance(outputs, tuple)
        assert outputs[0].shape == (1, len(prompts[0]), 120)


class TestSettings:
    def test_they_can_be_changed_on_a_loaded_model(self, model, batch, settings):
        prompts, videos = batch
        inputs = {"input_ids": prompts[0][None], "pixel_values_videos": videos[0][None]}
        before = model(**inputs).merged_videos[0][0].num_tokens
        model.config.holitom_config.retention_ratio = 0.1
        try:
            after = model(**inputs).merged_videos[0][0].num_tokens
        finally:
            model.config.holitom_config.retention_ratio = settings.retention_ratio = 0.3
        assert after < before / 2

    @pytest.mark.parametrize(
        "given",
        [HoliTomConfig(retention_ratio=0.1, inner_merge_layer=None), {"retention_ratio": 0.1, "inner_merge_layer": 2}],
    )
    def test_they_can_be_given_per_call(self, model, batch, given):
        prompts, videos = batch
        outputs = model.generate(
            input_ids=prompts[0][None],
            pixel_values_videos=videos[0][None],
            holitom_config=given,
            max_new_tokens=2,
            return_dict_in_generate=True,
        )
        record = cache_of(outputs).compressed_sequence
        assert record.merged_videos[0][0].num_tokens <= 0.1 * 6 * TOKENS_PER_FRAME + 6 + 2
        assert model.config.holitom_config.retention_ratio == 0.3

    def test_visionzip_runs_in_the_model(self, model, batch):
        prompts, videos = batch
        given = HoliTomConfig(outer_method="visionzip", retention_ratio=0.5, inner_merge_layer=None)
        with torch.no_grad():
            outputs = model(input_ids=prompts[0][None], pixel_values_videos=videos[0][None], holitom_config=given)
        assert outputs.merged_videos[0][0].num_tokens == 6 * TOKENS_PER_FRAME // 2


class TestWhatWasDoneIsInspectable:
    def test_the_output_tells_segments_counts_and_assignment(self, model, batch, settings):
        prompts, videos = batch
        with torch.no_grad():
            outputs = model(input_ids=prompts[0][None], pixel_values_videos=videos[0][None], output_hidden_states=True)
        merged = outputs.merged_videos[0][0]
        assert merged.segments[0][0] == 0
        assert merged.segments[-1][1] == 6
        assert merged.assignment.shape == (6, TOKENS_PER_FRAME)
        num_text = int((prompts[0] != VIDEO_TOKEN).sum())
        num_outer = merged.num_tokens + 1
        num_inner = round(num_outer * 0.5)
        assert len(outputs.inner_keep[0]) == num_text + num_inner
        lengths = [layer.shape[1] for layer in outputs.hidden_states]
        # hidden_states[i] is what went into layer i, of which the one of stage 3 shortens its own.
        assert lengths == [num_text + num_outer] * 3 + [num_text + num_inner] * 3
        kept_lengths = [layer.keys.shape[2] for layer in cache_of(outputs).layers]
        assert kept_lengths == [num_text + num_outer] * 2 + [num_text + num_inner] * 3

    def test_text_always_survives_stage_3(self, model, batch):
        prompts, videos = batch
        with torch.no_grad():
            outputs = model(input_ids=prompts[0][None], pixel_values_videos=videos[0][None])
        num_before, num_after = 3, 9
        length = len(outputs.merged_videos[0][0].frame) + 1 + num_before + num_after
        kept = set(outputs.inner_keep[0].tolist())
        assert set(range(num_before)) <= kept
        assert set(range(length - num_after, length)) <= kept


def test_labels_give_the_loss_over_the_same_text_tokens(model, plain, batch, settings):
    prompts, videos = batch
    labels = prompts[0].clone()
    labels[: -len(prompts[0]) + 3 + 6 * TOKENS_PER_FRAME + 1] = -100
    labels[labels == VIDEO_TOKEN] = -100
    outputs = model(input_ids=prompts[0][None], pixel_values_videos=videos[0][None], labels=labels[None])
    logits = plain.logits(prompts[0], videos[:1], settings)
    expected = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100)
    torch.testing.assert_close(outputs.loss, expected, atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_weight(model, batch):
    prompts, videos = batch
    trained = type(model)(model.config)
    trained.load_state_dict(model.state_dict())
    labels = prompts[0].clone()
    labels[labels == VIDEO_TOKEN] = -100
    trained(input_ids=prompts[0][None], pixel_values_videos=videos[0][None], labels=labels[None]).loss.backward()
    without = [name for name, weight in trained.named_parameters() if weight.grad is None or not weight.grad.any()]
    # What upstream does not train with a video, neither does ours: the norm behind the last feature layer.
    assert without == ["model.vision_tower.post_layernorm.weight", "model.vision_tower.post_layernorm.bias"]


def test_sampling_with_a_seed_is_reproducible(model, batch):
    prompts, videos = batch
    inputs = {"input_ids": prompts[0][None], "pixel_values_videos": videos[0][None]}
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        runs.append(model.generate(**inputs, do_sample=True, temperature=2.0, max_new_tokens=8, use_cache=use_cache))
    assert torch.equal(*runs)


def test_the_model_is_a_subclass_with_upstreams_weight_names(model, upstream):
    assert isinstance(model, LlavaOnevisionForConditionalGeneration)
    assert list(model.state_dict()) == list(upstream.state_dict())
