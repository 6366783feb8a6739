"""How many videos a step encodes: no more than of an uncompressed model, whatever is left of them."""

from itertools import count
from types import SimpleNamespace

import pytest

from holitom_hf import HoliTomConfig


vllm = pytest.importorskip("vllm")
BUDGET, VIDEO, RATIO = 2048, 784, 0.15
NUMBERS = count()


def feature_of(modality="video", num_tokens=VIDEO, ratio=None):
    """An input as the scheduler has it: what is left of its tokens, and its own rate beside its pixels."""
    import torch
    from vllm.multimodal.inputs import (
        MultiModalBatchedField,
        MultiModalFeatureSpec,
        MultiModalFieldElem,
        MultiModalKwargsItem,
        PlaceholderRange,
    )

    elem = MultiModalFieldElem(torch.tensor(ratio or RATIO, dtype=torch.float64), MultiModalBatchedField())
    left = num_tokens if modality == "image" else round(num_tokens * (ratio or RATIO))
    return MultiModalFeatureSpec(
        data=None if ratio is None else MultiModalKwargsItem({"retention_ratio": elem}),
        modality=modality,
        identifier=str(next(NUMBERS)),
        mm_position=PlaceholderRange(offset=0, length=left),
    )


def scheduled(manager, features):
    """Requests with one input each, and how many of them one step takes."""
    taken = 0
    for feature in features:
        request = SimpleNamespace(
            request_id=feature.identifier,
            mm_features=[feature],
            get_num_encoder_embeds=lambda _, feature=feature: feature.mm_position.get_num_embeds(),
        )
        if not manager.can_allocate(request, 0, BUDGET, 0):
            break
        manager.allocate(request, 0)
        taken += 1
    return taken


@pytest.fixture
def manager():
    from holitom_hf.vllm.encoder_budget import UncompressedBudgetManager

    config = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(holitom_config=HoliTomConfig(retention_ratio=RATIO).to_dict())
        ),
        scheduler_config=SimpleNamespace(max_num_encoder_input_tokens=BUDGET),
    )
    return UncompressedBudgetManager.create_manager(cache_size=10 * BUDGET, vllm_config=config)


@pytest.mark.parametrize("ratio", [None, 0.05, RATIO, 1.0])
def test_a_step_takes_as_many_videos_as_uncompressed(manager, ratio):
    assert scheduled(manager, [feature_of(ratio=ratio) for _ in range(9)]) == BUDGET // VIDEO


def test_the_next_step_begins_anew_and_images_count_as_they_are(manager):
    assert scheduled(manager, [feature_of(), feature_of("image"), feature_of("image")]) == 2
    assert scheduled(manager, [feature_of("image")]) == 0
    manager.get_manager_metadata()
    assert scheduled(manager, [feature_of("image"), feature_of(), feature_of()]) == 2


def test_what_is_larger_than_a_step_is_encoded_alone(manager):
    long = feature_of(num_tokens=5 * BUDGET, ratio=0.1)
    assert scheduled(manager, [feature_of(), long]) == 1
    manager.get_manager_metadata()
    assert scheduled(manager, [long, feature_of()]) == 1


def test_the_engine_encodes_as_many_in_a_step_as_uncompressed(monkeypatch):
    from holitom_hf.bundled import BUNDLED_MODEL

    from .questions import drawn_questions, prompt_of

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that the scheduler is in this process
    engine = vllm.LLM(
        model=str(BUNDLED_MODEL),
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_batched_tokens=BUDGET,
        gpu_memory_utilization=0.1,
    )
    scheduler, steps = engine.llm_engine.engine_core.engine_core.scheduler, []
    schedule = scheduler.schedule

    def seen(*args, **kwargs):
        output = schedule(*args, **kwargs)
        steps.append(sum(map(len, output.scheduled_encoder_inputs.values())))
        return output

    monkeypatch.setattr(scheduler, "schedule", seen)
    most = []
    for ratio in (1.0, 0.15, 0.05):
        requests = [
            {
                "prompt": prompt_of(question),
                "multi_modal_data": {"video": frames},
                "mm_processor_kwargs": {"retention_ratio": ratio},
            }
            for frames, question, _ in list(drawn_questions(48))[::8]
        ]
        steps.clear()
        engine.generate(requests, vllm.SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
        assert sum(steps) == len(requests)
        most.append(max(steps))
    assert most == [2, 2, 2]
