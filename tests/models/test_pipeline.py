"""The pipelines: ours, and transformers' own on the same checkpoint."""

import json
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import TextStreamer, pipeline

from holitom_hf import HoliTomConfig, HoliTomProcessor, VideoTextToTextPipeline
from holitom_hf.bundled.questions import DrawnVideoQuestions
from holitom_hf.video.encoding import write_video


QUESTION = "How many shapes are there?"


@pytest.fixture(scope="module")
def pipe(demo):
    return pipeline("video-text-to-text", model=str(demo / "model"), trust_remote_code=True, device="cpu")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three clips of different length."""
    folder = tmp_path_factory.mktemp("clips")
    for number, (example, length) in enumerate(zip(DrawnVideoQuestions(30, num_frames=16), (16, 9, 12))):
        write_video(folder / f"{number}.mp4", example["video"][:length])
    return [str(folder / f"{number}.mp4") for number in range(3)]


def chat(video, question=QUESTION, key="path"):
    return [{"role": "user", "content": [{"type": "video", key: video}, {"type": "text", "text": question}]}]


def expected(pipe, video, question=QUESTION, num_frames=None, **kwargs):
    """What processor and generate give without a pipeline."""
    content = [{"type": "video"}, {"type": "text", "text": question}]
    text = pipe.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = pipe.processor(text=text, videos=video, num_frames=num_frames, return_tensors="pt")
    output = pipe.model.generate(**inputs, **({"max_new_tokens": 6, "do_sample": False} | kwargs))
    return pipe.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answers(outputs):
    return [output["generated_text"] for output in outputs]


def test_the_package_registers_its_pipeline_and_a_checkpoint_names_it(pipe, demo):
    assert type(pipe).__name__ == VideoTextToTextPipeline.__name__
    entry = json.loads((demo / "model" / "config.json").read_text())["custom_pipelines"]["video-text-to-text"]
    assert entry["impl"] == "pipeline_holitom.VideoTextToTextPipeline"
    own = VideoTextToTextPipeline(model=pipe.model, processor=pipe.processor, task="video-text-to-text")
    assert own.task == "video-text-to-text"


def test_a_chat_is_answered_as_generate_would(pipe, clips):
    output = pipe(chat(clips[0]), max_new_tokens=6, return_full_text=False)
    assert answers(output) == [expected(pipe, clips[0])]
    assert output[0]["input_text"] == chat(clips[0])


@pytest.fixture(scope="module")
def server(clips):
    """The clips' folder over HTTP on loopback."""
    handler = partial(SimpleHTTPRequestHandler, directory=Path(clips[0]).parent)
    handler.log_message = lambda *arguments: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("key", ["path", "url", "video"])
def test_a_video_may_be_named_by_any_key(pipe, clips, server, key):
    video = f"{server}/1.mp4" if key == "url" else clips[1]
    assert answers(pipe(chat(video, key=key), max_new_tokens=6, return_full_text=False)) == [expected(pipe, clips[1])]


def test_a_batch_of_chats_with_videos_of_different_length(pipe, clips):
    outputs = pipe([chat(clip) for clip in clips], max_new_tokens=6, return_full_text=False, batch_size=3)
    assert [answers(output) for output in outputs] == [[expected(pipe, clip)] for clip in clips]


def test_several_videos_in_the_chats_of_a_batch(pipe, clips):
    content = [{"type": "video", "path": clip} for clip in clips[:2]] + [{"type": "text", "text": QUESTION}]
    both = [{"role": "user", "content": content}]
    together = pipe([both, chat(clips[2])], max_new_tokens=6, return_full_text=False, batch_size=2)
    alone = [pipe(each, max_new_tokens=6, return_full_text=False) for each in (both, chat(clips[2]))]
    assert [answers(output) for output in together] == [answers(output) for output in alone]


def test_plain_text_and_videos(pipe, clips):
    prompts = [
        pipe.processor.apply_chat_template(chat(clip), add_generation_prompt=True, tokenize=False)
        for clip in clips[:2]
    ]
    outputs = pipe(text=prompts, videos=clips[:2], max_new_tokens=6, return_full_text=False)
    assert answers(outputs) == [expected(pipe, clip) for clip in clips[:2]]


def test_full_text_is_the_chat_with_the_answer(pipe, clips):
    [output] = pipe(chat(clips[0]), max_new_tokens=6)
    *question, answer = output["generated_text"]
    assert question == chat(clips[0])
    assert answer == {"role": "assistant", "content": expected(pipe, clips[0])}


