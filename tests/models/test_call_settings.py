"""Settings of one call, and what `generate` tells of it."""

import inspect
from dataclasses import replace

import pytest
import torch

from holitom_hf import HoliTomConfig, HoliTomLlavaOnevisionForConditionalGeneration
from holitom_hf.answering.prompts import encode_videos
from holitom_hf.models.upstream import cache_of


@pytest.fixture(scope="module")
def inputs(subject):
    prompts = [subject.prompt(3, 5, 6), subject.prompt(2, 7, 4, seed=1)]
    return subject.inputs(prompts, [subject.video(5, seed=1), subject.video(7, seed=2)])


# The models' are retention_ratio 0.3 and inner_merge_layer 2, of 5 layers: the default 18 would be refused.
OVERLAYS = [
    {"retention_ratio": 0.1},
    {"inner_merge_layer": 3, "similarity_threshold": 0.6},
    {"outer_method": "none"},
    {"inner_method": "none"},
]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=str)
def test_a_dictionary_changes_the_models_settings_for_a_call(subject, inputs, overlay):
    model, settings = subject.model, subject.config.holitom_config
    whole = replace(settings, **overlay)
    with torch.no_grad():
        assert torch.equal(
            model(**inputs, holitom_config=overlay).logits, model(**inputs, holitom_config=whole).logits
        )
        videos = [encode_videos(model, inputs, holitom_config=given) for given in (overlay, whole)]
    assert [video.importance is None for video in videos] == [overlay == {"outer_method": "none"}] * 2
    outputs = [
        model.generate(**inputs, max_new_tokens=4, do_sample=False, holitom_config=given, return_dict_in_generate=True)
        for given in (overlay, whole)
    ]
    assert torch.equal(*(output.sequences for output in outputs))
    lengths = [[cache_of(output).get_seq_length(layer) for layer in range(5)] for output in outputs]
    assert lengths[0] == lengths[1]
    assert model.config.holitom_config == settings


def test_settings_that_are_not_passed_as_a_dictionary_replace_the_models(subject, inputs, tmp_path):
    model = subject.model
    with pytest.raises(ValueError, match=r"inner_merge_layer is 18, but the decoder has 5 layers.*\(.* is 3 here\)"):
        model(**inputs, holitom_config=HoliTomConfig(retention_ratio=0.3))
    with pytest.raises(ValueError, match="inner_merge_layer is 18"):
        model.generate(**inputs, max_new_tokens=1, holitom_config="llava-onevision-7b-r15")
    with pytest.raises(ValueError, match="has no field 'ratio'"):
        model.generate(**inputs, max_new_tokens=1, holitom_config={"ratio": 0.1})
    HoliTomConfig(retention_ratio=0.5, inner_merge_layer=None).save_pretrained(tmp_path)
    with torch.no_grad():
        given = model(**inputs, holitom_config=tmp_path)
    assert given.inner_keep is None


def test_a_file_of_settings_is_read_once_for_an_answer(subject, inputs, tmp_path, monkeypatch):
    model = subject.model
    HoliTomConfig(retention_ratio=0.5, inner_merge_layer=None).save_pretrained(tmp_path)
    reads = []
    read = HoliTomConfig.from_pretrained
    monkeypatch.setattr(HoliTomConfig, "from_pretrained", lambda *given: reads.append(given) or read(*given))
    model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, holitom_config=str(tmp_path))
    assert len(reads) == 1


def test_loading_overlays_what_the_checkpoint_or_a_given_configuration_says(subject, tmp_path):
    model, settings = subject.model, subject.config.holitom_config
    model.save_pretrained(tmp_path)
    load = type(model).from_pretrained
    expected = replace(settings, similarity_threshold=0.6)
    overlay = {"similarity_threshold": 0.6}
    assert load(tmp_path, holitom_config=overlay).config.holitom_config == expected
    config = load(tmp_path).config
    assert load(tmp_path, config=config, holitom_config=overlay).config.holitom_config == expected
    assert config.holitom_config == settings


@pytest.mark.parametrize(
    ("kwargs", "prompts"),
    [
        ({}, [0, 1]),
        ({"num_beams": 3}, [0, 1]),
        ({"num_beams": 3, "num_return_sequences": 2}, [0, 0, 1, 1]),
        ({"do_sample": True, "num_return_sequences": 2}, [0, 0, 1, 1]),
    ],
)
def test_generate_tells_what_was_merged_for_every_sequence(subject, inputs, kwargs, prompts):
    model = subject.model
    output = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, **{"do_sample": False} | kwargs)
    with torch.no_grad():
        forward = model(**inputs)
    assert len(output.merged_videos) == len(output.inner_keep) == len(output.sequences) == len(prompts)
    for row, prompt in enumerate(prompts):
        [merged], [expected] = output.merged_videos[row], forward.merged_videos[prompt]
        assert torch.equal(merged.assignment, expected.assignment)
        assert torch.equal(output.inner_keep[row], forward.inner_keep[prompt])


def test_the_example_of_the_main_class_runs(demo, capsys):
    text = inspect.getdoc(HoliTomLlavaOnevisionForConditionalGeneration)
    code = text.split("```python\n")[1].split("```")[0]
    code = code.replace("llava-hf/llava-onevision-qwen2-7b-ov-hf", str(demo / "model"))
    exec(code.replace("video.mp4", str(demo / "clip.mp4")).replace("=128", "=2"), {})
    printed = capsys.readouterr().out
    assert "MergedVideo(32 frames of 49 tokens in " in printed


def test_generate_tells_nothing_where_nothing_was_merged_or_no_cache_remembers_it(subject, inputs):
    model = subject.model
    more = {"max_new_tokens": 2, "do_sample": False}
    off = {"outer_method": "none", "inner_method": "none"}
    output = model.generate(**inputs, **more, return_dict_in_generate=True, holitom_config=off)
    assert (output.merged_videos, output.inner_keep) == (None, None)
    output = model.generate(**inputs, **more, return_dict_in_generate=True, use_cache=False)
    assert (output.merged_videos, output.inner_keep) == (None, None)
    assert isinstance(model.generate(**inputs, **more), torch.Tensor)
