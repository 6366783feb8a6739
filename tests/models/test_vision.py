import copy
import inspect

import pytest
import torch
from torch.utils import _pytree as pytree
from transformers.utils import output_capturing

from holitom_hf.models import vision
from holitom_hf.models.llava_onevision.vision import chunks_on_device

from ..conftest import make_prompt, make_video


@pytest.fixture
def chunk_sizes(model, monkeypatch):
    """Sizes of the chunks that go through the vision tower."""
    sizes = []
    handle = model.model.vision_tower.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    yield sizes
    handle.remove()


def test_frames_go_through_the_tower_in_even_chunks_that_fit(model, monkeypatch, chunk_sizes):
    pixels = torch.randn(1, 10, 3, 32, 32)
    with torch.inference_mode():
        whole = model.get_video_features(pixels, return_dict=True)
        assert chunk_sizes == [10]
        # So small a budget that a few frames fit: as even as they can be.
        per_frame = vision.CHUNK_BYTES // model.model.frames_per_chunk(10**9)
        monkeypatch.setattr(vision, "CHUNK_BYTES", 4 * per_frame + per_frame // 2)
        chunk_sizes.clear()
        chunked = model.get_video_features(pixels, return_dict=True)
    assert chunk_sizes == [4, 4, 2]
    torch.testing.assert_close(chunked.pooler_output, whole.pooler_output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(chunked.importance[0], whole.importance[0], atol=1e-6, rtol=1e-5)


def test_settings_that_change_nothing_run_as_upstream_does(model, monkeypatch, chunk_sizes):
    monkeypatch.setattr(vision, "CHUNK_BYTES", 1)
    with torch.inference_mode():
        model.get_video_features(
            torch.randn(1, 10, 3, 32, 32), holitom_config={"retention_ratio": 1.0, "inner_method": "none"}
        )
        assert chunk_sizes == [10]
        chunk_sizes.clear()
        model.get_video_features(torch.randn(1, 3, 3, 32, 32))
        assert chunk_sizes == [1, 1, 1]  # at least one, whatever the budget


def test_pixels_stay_where_they_are_if_the_weights_are_nowhere():
    pixels = torch.arange(10.0).view(5, 2)
    for device in ("cpu", "meta"):
        chunks = list(chunks_on_device(pixels, 2, torch.device(device)))
        assert [len(chunk) for chunk in chunks] == [2, 2, 1]
        assert torch.equal(torch.cat(chunks), pixels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pixels_on_the_host_reach_the_gpu_in_order():
    pixels = torch.randn(7, 3, 64, 64)
    for where in (pixels, pixels.pin_memory(), pixels.cuda()):
        chunks = list(chunks_on_device(where, 2, torch.device("cuda", 0)))
        assert {chunk.device for chunk in chunks} == {torch.device("cuda", 0)}
        assert torch.equal(torch.cat(chunks).cpu(), pixels)


def test_a_compiled_tower_gives_the_same_features(model):
    pixels = torch.randn(1, 4, 3, 32, 32)
    with torch.inference_mode():
        plain = model.get_video_features(pixels, return_dict=True)
        tower = model.model.vision_tower
        try:
            tower.compile(backend="aot_eager")
            compiled = model.get_video_features(pixels, return_dict=True)
        finally:
            tower._compiled_call_impl = None
    torch.testing.assert_close(compiled.pooler_output, plain.pooler_output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compiled.importance[0], plain.importance[0], atol=1e-6, rtol=1e-5)


def test_pixels_whose_sum_overflows_are_finite_all_the_same(model):
    vision.check_finite(torch.full((2, 3, 32, 32), 3e38), [2])
    with pytest.raises(ValueError, match="video 1 has NaN or infinite pixels in frame 0"):
        vision.check_finite(torch.tensor([1.0, torch.inf, -torch.inf]).view(3, 1), [1, 2])


@pytest.fixture(scope="module")
def eager(model, upstream):
    """Ours and upstream's class with the same weights; eager attention, which has weights to return."""
    pair = []
    for one in (model, upstream):
        other = type(one)._from_config(copy.deepcopy(one.config), attn_implementation="eager").eval()
        other.load_state_dict(one.state_dict())
        pair.append(other)
    return pair


@pytest.mark.parametrize("vision_batch_size", [None, 3])
@pytest.mark.parametrize("output_hidden_states", [None, False, True, [-1, 1], [0, -1]])
def test_the_towers_own_outputs_are_upstreams(eager, vision_batch_size, output_hidden_states):
    ours, theirs = eager
    pixels = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    kwargs = {"output_hidden_states": output_hidden_states, "output_attentions": output_hidden_states is not False}
    with torch.inference_mode():
        expected = theirs.get_video_features(pixels, **kwargs)
        found = ours.get_video_features(pixels, vision_batch_size=vision_batch_size, **kwargs)
    assert set(expected.keys()) == set(found.keys()) - {"importance", "attention_keys"}
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output)
    for name in ("hidden_states", "attentions"):
        mine, wanted = found.get(name), expected.get(name)
        assert (mine is None) == (wanted is None)
        for one, other in zip(mine or (), wanted or (), strict=True):
            # transformers 5.21 returns all hidden states, whichever are asked for.
            if hasattr(output_capturing, "select_hidden_states"):
                assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other)


def test_hidden_states_may_be_asked_for_without_those_that_are_projected(eager):
    with torch.inference_mode():
        states = eager[0].get_video_features(torch.randn(1, 4, 3, 32, 32), output_hidden_states=1).hidden_states
    assert [state is not None for state in states] == [False, True, False, False]


def test_generate_and_forward_keep_none_of_the_towers_outputs(model, monkeypatch):
    """They would lie in memory beside the features until the answer is there."""
    seen = []
    encode = type(model.model).get_video_features

    def watched(self, *args, **kwargs):
        seen.append(encode(self, *args, **kwargs))
        return seen[-1]

    watched.__signature__ = inspect.signature(encode)
    monkeypatch.setattr(type(model.model), "get_video_features", watched)
    inputs = {
        "input_ids": make_prompt(2, "video:4", 3)[None],
        "pixel_values_videos": make_video(4, seed=1)[None],
    }
    with torch.inference_mode():
        model(**inputs)
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert [set(video.keys()) for video in seen] == [{"pooler_output", "importance", "attention_keys"}] * 2


def test_encoded_videos_are_a_model_output_like_any_other(model):
    """`keys` once was a field and hid the method that all of these need."""
    pixels = torch.randn(1, 4, 3, 32, 32)
    with torch.inference_mode():
        video = model.get_video_features(pixels)
        pair = model.get_video_features(pixels, return_dict=False)
    names = ["last_hidden_state", "pooler_output", "hidden_states", "importance", "attention_keys"]
    assert list(video.keys()) == list(dict(video)) == names
    assert torch.equal(video[0], video.last_hidden_state)
    assert len(video.to_tuple()) == len(pair) == len(names)
    leaves, structure = pytree.tree_flatten(video)
    again = pytree.tree_unflatten(leaves, structure)
    assert type(again) is type(video)
    assert torch.equal(again.attention_keys[0], video.attention_keys[0])
