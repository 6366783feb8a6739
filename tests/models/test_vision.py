import pytest
import torch

from holitom_hf.models import vision
from holitom_hf.models.llava_onevision.vision import chunks_on_device


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
