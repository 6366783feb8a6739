"""Placeholders that a model writes itself are text: without a cache they come back as input."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from holitom_hf.models.upstream import cache_of

from .qwen import IMAGE, VIDEO, inputs_of, make_patches, make_prompt, video


QWEN = pytest.mark.parametrize("subject", ["qwen2_5_vl", "qwen3_vl"], indirect=True)


class Forced(LogitsProcessor):
    """Lets every row write these tokens first."""

    def __init__(self, tokens: list[int], prompt_length: int):
        self.tokens, self.prompt_length = tokens, prompt_length

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.prompt_length
        if step < len(self.tokens):
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self.tokens[step]] = 0
        return scores


@QWEN
@pytest.mark.parametrize("token", [VIDEO, IMAGE])
@pytest.mark.parametrize("has_image", [False, True])
@pytest.mark.parametrize("inner_method", ["merge", "none"])
def test_generation_without_a_cache_is_that_with_one(subject, token, has_image, inner_method):
    grid = (4, 6, 8)
    images = [((1, 4, 4), make_patches((1, 4, 4), 9))] if has_image else []
    is_timed = subject.name == "qwen3_vl"
    rows = [
        make_prompt(*([(4, 4)] if has_image and row == 0 else []), before, grid, after, seed=row, is_timed=is_timed)
        for row, (before, after) in enumerate([(2, 3), (4, 5)])
    ]
    inputs = inputs_of(rows, [video(grid, 1), video(grid, 2)], images)
    length = inputs["input_ids"].shape[1]
    with_cache, without = (
        subject.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=6,
            use_cache=use_cache,
            holitom_config={"inner_method": inner_method},
            logits_processor=LogitsProcessorList([Forced([5, token, token, 7], length)]),
            return_dict_in_generate=True,
            output_logits=True,
        )
        for use_cache in (True, False)
    )
    assert with_cache.sequences[:, length : length + 4].tolist() == [[5, token, token, 7]] * 2
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(torch.stack(with_cache.logits), torch.stack(without.logits), atol=1e-4, rtol=1e-4)


@QWEN
def test_a_whole_conversation_with_one_in_an_answer(subject):
    """Passed at once, it is what the cache has come to turn by turn."""
    prompt, clip = subject.prompt(3, 4, 5, seed=1), subject.video(4, seed=2)
    answer = torch.tensor([9, VIDEO, 11])
    inputs = subject.inputs([prompt], [clip])
    whole = subject.inputs([torch.cat([prompt, answer])], [clip])
    whole["mm_token_type_ids"][:, len(prompt) :] = 0
    with torch.no_grad():
        first = subject.model(**inputs, use_cache=True)
        expected = subject.model(input_ids=answer[None], cache=cache_of(first))
        found = subject.model(**whole, prompt_length=len(prompt))
    torch.testing.assert_close(found.logits[:, -3:], expected.logits, atol=1e-4, rtol=1e-4)
