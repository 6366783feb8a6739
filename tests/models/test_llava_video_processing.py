"""What LLaVA-Video takes of a file, and what it is told of it."""

import numpy as np
import pytest
from transformers.video_utils import VideoMetadata

from holitom_hf import HoliTomLlavaVideoProcessor, HoliTomLlavaVideoVideoProcessor

from ..videos import number_of, write_video
from .llava_video import LAYOUTS, small_processor


@pytest.mark.parametrize("total", [1, 30, 90, 1600, 1601, 1920, 1921, 5000])
@pytest.mark.parametrize("rate", [1.0, 24.0, 25.0, 29.97, 30.4, 0.4])
def test_frames_are_those_of_the_authors_loop(total, rate):
    """One per second: every n-th, n the rounded rate; more than 64 of them: 64 between both ends."""
    step = max(1, round(rate))
    expected = [frame for frame in range(total) if frame % step == 0]
    if len(expected) > 64:
        expected = [int(place * (total - 1) / 63) for place in range(64)]
    found = HoliTomLlavaVideoVideoProcessor().sample_frames(VideoMetadata(total_num_frames=total, fps=rate))
    assert len(found) == len(expected)
    assert np.abs(np.array(found) - expected).max() <= (1 if len(expected) == 64 else 0)  # where the sum is rounded
    assert found[0] == 0


def test_what_a_call_asks_for_is_what_it_gets():
    processor = HoliTomLlavaVideoVideoProcessor()
    video = VideoMetadata(total_num_frames=3000, fps=30.0)
    assert processor.sample_frames(video, num_frames=7).tolist() == np.linspace(0, 2999, 7, dtype=int).tolist()
    assert processor.sample_frames(video, fps=2).tolist() == list(range(0, 3000, 15))
    assert len(HoliTomLlavaVideoVideoProcessor(fps=None).sample_frames(video)) == 64
    assert len(HoliTomLlavaVideoVideoProcessor(num_frames=16).sample_frames(video)) == 16
    with pytest.raises(ValueError, match="exclude each other"):
        processor.sample_frames(video, num_frames=7, fps=2)
    with pytest.raises(ValueError, match="fewer than the 3001 asked for"):
        processor.sample_frames(video, num_frames=3001)
    with pytest.raises(ValueError, match="needs the video's own frame rate"):
        processor.sample_frames(VideoMetadata(total_num_frames=10), fps=2)


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_there_is_a_placeholder_for_every_token(layout):
    processor = small_processor(*layout)
    videos = [np.zeros((frames, 20, 30, 3), dtype=np.uint8) for frames in (2, 5)]
    ids = processor(text="<video> What? <video>", videos=videos, return_tensors="pt")["input_ids"][0]
    tokens_of = LAYOUTS[layout][1]
    assert int((ids == processor.video_token_id).sum()) == tokens_of(2) + tokens_of(5)
    counts = processor._get_num_multimodal_tokens(video_sizes=[(2, 28, 28), (5, 28, 28)])
    assert counts.num_video_tokens == [tokens_of(2), tokens_of(5)]


