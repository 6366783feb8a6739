"""Videos merged together: each as alone, and the device waited for as often as for one."""

from dataclasses import fields, replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from holitom_hf.merging import METHODS, MergingSettings, VideoTokens
from holitom_hf.merging.host_numbers import in_lockstep, on_host
from holitom_hf.merging.outer import merge_videos
from holitom_hf.merging.tensors import merge_tokens

from .drawn import draw_video


# A name for the CPU that nothing has by itself.
THERE = torch.device("cpu:0")
COPIES = ("cpu", "tolist", "numpy", "item", "__int__", "__float__", "__bool__", "__index__")
# Their own choices are made by masks, whose number of entries is asked for video by video.
ASKING_ALONE = ("dymu_tokens", "unicomp", "visionzip")


class DeviceTensor(torch.Tensor):
    """What lies on a device, and all that is computed from it; copies on the host are plain tensors again."""

    num_waits = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if function == torch.Tensor.device.__get__:
            return THERE
        if name in COPIES:
            DeviceTensor.num_waits += 1
            host = args[0].as_subclass(torch.Tensor)
            return host.clone() if name == "cpu" else getattr(host, name)(*args[1:], **kwargs)
        # Results whose size the host has to know.
        indices = (args[1] if isinstance(args[1], tuple) else (args[1],)) if name == "__getitem__" else ()
        is_masked = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        is_repeated = name == "repeat_interleave" and isinstance(args[1], torch.Tensor) and "output_size" not in kwargs
        DeviceTensor.num_waits += name in ("nonzero", "masked_select") or is_masked or is_repeated
        return super().__torch_function__(function, types, args, kwargs)


class Placement(TorchFunctionMode):
    """Puts what is made on the device, or sent there, on it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, torch.device)]
        return result.as_subclass(DeviceTensor) if THERE in devices else result


def draw(num_frames: int, seed: int, tokens_per_frame: int = 25) -> VideoTokens:
    features, importance = draw_video(num_frames, tokens_per_frame, num_scenes=3, seed=seed)
    return VideoTokens(features, importance, keys=features[..., :4], newline=features[0, 0], question=features[-1])


def waits(videos: list[VideoTokens], *settings: MergingSettings) -> int:
    there = [
        replace(
            video,
            **{name: getattr(video, name).as_subclass(DeviceTensor) for name in ("features", "importance", "keys")},
        )
        for video in videos
    ]
    DeviceTensor.num_waits = 0
    with Placement():
        merge_videos(there, *settings)
    return DeviceTensor.num_waits


def assert_equal(merged, expected):
    for field in fields(expected):
        found, wanted = getattr(merged, field.name), getattr(expected, field.name)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


VIDEOS = [draw(12, seed=0), draw(5, seed=1), draw(9, seed=2, tokens_per_frame=16), draw(1, seed=3)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "fields_", [{}, {"exact_budget": True, "newline_position": "row"}, {"proportional_attention": True}]
)
def test_each_is_what_it_is_alone_at_a_rate_of_its_own(method, fields_):
    common = MergingSettings(outer_method=method, similarity_threshold=0.6, **fields_)
    settings = [replace(common, retention_ratio=ratio) for ratio in (0.3, 0.6, 0.5, 0.1)]
    merged, embeddings = merge_videos(VIDEOS, *settings)
    for index, (video, each) in enumerate(zip(VIDEOS, settings)):
        assert_equal(merged[index], merge_tokens(video, each))
        newline = [] if each.newline_position == "row" else [video.newline[None]]
        assert torch.equal(embeddings[index], torch.cat([merged[index].embeddings, *newline]))
    for found, video in zip(merge_videos(VIDEOS, settings[0])[0], VIDEOS):
        assert_equal(found, merge_tokens(video, settings[0]))


def test_settings_are_of_all_or_of_each():
    with pytest.raises(ValueError, match="shorter"):
        merge_videos(VIDEOS, MergingSettings(), MergingSettings())


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ASKING_ALONE])
@pytest.mark.parametrize("exact_budget", [False, True])
@pytest.mark.parametrize("counts", [False, True])
def test_as_many_waits_for_all_as_for_one(method, exact_budget, counts):
    settings = MergingSettings(
        outer_method=method,
        retention_ratio=0.2,
        similarity_threshold=0.6,
        contextual_ratio=0.3,
        exact_budget=exact_budget,
        proportional_attention=counts,
    )
    alone = [waits([video], settings) for video in VIDEOS]
    rates = [replace(settings, retention_ratio=ratio) for ratio in (0.2, 0.3, 0.2, 0.25)]
    assert waits(VIDEOS, *rates) == max(alone)
    if METHODS[method].label.startswith("HoliTom"):
        assert alone == [1 + counts + (method == "holitom_stop")] * 4


@pytest.mark.parametrize("method", ASKING_ALONE)
def test_methods_that_ask_alone_wait_for_each(method):
    settings = MergingSettings(outer_method=method, retention_ratio=0.2)
    assert waits(VIDEOS, settings) == sum(waits([video], settings) for video in VIDEOS)


def test_farthest_points_with_nothing_that_repeats_wait_for_nothing():
    settings = MergingSettings(outer_method="farthest_points", retention_ratio=0.2, similarity_threshold=1.0)
    assert waits(VIDEOS, settings) == 0


def test_computations_of_different_length_run_side_by_side():
    order = []

    def asks(name, number):
        found = []
        for turn in range(number):
            order.append((turn, name))
            found.append((yield torch.full((turn + 1, 2), ord(name) + turn)).tolist())
        return name, found

    results = in_lockstep([asks("a", 2), asks("b", 0), asks("c", 3)])
    assert results == [
        (name, [[[ord(name) + turn] * 2] * (turn + 1) for turn in range(number)])
        for name, number in (("a", 2), ("b", 0), ("c", 3))
    ]
    assert order == sorted(order)
    assert in_lockstep([]) == []
    with pytest.raises(ZeroDivisionError):
        in_lockstep([asks("a", 2), asks("b", 1 / 0)])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_what_is_copied_together_is_what_it_was(dtype):
    tensors = [torch.arange(n, dtype=dtype).view(shape) for n, shape in ((6, (2, 3)), (1, ()), (0, (0, 4)), (5, (5,)))]
    for found, tensor in zip(on_host(tensors), tensors):
        torch.testing.assert_close(found, tensor, rtol=0, atol=0)
