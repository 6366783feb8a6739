"""Stage 3 in decoders of Llama's and Qwen's shape, against a plain loop over upstream's own layers."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model, Qwen3Config, Qwen3Model
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextConfig, Qwen3VLTextModel

from holitom_hf.merging.inner import INNER_METHODS
from holitom_hf.models.decoder import HoliTomDecoderMixin
from holitom_hf.sequence.inner_stage import InnerStage

from ..reference import plain_inner_merge


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
INTERLEAVED = {"rope_parameters": MROPE["rope_parameters"] | {"mrope_interleaved": True}}
# Upstream's class, its configuration, position axes, layers with DeepStack features behind them.
DECODERS = {
    "llama": (LlamaModel, LlamaConfig(**SIZES), 1, 0),
    "qwen2": (Qwen2Model, Qwen2Config(**SIZES), 1, 0),
    "qwen3, q and k norms": (Qwen3Model, Qwen3Config(**SIZES, head_dim=8), 1, 0),
    "qwen2.5-vl, three axes": (Qwen2_5_VLTextModel, Qwen2_5_VLTextConfig(**SIZES, **MROPE), 3, 0),
    "qwen3-vl, three axes and deepstack": (
        Qwen3VLTextModel,
        Qwen3VLTextConfig(**SIZES, **INTERLEAVED, head_dim=8),
        3,
        3,
    ),
}
LENGTH, VIDEO = 20, list(range(3, 15))


def make(name: str, implementation: str = "sdpa"):
    """A decoder with stage 3, with random weights."""
    upstream, config, axes, _ = DECODERS[name]
    torch.manual_seed(0)
    cls = type(f"HoliTom{upstream.__name__}", (HoliTomDecoderMixin, upstream), {"num_position_axes": axes})
    decoder = cls._from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for norm in (module for name, module in decoder.named_modules() if name.endswith(("q_norm", "k_norm"))):
            norm.weight.uniform_(0.5, 2.0)
    return decoder


def draw(name: str, batch: int = 1, seed: int = 1):
    """Embeddings, positions with gaps, and features for the first layers where the decoder takes them."""
    random = torch.Generator().manual_seed(seed)
    _, config, axes, num_deep = DECODERS[name]
    embeds = torch.randn(batch, LENGTH, config.hidden_size, generator=random)
    shape = (batch, LENGTH) if axes == 1 else (axes, batch, LENGTH)
    positions = torch.randint(1, 4, shape, generator=random).cumsum(-1)
    deep = [torch.randn(batch * len(VIDEO), config.hidden_size, generator=random) for _ in range(num_deep)]
    return embeds, positions, deep


def visual_arguments(deep: list[torch.Tensor], batch: int = 1) -> dict:
    mask = torch.zeros(batch, LENGTH, dtype=torch.bool)
    mask[:, VIDEO] = True
    return {"visual_pos_masks": mask, "deepstack_visual_embeds": deep} if deep else {}


@torch.no_grad()
def plain_loop(decoder, embeds, positions, deep, layer: int, ratio: float, fold: bool, query: int, kept=None):
    """
    One row without a cache, by the layers' own eager attention. Returns its last hidden states and what survived.

    `kept` overrides the choice, for a later pass with more tokens behind the prompt.
    """
    hidden, alive, weights = embeds, list(range(embeds.shape[1])), {}
    deep = [dict(zip(VIDEO, values)) for values in deep]
    for index, block in enumerate(decoder.layers):
        if index == layer:
            if kept is None:
                importance = weights["last"][0].float().mean(0)[query]
                merged, kept, _ = plain_inner_merge(hidden[0], importance, VIDEO, ratio, fold)
                hidden = merged[None]
            else:
                hidden = hidden[:, kept]
            alive = kept
        place = positions[..., alive]
        n = len(alive)
        mask = torch.full((n, n), torch.finfo(hidden.dtype).min).triu(1)[None, None]
        handle = block.self_attn.register_forward_hook(lambda _, __, out: weights.update(last=out[1]))
        hidden = block(hidden, attention_mask=mask, position_embeddings=decoder.rotary_emb(hidden, place))
        handle.remove()
        if index < len(deep):
            hidden = hidden.clone()
            for where, token in enumerate(alive):
                if token in deep[index]:
                    hidden[0, where] += deep[index][token]
    return decoder.norm(hidden), alive


def stage_for(layer: int, ratio: float, fold: bool, query: int, batch: int = 1) -> InnerStage:
    return InnerStage(
        layer=layer,
        past_mask=torch.ones(batch, 0, dtype=torch.bool),
        mask=torch.ones(batch, LENGTH, dtype=torch.bool),
        videos=[[torch.tensor(VIDEO)]] * batch,
        merge_ratio=ratio,
        fold=fold,
        num_real=[LENGTH] * batch,
        query=torch.full((batch,), query),
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("layer", [1, 2, 3, 4])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_it_is_the_plain_loop(name, layer, fold, implementation):
    embeds, positions, deep = draw(name)
    expected, alive = plain_loop(make(name, "eager"), embeds, positions, deep, layer, 0.5, fold, query=LENGTH - 2)
    for cache in (None, DynamicCache()):
        outputs = make(name, implementation)(
            inputs_embeds=embeds,
            position_ids=positions,
            inner_stage=stage_for(layer, 0.5, fold, LENGTH - 2),
            cache=cache,
            use_cache=cache is not None,
            **visual_arguments(deep),
        )
        assert outputs.survivors.row(0).tolist() == alive
        torch.testing.assert_close(outputs.last_hidden_state, expected, atol=2e-5, rtol=1e-4)
        if cache is not None:
            assert [cache.get_seq_length(i) for i in range(5)] == [LENGTH] * layer + [len(alive)] * (5 - layer)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_rows_of_a_batch_choose_for_themselves(name):
    embeds, positions, deep = draw(name, batch=2)
    decoder = make(name)
    outputs = decoder(
        inputs_embeds=embeds,
        position_ids=positions,
        inner_stage=stage_for(2, 0.5, True, LENGTH - 1, batch=2),
        **visual_arguments(deep, batch=2),
    )
    for row in range(2):
        of_row = [values.view(2, len(VIDEO), -1)[row] for values in deep]
        places = positions[..., row : row + 1, :]
        expected, alive = plain_loop(
            make(name, "eager"), embeds[row : row + 1], places, of_row, 2, 0.5, True, LENGTH - 1
        )
        assert outputs.survivors.row(row).tolist() == alive
        torch.testing.assert_close(outputs.last_hidden_state[row : row + 1], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_of_a_question_the_largest_attention_of_any_token_and_head_counts(name):
    embeds, positions, deep = draw(name, batch=2)
    decoder, eager = make(name), make(name, "eager")
    stage, weights = stage_for(2, 0.5, False, LENGTH - 1, batch=2), {}
    lasts, stage.asked = [18, 16], INNER_METHODS["prune_by_question"]
    stage.query = torch.tensor(lasts)
    outputs = decoder(
        inputs_embeds=embeds, position_ids=positions, inner_stage=stage, **visual_arguments(deep, batch=2)
    )
    handle = eager.layers[1].self_attn.register_forward_hook(lambda _, __, out: weights.update(asked=out[1]))
    eager(inputs_embeds=embeds, position_ids=positions, **visual_arguments(deep, batch=2))
    handle.remove()
    for row, last in enumerate(lasts):
        queries = range(VIDEO[-1] + 1, last + 1)
        received = {i: max(float(head[q][i]) for head in weights["asked"][row] for q in queries) for i in VIDEO}
        best = sorted(sorted(VIDEO, key=lambda i: -received[i])[:6])
        assert [i for i in outputs.survivors.row(row).tolist() if i in VIDEO] == best


@pytest.mark.parametrize("name", [name for name in DECODERS if "deepstack" not in name])
@torch.no_grad()
def test_going_on_with_its_cache_is_the_loop_over_everything(name):
    """Not with DeepStack features: a later token has none, and upstream's loop is the same as here."""
    embeds, positions, _ = draw(name)
    random = torch.Generator().manual_seed(9)
    cache = DynamicCache()
    decoder = make(name)
    outputs = decoder(
        inputs_embeds=embeds,
        position_ids=positions,
        inner_stage=stage_for(3, 0.5, False, LENGTH - 1),
        cache=cache,
        use_cache=True,
    )
    kept = outputs.survivors.row(0).tolist()
    for step in range(3):
        new = torch.randn(1, 1, 32, generator=random)
        place = positions.amax() + 1 + step
        given = torch.full((1, 1), int(place))  # text stands at one place on all axes
        last = decoder(
            inputs_embeds=new,
            position_ids=given,
            inner_stage=InnerStage(layer=3),
            cache=cache,
            use_cache=True,
        ).last_hidden_state
        embeds = torch.cat([embeds, new], 1)
        positions = torch.cat([positions, torch.full_like(positions[..., :1], int(place))], -1)
        kept.append(LENGTH + step)
        expected, _ = plain_loop(make(name, "eager"), embeds, positions, [], 3, 0.5, False, 0, kept=kept)
        torch.testing.assert_close(last, expected[:, -1:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_without_a_stage_it_is_upstreams(name):
    embeds, positions, deep = draw(name)
    decoder = make(name)
    upstream = DECODERS[name][0]._from_config(DECODERS[name][1], attn_implementation="sdpa").eval()
    upstream.load_state_dict(decoder.state_dict())
    inputs = {"inputs_embeds": embeds, "position_ids": positions, **visual_arguments(deep)}
    assert torch.equal(decoder(**inputs).last_hidden_state, upstream(**inputs).last_hidden_state)


def test_a_layer_that_does_not_see_everything_cannot_be_asked():
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    decoder = type("Sliding", (HoliTomDecoderMixin, Qwen2Model), {})._from_config(config).eval()
    with pytest.raises(ValueError, match="this decoder has sliding windows: set inner_merge_layer=None"):
        decoder(
            inputs_embeds=torch.zeros(1, LENGTH, 32),
            position_ids=torch.arange(LENGTH)[None],
            inner_stage=stage_for(2, 0.5, True, 19),
        )

    class EveryOther(HoliTomDecoderMixin, LlamaModel):
        def attention_layers(self):
            return [1, 3]

    decoder = EveryOther._from_config(LlamaConfig(**SIZES)).eval()
    with pytest.raises(ValueError, match=r"inner_merge_layer is 1, but .* choose one of 2, 4, or None"):
        decoder(
            inputs_embeds=torch.zeros(1, LENGTH, 32),
            position_ids=torch.arange(LENGTH)[None],
            inner_stage=stage_for(1, 0.5, True, 19),
        )
