"""A Qwen2.5-VL of random weights that differ enough for its answers to depend on what it sees, and these answers."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2_5_VLModel, Qwen2VLImageProcessorPil

from holitom_hf import (
    HoliTomConfig,
    HoliTomQwen2_5_VLConfig,
    HoliTomQwen2_5_VLForConditionalGeneration,
    HoliTomQwen2_5_VLProcessor,
    HoliTomQwen2_5_VLVideoProcessor,
)
from holitom_hf.merging.outer import merge_videos

from .questions import ENGINE, SIDE, SMALL_QWEN
from .qwen2_5_vl import RATIOS, Request, drawn_requests, mixed_requests


SIZES = {"patch_size": 8, "merge_size": 2}
SIZE = {"shortest_edge": 16 * 16, "longest_edge": SIDE * SIDE}  # of a frame
VISION = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 128,
    "window_size": 4 * 16,  # of 4 x 4 tokens, at the edges of a frame of 7 x 7 smaller ones
    "fullatt_block_indexes": [1, 3],
    "tokens_per_second": 4,
    "initializer_range": 0.1,
}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]},
    "bos_token_id": None,
}


def write_small_qwen2_5_vl(folder: Path) -> None:
    """A checkpoint of ours; text and special tokens are those of the small Qwen3-VL."""
    tokenizer = AutoTokenizer.from_pretrained(SMALL_QWEN)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = HoliTomQwen2_5_VLConfig(
        vision_config=VISION,
        text_config=TEXT | ends | {"vocab_size": len(tokenizer)},
        tie_word_embeddings=False,
        holitom_config=HoliTomConfig(inner_merge_layer=2),
        **ids,
    )
    torch.manual_seed(0)
    model = HoliTomQwen2_5_VLForConditionalGeneration(config)
    model.generation_config.update(**ends)
    model.save_pretrained(folder)
    HoliTomQwen2_5_VLProcessor(
        Qwen2VLImageProcessorPil(**SIZES, size=SIZE),
        tokenizer,
        HoliTomQwen2_5_VLVideoProcessor(**SIZES, size=SIZE),
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)


@torch.no_grad()
def decoder_positions(model, inputs: dict, settings: HoliTomConfig) -> torch.Tensor:
    """(3, N): upstream's `get_rope_index` over the whole prompt, of the tokens that are left of it."""
    types = inputs["mm_token_type_ids"]
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    media = {name: inputs[name] for name in names if name in inputs}
    positions, _ = Qwen2_5_VLModel.get_rope_index(model.model, inputs["input_ids"], types, **media)
    encoded = model.model.get_video_features(
        inputs["pixel_values_videos"], inputs["video_grid_thw"], holitom_config=settings
    )
    merged, _ = merge_videos(model.model.video_tokens(encoded), settings)
    is_left = (types[0] != 2).clone()
    placeholders = (types[0] == 2).nonzero()[:, 0].split([video.num_input_tokens for video in merged])
    for places, video in zip(placeholders, merged):
        is_left[places[video.place]] = True
    return positions[:, 0, is_left]


def answered(model, processor, request: Request, settings: HoliTomConfig) -> dict:
    """
    The answer's tokens, how far the best of each step was from the second, logarithms of the probabilities of all
    tokens as the first one, and where the prompt's tokens stand.
    """
    inputs = processor(
        text=request.prompt,
        videos=[frames for frames, _ in request.videos],
        images=request.images or None,
        video_metadata=[without_sampling(metadata) for metadata in request.metadata],
        do_sample_frames=False,
        return_tensors="pt",
    )
    out = model.generate(
        **inputs,
        holitom_config=settings,
        max_new_tokens=8,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = [scores[0].topk(2).values for scores in out.scores]
    return {
        "ids": out.sequences[0, inputs["input_ids"].shape[1] :].tolist(),
        "margins": [float(first - second) for first, second in best],
        "logprobs": out.scores[0][0].log_softmax(-1).tolist(),
        "positions": decoder_positions(model, inputs, settings).tolist(),
    }


def without_sampling(metadata: dict) -> dict:
    """Metadata as transformers takes it: whether frames are sampled is an argument there."""
    return {name: value for name, value in metadata.items() if name != "do_sample_frames"}


@torch.no_grad()
def encoded(model, processor, request: Request, settings: HoliTomConfig) -> list:
    """Of a request's first video the tokens that are left of it (N, D), in the order of their places."""
    frames, _ = request.videos[0]
    inputs = processor.video_processor([frames], do_sample_frames=False, return_tensors="pt")
    output = model.model.get_video_features(**inputs, holitom_config=settings)
    (merged,), (tokens,) = merge_videos(model.model.video_tokens(output), settings)
    return tokens[merged.place.argsort()].tolist()


def small_qwen2_5_vl_answers(folder: Path, number: int = 8) -> dict:
    """
    What our class answers and encodes, by ratio.

    Args:
        folder: Where the checkpoint is written.
        number: Of drawn questions, before those of [`mixed_requests`].
    """
    write_small_qwen2_5_vl(folder)
    model = HoliTomQwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = HoliTomQwen2_5_VLProcessor.from_pretrained(folder)
    answers = {"answers": {}, "encoder": {}}
    requests = drawn_requests(number) + mixed_requests()
    for ratio in RATIOS:
        settings = HoliTomConfig(retention_ratio=ratio, position_ids="kept", **ENGINE)
        answers["answers"][ratio] = [answered(model, processor, request, settings) for request in requests]
        answers["encoder"][ratio] = [encoded(model, processor, requests[index], settings) for index in (0, number)]
    return answers
