"""Checkpoints in vLLM: published names, config-only ones, and what overrides change."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from holitom_hf.bundled import BUNDLED_MODEL
from holitom_hf.vllm.weight_names import published_name

from .questions import SMALL_QWEN, drawn_questions, prompt_of


vllm = pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The bundled model as its authors would have published it: upstream's class, no settings, long names."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BUNDLED_MODEL / name, folder)
    processor = json.loads((BUNDLED_MODEL / "processor_config.json").read_text())
    processor.pop("auto_map", None)
    (folder / "processor_config.json").write_text(json.dumps(processor))
    config = json.loads((BUNDLED_MODEL / "config.json").read_text())
    del config["holitom_config"]
    config["architectures"] = ["LlavaOnevisionForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config))
    weights = {published_name(name): weight for name, weight in load_file(BUNDLED_MODEL / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def config_only(tmp_path_factory, published):
    """Settings alone, as `save_pretrained(config_only=True)` writes them."""
    folder = tmp_path_factory.mktemp("config_only")
    config = json.loads((BUNDLED_MODEL / "config.json").read_text())
    config["holitom_config"] |= {"retention_ratio": 0.3, "base_model_name_or_path": str(published)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def served(model, **kwargs):
    """Prompt tokens and answer of one question."""
    engine = vllm.LLM(
        model=str(model), dtype="float32", enforce_eager=True, max_model_len=2048, gpu_memory_utilization=0.1, **kwargs
    )
    frames, question, _ = next(drawn_questions(1))
    request = {"prompt": prompt_of(question), "multi_modal_data": {"video": frames}}
    output = engine.generate([request], vllm.SamplingParams(temperature=0, max_tokens=8))[0]
    engine.llm_engine.engine_core.shutdown()
    return len(output.prompt_token_ids), output.outputs[0].text


SETTINGS = {"holitom_config": {"retention_ratio": 0.3}}


@pytest.fixture(scope="module")
def ours():
    return served(BUNDLED_MODEL, hf_overrides=SETTINGS)


def test_a_published_checkpoint_a_config_only_one_and_ours_are_the_same_model(ours, published, config_only):
    architecture = {"architectures": ["HoliTomLlavaOnevisionForConditionalGeneration"]}
    assert served(published, hf_overrides=SETTINGS | architecture) == ours
    assert served(published, hf_config_path=str(config_only)) == ours
    plain = served(BUNDLED_MODEL, hf_overrides={"holitom_config": {"retention_ratio": 1.0}})
    assert plain[0] > 2 * ours[0]


def test_checkpoints_that_carry_code_are_served_with_it(ours, transformers_checkpoints):
    whole, settings = (str(transformers_checkpoints / name) for name in ("whole", "settings"))
    assert served(whole, trust_remote_code=True, hf_overrides=SETTINGS) == ours
    assert served(BUNDLED_MODEL, trust_remote_code=True, hf_config_path=settings) == ours


def test_a_rate_for_all_of_a_server_is_a_setting(ours):
    assert served(BUNDLED_MODEL, mm_processor_kwargs={"retention_ratio": 0.3}) == ours


@pytest.mark.parametrize("ratio", [0, 7, "much"])
def test_a_rate_for_all_that_is_none_ends_the_server_with_its_name(ratio):
    vllm.plugins.load_general_plugins()
    arguments = vllm.EngineArgs(model=str(BUNDLED_MODEL), mm_processor_kwargs={"retention_ratio": ratio})
    with pytest.raises((ValueError, TypeError), match="retention_ratio"):
        arguments.create_model_config()


def test_a_config_only_checkpoint_alone_says_how_it_is_served(config_only, published):
    with pytest.raises(ValueError, match=f"vllm serve {published} --hf-config-path {config_only}"):
        vllm.LLM(model=str(config_only), max_model_len=2048)


def test_a_model_that_drafts_is_refused_where_tokens_keep_positions(transformers_models):
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    arguments = {"model": str(transformers_models / "qwen3_5"), "dtype": "bfloat16", "max_model_len": 2048}
    drafting = {"method": "mtp", "num_speculative_tokens": 1}
    with pytest.raises(ValueError, match="mtp"):
        vllm.EngineArgs(**arguments, speculative_config=drafting).create_engine_config()


def test_encoded_videos_are_refused_where_tokens_keep_positions():
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    arguments = vllm.EngineArgs(model=str(SMALL_QWEN), max_model_len=2048, enable_mm_embeds=True)
    with pytest.raises(ValueError, match="takes pixels alone"):
        arguments.create_model_config()