def test_an_answer_that_was_begun_is_continued(pipe, clips):
    begun = [*chat(clips[0]), {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    [output] = pipe(begun, max_new_tokens=4)
    assert output["generated_text"][-1]["content"][-1]["text"].startswith("red")
    assert len(output["generated_text"]) == 2


def test_streaming(pipe, clips, capsys):
    streamer = TextStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
    [output] = pipe(chat(clips[0]), max_new_tokens=6, return_full_text=False, streamer=streamer)
    assert capsys.readouterr().out.strip() == output["generated_text"].strip()


def test_settings_for_one_call_and_for_the_pipeline(pipe, clips, demo):
    plain = HoliTomConfig(outer_method="none", inner_method="none")
    seen = []
    forward = pipe.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        pipe(chat(clips[0]), max_new_tokens=1, holitom_config=plain)
        pipe(chat(clips[0]), max_new_tokens=1, holitom_config={"retention_ratio": 0.1})
        pipe(chat(clips[0]), max_new_tokens=1)
        assert seen[0] > 16 * 49
        assert seen[1] <= seen[2] < 0.4 * seen[0]
        seen.clear()
        own = VideoTextToTextPipeline(
            model=pipe.model, processor=pipe.processor, task="video-text-to-text", holitom_config=plain
        )
        own(chat(clips[0]), generate_kwargs={"max_new_tokens": 1})
        own(chat(clips[0]), max_new_tokens=1, num_frames=8, vision_batch_size=3)
        assert 8 * 49 < seen[-1] < 9 * 49
    finally:
        forward.remove()
    with pytest.raises(ValueError, match="retention_ratio must be"):
        pipe(chat(clips[0]), holitom_config={"retention_ratio": 2})


def test_a_dictionary_changes_what_the_construction_gave_and_that_what_the_model_has(pipe, clips, monkeypatch):
    given = []
    generate = type(pipe.model).generate
    monkeypatch.setattr(
        type(pipe.model),
        "generate",
        lambda self, *args, **kwargs: (
            given.append(self.model.settings_for(kwargs.get("holitom_config"))) or generate(self, *args, **kwargs)
        ),
    )

    def made(**kwargs):
        own = VideoTextToTextPipeline(
            model=pipe.model, processor=pipe.processor, task="video-text-to-text", max_new_tokens=1, **kwargs
        )
        return lambda **kwargs: (own(chat(clips[0]), **kwargs), given.pop())[1].to_dict()

    model = pipe.model.config.holitom_config.to_dict()
    assert made()(holitom_config={"retention_ratio": 0.1}) == model | {"retention_ratio": 0.1}
    ask = made(holitom_config={"similarity_threshold": 0.7})
    assert ask() == model | {"similarity_threshold": 0.7}
    assert ask(holitom_config={"retention_ratio": 0.1}) == model | {
        "similarity_threshold": 0.7,
        "retention_ratio": 0.1,
    }
    settings = HoliTomConfig(retention_ratio=0.5, inner_merge_layer=3)
    assert ask(holitom_config=settings) == settings.to_dict()
    ask = made(holitom_config=settings)
    assert ask(holitom_config={"retention_ratio": 0.1}) == settings.to_dict() | {"retention_ratio": 0.1}
    with pytest.raises(ValueError, match=r"inner_merge_layer is 18, .* \(layer 18 of 28 is 5 here\)"):
        ask(holitom_config="llava-onevision-7b-r15")


def test_a_construction_keeps_what_a_call_does_not_change(pipe, clips):
    own = VideoTextToTextPipeline(
        model=pipe.model,
        processor=pipe.processor,
        task="video-text-to-text",
        generate_kwargs={"max_new_tokens": 3},
    )
    [output] = own(chat(clips[0]), return_full_text=False)
    assert output["generated_text"] == expected(pipe, clips[0], max_new_tokens=3)


def test_a_generator_of_chats(pipe, clips):
    outputs = list(pipe((chat(clip) for clip in clips), max_new_tokens=6, return_full_text=False))
    assert [answers(output) for output in outputs] == [[expected(pipe, clip)] for clip in clips]


@pytest.mark.parametrize("task", ["any-to-any", "image-text-to-text"])
def test_pipelines_of_transformers_on_the_same_checkpoint(pipe, demo, clips, task):
    upstream = pipeline(task, model=str(demo / "model"), trust_remote_code=True, device="cpu")
    assert type(upstream.model).__name__ == "HoliTomLlavaOnevisionForConditionalGeneration"
    output = upstream(text=chat(clips[0]), max_new_tokens=6, return_full_text=False)
    assert answers(output) == [expected(pipe, clips[0])]


def test_pipelines_without_trust_are_upstreams(demo, clips):
    upstream = pipeline("any-to-any", model=str(demo / "model"), device="cpu")
    assert type(upstream.model).__name__ == "LlavaOnevisionForConditionalGeneration"
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("video-text-to-text", model=str(demo / "model"))


def test_a_saved_pipeline_loads_again(pipe, clips, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = pipeline("video-text-to-text", model=str(tmp_path), trust_remote_code=True, device="cpu")
    assert answers(again(chat(clips[0]), max_new_tokens=6, return_full_text=False)) == [expected(pipe, clips[0])]


def test_where_holitom_hf_is_not_installed(pipe, demo, clips, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "sys.modules['holitom_hf'] = None\n"  # importing the package now fails
        "from transformers import pipeline\n"
        f"pipe = pipeline('video-text-to-text', model={str(demo / 'model')!r}, trust_remote_code=True, device='cpu')\n"
        f"print(repr(pipe({chat(clips[0])!r}, max_new_tokens=6, return_full_text=False)[0]['generated_text']))\n"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert result.stdout.strip().splitlines()[-1] == repr(expected(pipe, clips[0]))


def test_the_processor_of_a_pipeline_is_ours(pipe):
    assert type(pipe.processor).__name__ == HoliTomProcessor.__name__
    assert pipe.model.dtype == torch.float32
