"""What is not timed but kept: how much the stages ask of a device."""

from dataclasses import replace

import pytest
import torch

from holitom_hf import HoliTomConfig
from holitom_hf.benchmarking.architectures import architecture
from holitom_hf.benchmarking.measuring import count_operations
from holitom_hf.benchmarking.models import contest
from holitom_hf.benchmarking.synthetic import synthetic_features
from holitom_hf.merging import segmentation
from holitom_hf.merging.hidden_states import merge_hidden_states
from holitom_hf.merging.methods import holitom
from holitom_hf.merging.tensors import merge_video_tokens
from holitom_hf.models import vision_importance
from holitom_hf.sequence.compaction import compact_prompt


SETTINGS = HoliTomConfig(retention_ratio=0.1, similarity_threshold=0.65)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The budgets of a GPU, which fits all that these tests need at once."""
    monkeypatch.setattr(holitom, "CLUSTERED_BYTES", {})
    monkeypatch.setattr(segmentation, "compare_by_products", segmentation.compare_by_element)
    monkeypatch.setattr(segmentation, "FRAMES_AT_ONCE", 10**6)
    monkeypatch.setattr(vision_importance, "IMPORTANCE_BYTES", {})


def count_merging(num_frames: int, settings=SETTINGS, dim: int = 16):
    features = synthetic_features(num_frames, 196, dim)
    return count_operations(lambda: merge_video_tokens(features, torch.rand(num_frames, 196), settings))


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        HoliTomConfig(similarity_threshold=0.65, contextual_ratio=0.3),
        HoliTomConfig(retention_ratio=0.6, similarity_threshold=0.65, exact_budget=True),
    ],
)
def test_merging_launches_as_much_for_many_frames_and_segments_as_for_few(settings):
    few, many = count_merging(16, settings), count_merging(128, settings)  # 2 and 16 segments
    assert many.by_name == few.by_name
    assert many.launches <= (295 if settings.contextual_ratio else 265 if settings.exact_budget else 180)


@pytest.mark.parametrize("num_frames", [1, 8, 64])
@pytest.mark.parametrize("exact_budget", [False, True])
def test_merging_waits_for_the_device_only_for_the_table_of_counts(num_frames, exact_budget, monkeypatch):
    transfers, made = [], []
    cpu, tensor = torch.Tensor.cpu, torch.tensor

    def spy_cpu(self, *args, **kwargs):
        transfers.append(tuple(self.shape))
        return cpu(self, *args, **kwargs)

    def spy_tensor(data, *args, **kwargs):
        made.append(kwargs.get("device"))
        return tensor(data, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "cpu", spy_cpu)
    monkeypatch.setattr(torch, "tensor", spy_tensor)  # with a device it would wait
    assert count_merging(num_frames, replace(SETTINGS, exact_budget=exact_budget)).waits == 0
    assert [shape for shape in transfers if shape != ()] == [(num_frames - 1, num_frames)] * len(transfers)
    assert 1 <= len(transfers) <= 2  # the second, in `choose_segments`, is already there
    assert set(made) <= {None}


def test_merging_allocates_no_more_than_its_output_and_its_budget():
    for num_frames in (32, 128):
        counts = count_merging(num_frames, dim=512)
        output = num_frames * 196 * 512 * 0.11
        assert counts.largest < max(1.2 * output, holitom.CLUSTERED_BYTES["cpu"] / 4)


def test_importance_never_holds_the_attention_of_all_heads_and_frames():
    model = contest(architecture("tiny"), 2, 1, torch.device("cpu"), torch.float32).models["holitom"]
    layer = model.model.vision_tower.encoder.layers[-1]
    hidden = torch.randn(4, 729, 128)
    with torch.no_grad():
        counts = count_operations(lambda: vision_importance.vision_importance(layer, hidden))
    assert counts.largest == 729 * 729  # one head of one frame
    assert counts.waits == 0


def test_stage_3_and_compaction_launch_as_much_for_many_tokens_as_for_few():
    def inner(length):
        hidden, importance = torch.randn(1, length + 9, 16), torch.rand(length + 9)
        return count_operations(lambda: merge_hidden_states(hidden, importance, 5, length, 0.5))

    def compaction(slots):
        ids = torch.randn(2, slots + 9, 16)
        mask = torch.zeros(2, slots + 9, dtype=torch.bool)
        mask[:, 5 : 5 + slots] = True
        tokens = [torch.randn(slots // 10, 16)] * 2
        return count_operations(lambda: compact_prompt(ids, mask, torch.ones_like(mask), tokens, [slots, slots]))

    for count in (inner, compaction):
        few, many = count(100), count(2000)
        assert many.by_name == few.by_name
        assert many.launches < 60
        assert many.waits == 0


def test_counting_sees_launches_waits_and_sizes():
    values = torch.arange(6.0)

    def work():
        doubled = values * 2
        doubled.view(2, 3).T.add_(1)
        torch.empty(1000)
        return doubled[doubled > 3], doubled.sum().item()

    counts = count_operations(work)
    assert counts.by_name == {"mul": 1, "add_": 1, "gt": 1, "index": 1, "sum": 1, "_local_scalar_dense": 1}
    assert counts.launches == 6
    assert counts.waits == 2  # the mask's nonzero and the item
    assert counts.largest == 1000
