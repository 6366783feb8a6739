"""What compaction, stage 3 and decoding cost beside the layers: sizes and host synchronisations, counted."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from holitom_hf import HoliTomConfig
from holitom_hf.merging.hidden_states import merge_hidden_states
from holitom_hf.merging.tensors import merge_video_tokens
from holitom_hf.models.upstream import CACHE_NAME, cache_of
from holitom_hf.sequence.packed_rows import PackedRows

from ..conftest import make_prompt, make_video, pad_batch


class Watch(TorchDispatchMode):
    """Records the largest tensor that any operation makes, and how often the host asks the device for a value."""

    ASKING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.largest, self.asked = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if any(name.startswith(asking) or name.startswith("_" + asking) for asking in self.ASKING):
            self.asked.append(name)
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, torch.Tensor) and not result._is_view():
                self.largest = max(self.largest, result.numel())
        return results


@pytest.mark.parametrize("padded", [False, True])
def test_a_decoding_step_asks_the_host_for_nothing_that_upstreams_does_not(model, upstream, padded):
    prompts = [make_prompt(3, "video:5", 8, seed=1)] + ([make_prompt(2, "video:5", 3, seed=2)] if padded else [])
    ids, mask = pad_batch(prompts)
    inputs = {"input_ids": ids, "pixel_values_videos": torch.stack([make_video(5, seed=s) for s in range(len(ids))])}
    inputs |= {"attention_mask": mask} if padded else {}
    asked = []
    for tried in (model, upstream):
        with torch.no_grad():
            past = cache_of(tried(**inputs, use_cache=True))
            step = {"input_ids": ids[:, -1:], CACHE_NAME: past, "position_ids": mask.sum(1, keepdim=True)}
            step |= {"attention_mask": torch.nn.functional.pad(mask, (0, 1), value=1)} if padded else {}
            with Watch() as watch:
                tried(**step)
        asked.append(len(watch.asked))
    # Two kinds of layers have two masks, each of which transformers checks once for being needed at all.
    assert asked[0] <= 2 * asked[1]
    if not padded:
        assert asked == [0, 0]


def test_a_decoding_step_on_a_static_cache_asks_for_nothing(model, upstream):
    """Through `generate`'s own preparation, which makes the masks for caches that compile."""
    ids = make_prompt(3, "video:5", 8, seed=1)[None]
    asked = []
    for tried in (model, upstream):
        outputs = tried.generate(
            input_ids=ids,
            pixel_values_videos=make_video(5, seed=1)[None],
            max_new_tokens=2,
            **{CACHE_NAME: StaticCache(tried.config, max_cache_len=140)},
            return_dict_in_generate=True,
            do_sample=False,
        )
        tokens = outputs.sequences
        with torch.no_grad(), Watch() as watch:
            prepared = tried.prepare_inputs_for_generation(
                tokens,
                next_sequence_length=1,
                **{CACHE_NAME: cache_of(outputs)},
                position_ids=torch.arange(tokens.shape[1])[None],
                use_cache=True,
            )
            tried(**prepared)
        asked.append(watch.asked)
    assert len(asked[0]) <= len(asked[1])


def test_stage_3_makes_no_matrix_of_all_tokens_by_all_tokens():
    random = torch.Generator().manual_seed(0)
    num_tokens, dim = 6272, 64
    hidden, importance = torch.randn(1, num_tokens, dim, generator=random), torch.rand(num_tokens, generator=random)
    with Watch() as watch:
        merge_hidden_states(hidden, importance, 0, num_tokens, 0.5)
    assert watch.largest <= 1024 * num_tokens // 2 < num_tokens**2 / 8


def test_compaction_makes_nothing_larger_than_the_rows():
    keep = torch.rand(4, 5000, generator=torch.Generator().manual_seed(0)) < 0.1
    counts = keep.sum(1).tolist()
    with Watch() as watch:
        PackedRows.of(keep, counts, "left")
    assert watch.largest <= keep.numel()
    assert not watch.asked


def test_stages_1_and_2_ask_the_host_once_and_stay_below_the_size_of_the_features():
    random = torch.Generator().manual_seed(0)
    features = torch.randn(1, 196, 256, generator=random) + 0.3 * torch.randn(32, 196, 256, generator=random)
    features[:, 100:] = torch.randn(32, 96, 256, generator=random)
    importance = torch.rand(32, 196, generator=random)
    transfers = []

    class Transfers(Watch):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ == "_to_copy" and "device" in (kwargs or {}):
                transfers.append(function)
            return super().__torch_dispatch__(function, types, args, kwargs)

    with Transfers() as watch:
        merged = merge_video_tokens(
            features, importance, HoliTomConfig(retention_ratio=0.1, similarity_threshold=0.65)
        )
    assert merged.num_tokens < 0.12 * 32 * 196
    assert watch.largest <= features.numel()
    assert not watch.asked
    assert len(transfers) <= 1


def test_the_prefill_asks_the_host_once_per_video_and_not_per_token(model):
    """The number of questions stays the same when videos get longer."""
    counts = []
    for num_frames in (4, 12):
        inputs = {
            "input_ids": make_prompt(3, f"video:{num_frames}", 8, seed=1)[None],
            "pixel_values_videos": make_video(num_frames, seed=1, num_scenes=1)[None],
        }
        settings = copy.deepcopy(model.config.holitom_config)
        with torch.no_grad(), Watch() as watch:
            model(**inputs, holitom_config=settings)
        counts.append(len(watch.asked))
    assert counts[0] == counts[1]