class TestTimeInstruction:
    def text(self, processor, **kwargs) -> str:
        found = processor(text="<video>\nWhat?", **kwargs)
        assert "video_metadata" not in found
        [ids] = found["input_ids"]
        return processor.tokenizer.decode([token for token in ids if token != processor.video_token_id])

    def test_it_tells_of_the_frames_that_were_decoded(self, tmp_path):
        video_processor = HoliTomLlavaVideoVideoProcessor(num_frames=4)
        clip = write_video(tmp_path / "clip.mp4", num_frames=310, fps=25, size=(160, 64))
        frames = video_processor(clip, do_resize=False, do_normalize=False)["pixel_values_videos"][0]
        assert [number_of(frame * 255) for frame in frames] == [0, 103, 206, 309]
        assert self.text(small_processor(num_frames=4), videos=str(clip), add_time_instruction=True) == (
            "\nThe video lasts for 12.40 seconds, and 4 frames are uniformly sampled from it. These frames are "
            "located at 0.00s,4.12s,8.24s,12.36s.Please answer the following questions related to this video.\nWhat?"
        )

    def test_it_is_left_out_unless_it_is_asked_for(self, tmp_path):
        clip = write_video(tmp_path / "clip.mp4", num_frames=30)
        assert self.text(small_processor(), videos=str(clip)) == "\nWhat?"

    def test_its_default_is_saved_with_the_checkpoint(self, tmp_path):
        clip = write_video(tmp_path / "clip.mp4", num_frames=50)
        small_processor("bilinear", "one_token", add_time_instruction=True).save_pretrained(tmp_path / "told")
        told = HoliTomLlavaVideoProcessor.from_pretrained(tmp_path / "told")
        assert isinstance(told.video_processor, HoliTomLlavaVideoVideoProcessor)
        assert (told.spatial_pool_mode, told.newline_layout) == ("bilinear", "one_token")
        text = self.text(told, videos=str(clip))
        assert text.startswith("\nThe video lasts for 2.00 seconds, and 2 frames are")
        assert "0.00s,1.00s.Please" in text
        assert self.text(told, videos=str(clip), add_time_instruction=False) == "\nWhat?"

    def test_frames_in_memory_need_their_rate(self):
        frames = np.zeros((3, 28, 28, 3), dtype=np.uint8)
        metadata = VideoMetadata(total_num_frames=90, fps=30.0, frames_indices=[0, 45, 89])
        text = self.text(small_processor(), videos=[frames], video_metadata=[metadata], add_time_instruction=True)
        assert "lasts for 3.00 seconds, and 3 frames" in text
        assert "located at 0.00s,1.50s,2.97s." in text
        with pytest.raises(ValueError, match="needs to know when frames were taken: pass a file, or video_metadata"):
            small_processor()(text="<video>", videos=[frames], add_time_instruction=True)

    def test_all_frames_of_a_video_need_no_more_than_their_rate(self):
        frames = np.zeros((3, 28, 28, 3), dtype=np.uint8)
        told = {"videos": [frames], "add_time_instruction": True}
        text = self.text(small_processor(), video_metadata=[VideoMetadata(total_num_frames=3, fps=2.0)], **told)
        assert "lasts for 1.50 seconds, and 3 frames" in text
        assert "located at 0.00s,0.50s,1.00s." in text
        with pytest.raises(ValueError, match="with frames_indices where the frames are not all of the video's"):
            small_processor()(text="<video>", video_metadata=[VideoMetadata(total_num_frames=90, fps=30.0)], **told)
        metadata = VideoMetadata(total_num_frames=90, fps=30.0, frames_indices=[0, 45])
        with pytest.raises(ValueError, match="video_metadata has 2 frames_indices for a video of 3 frames"):
            small_processor()(text="<video>", video_metadata=[metadata], **told)

    def test_it_tells_of_the_frames_that_are_left_of_an_array(self):
        frames, metadata = np.zeros((90, 28, 28, 3), dtype=np.uint8), VideoMetadata(total_num_frames=90, fps=30.0)
        told = {"add_time_instruction": True, "do_sample_frames": True}
        text = self.text(small_processor(), videos=[frames], video_metadata=[metadata], **told)
        assert "lasts for 3.00 seconds, and 3 frames are uniformly sampled" in text
        assert "located at 0.00s,1.00s,2.00s." in text

    @pytest.mark.parametrize(
        ("num_frames", "told"), [(1, "0.04 seconds, and 1 frames"), (24, "0.96 seconds, and 1 f")]
    )
    def test_a_short_video_has_its_first_frame(self, tmp_path, num_frames, told):
        clip = str(write_video(tmp_path / "clip.mp4", num_frames=num_frames))
        text = self.text(small_processor(), videos=clip, add_time_instruction=True)
        assert f"The video lasts for {told}" in text
        assert "located at 0.00s.Please" in text

    def test_each_of_several_videos_has_its_own(self, tmp_path):
        clips = [str(write_video(tmp_path / f"{number}.mp4", num_frames=number)) for number in (30, 80)]
        text = self.text_of_two(small_processor(), clips)
        assert text.index("lasts for 1.20 seconds, and 2 frames") < text.index("lasts for 3.20 seconds, and 4 frames")

    def text_of_two(self, processor, clips) -> str:
        [ids] = processor(text="<video> and <video>", videos=clips, add_time_instruction=True)["input_ids"]
        return processor.tokenizer.decode(ids)


def test_defaults_are_those_of_the_authors():
    """SigLIP's normalization, 384 pixels, 64 frames at one per second."""
    processor = HoliTomLlavaVideoVideoProcessor()
    values = processor.to_dict()
    assert list(values["image_mean"]) == list(values["image_std"]) == [0.5, 0.5, 0.5]
    assert (values["num_frames"], values["fps"]) == (64, 1)
    assert values["size"]["height"] == values["size"]["width"] == 384
