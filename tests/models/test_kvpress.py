"""Presses of kvpress on a compressed video, against plain loops over the heads' keys: `make test-kvpress`."""

import numpy as np
import pytest
import torch

from holitom_hf import HoliTomLlavaOnevisionForConditionalGeneration, HoliTomProcessor
from holitom_hf.bundled import BUNDLED_MODEL
from holitom_hf.models.pressing import pressing
from holitom_hf.models.upstream import cache_of


# Its import wraps all attention functions of the process, so that it lies in an environment of its own.
kvpress = pytest.importorskip("kvpress")

RATIO, WINDOW, KERNEL, SINKS, SAFE, STEPS = 0.5, 4, 5, 2, 0.2, 6


@pytest.fixture(scope="module")
def model():
    return HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(BUNDLED_MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def inputs():
    processor = HoliTomProcessor.from_pretrained(BUNDLED_MODEL)
    scenes = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    content = [{"type": "video"}, {"type": "text", "text": "What happens?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=prompt, videos=scenes.repeat(8, 0), return_tensors="pt")


@pytest.fixture(scope="module", params=[5, None], ids=["stage 3", "no stage 3"])
def prefilled(request, model, inputs):
    """Settings and, without a press, their output with attention weights (H, N, N) of every layer."""
    settings = {"inner_merge_layer": request.param}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, holitom_config=settings, output_attentions=True)
    model.set_attn_implementation("sdpa")
    return settings, output


def by_norm(keys, attention):
    return [[-float(key.norm()) for key in head] for head in keys]


def by_place(keys, attention):
    """StreamingLLM: the first ones and the last ones."""
    length = keys.shape[1]
    return [[length if place < SINKS else place for place in range(length)]] * len(keys)


def by_window(keys, attention):
    """SnapKV: attention of the last queries, averaged over them, over neighbors and over a head's group."""
    num_heads, length = keys.shape[:2]
    groups = len(attention) // num_heads
    scores = []
    for head in range(num_heads):
        received = [
            float(attention[head * groups : (head + 1) * groups, -WINDOW:, place].mean())
            for place in range(length - WINDOW)
        ]
        near = [received[max(0, p - KERNEL // 2) : p + KERNEL // 2 + 1] for p in range(len(received))]
        scores.append([sum(values) / KERNEL for values in near] + [2.0] * WINDOW)
    return scores


def check_kept(scores: list[list[float]], kept: list[list[int]], over_heads: bool) -> None:
    """Whether a layer's heads keep their best ones; a tie may go either way, since equal words have equal norms."""
    number, heads = int(len(scores[0]) * (1 - RATIO)), range(len(scores))
    safe = int(number * SAFE) if over_heads else 0  # AdaKV: one budget for a layer, of which each head has so many
    left = [[value for place, value in enumerate(scores[h]) if place not in kept[h]] for h in heads]
    best = [sorted((scores[h][place] for place in kept[h]), reverse=True) for h in heads]
    for group in [heads] if over_heads else [[h] for h in heads]:
        assert sum(len(best[h]) for h in group) == number * len(group)
        assert all(len(best[h]) >= safe for h in group)
        assert all(best[h][-1] >= max(left[h]) - 1e-5 for h in group if left[h])
        free = [value for h in group for value in best[h][safe:]]
        assert min(free) >= max(value for h in group for value in left[h]) - 1e-5


def places_of(keys: torch.Tensor, among: torch.Tensor) -> list[int]:
    """Where keys (n, d) stand in (N, d)."""
    differences = (keys[:, None] - among).abs().amax(-1)
    assert differences.amin(1).max() < 1e-3
    places = differences.argmin(1).tolist()
    assert len(set(places)) == len(keys)
    return sorted(places)


PRESSES = {
    "knorm": (lambda: kvpress.KnormPress(RATIO), by_norm),
    "streaming": (lambda: kvpress.StreamingLLMPress(RATIO, n_sink=SINKS), by_place),
    "snapkv": (lambda: kvpress.SnapKVPress(RATIO, WINDOW, KERNEL), by_window),
    "adakv": (lambda: kvpress.AdaKVPress(kvpress.KnormPress(RATIO), SAFE), by_norm),
    "adakv snapkv": (
        lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(RATIO, WINDOW, KERNEL), SAFE),
        by_window,
    ),
}


def turned(states, position, theta):
    """(..., d) rotated to a position."""
    half = states.shape[-1] // 2
    angles = position / theta ** (torch.arange(half) / half)
    first, second = states[..., :half], states[..., half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def plain_answer(model, cached, token: int, position: int, theta: float) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy steps of a Qwen2 decoder over the keys and values that each head of each layer has, a list of lists."""
    decoder, tokens, logits = model.model.language_model, [], []
    for step in range(STEPS):
        hidden = decoder.embed_tokens.weight[token]
        for layer, heads in zip(decoder.layers, cached):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            queries = turned(attention.q_proj(normed).view(-1, attention.head_dim), position + step, theta)
            new_keys = turned(attention.k_proj(normed).view(-1, attention.head_dim), position + step, theta)
            new_values = attention.v_proj(normed).view(-1, attention.head_dim)
            groups, mixed = len(queries) // len(heads), []
            for head in range(len(heads)):
                keys, values = heads[head]
                heads[head] = torch.cat([keys, new_keys[head][None]]), torch.cat([values, new_values[head][None]])
            for index, query in enumerate(queries):
                keys, values = heads[index // groups]
                mixed.append((keys @ query / attention.head_dim**0.5).softmax(0) @ values)
            hidden = hidden + attention.o_proj(torch.cat(mixed))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits.append(model.lm_head(decoder.norm(hidden)))
        token = int(logits[-1].argmax())
        tokens.append(token)
    return tokens, logits


@pytest.mark.parametrize("name", PRESSES)
@torch.no_grad()
def test_a_press_keeps_what_a_plain_loop_keeps_and_generation_goes_on_from_it(model, inputs, prefilled, name):
    press, score = PRESSES[name]
    settings, output = prefilled
    layers, cached = cache_of(output).layers, []

    with pressing(model, press()):
        pressed = cache_of(model(**inputs, holitom_config=settings))
        answer = model.generate(
            **inputs,
            holitom_config=settings,
            do_sample=False,
            max_new_tokens=STEPS + 1,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    modules = [layer.self_attn for layer in model.model.language_model.layers]
    for layer, after, attention, module in zip(layers, pressed.layers, output.attentions, modules):
        num_heads, length = layer.keys.shape[1:3]
        if "adakv" in name:  # masked, not dropped
            masked = set(zip(*(index.tolist() for index in module.masked_key_indices[1:])))
            kept = [[place for place in range(length) if (h, place) not in masked] for h in range(num_heads)]
            assert after.keys.shape == layer.keys.shape
        else:
            kept = [places_of(after.keys[0, h], layer.keys[0, h]) for h in range(num_heads)]
        check_kept(score(layer.keys[0], attention[0]), kept, "adakv" in name)
        cached.append([(layer.keys[0, h, places], layer.values[0, h, places]) for h, places in enumerate(kept)])

    first = int(answer.sequences[0, inputs.input_ids.shape[1]])
    theta = model.config.text_config.rope_parameters["rope_theta"]
    tokens, logits = plain_answer(model, cached, first, layers[0].keys.shape[2], theta)
    assert answer.sequences[0, inputs.input_ids.shape[1] + 1 :].tolist() == tokens
    for ours, plain in zip(answer.logits[1:], logits):
        assert torch.allclose(ours[0], plain, atol=2e-3)


@torch.no_grad()
def test_a_second_question_goes_on_from_a_pressed_cache(model, inputs, prefilled):
    """Several tokens at once, with the caller's full-length mask, as one by one."""
    settings, _ = prefilled
    question = inputs.input_ids[:, -5:]
    results = []
    for chunk in (5, 1):
        with pressing(model, kvpress.KnormPress(RATIO)):
            cache = cache_of(model(**inputs, holitom_config=settings))
        mask, logits = inputs.attention_mask, []
        for tokens in question.split(chunk, dim=1):
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
            logits.append(model(input_ids=tokens, attention_mask=mask, cache=cache).logits)
        results.append(torch.cat(logits, dim=1))
    assert torch.allclose(*results, atol=1e-3)


@torch.no_grad()
def test_what_is_refused_and_what_is_left_behind(model, inputs):
    attentions = [layer.self_attn for layer in model.model.language_model.layers]
    hooks = [list(attention._forward_hooks) for attention in attentions]  # transformers leaves some of its own
    with (
        pytest.raises(ValueError, match="equally long"),
        pressing(model, kvpress.PyramidKVPress(RATIO, window_size=WINDOW)),
    ):
        model(**inputs)
    text = inputs.input_ids[:, -5:]
    with pytest.raises(ValueError, match="nothing in the cache"), pressing(model, kvpress.KnormPress(RATIO)):
        model(input_ids=text)
    assert [list(attention._forward_hooks) for attention in attentions] == hooks
    assert not any(hasattr(attention, "rotary_emb") for attention in attentions)
