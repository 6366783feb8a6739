"""Which layers of the decoder visual tokens can leave work out in, found on a few questions about videos."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..configuration import HoliTomConfig
from ..merging.inner import SKIP_FFN
from .answerer import Answerer, PreparedQuestion


@dataclass
class FoundLayer:
    """
    A layer that was found.

    Attributes:
        layer: From 0.
        divergence: Of the next token's distribution, in nats, where visual tokens leave the work out in this layer and
            in those that were found before it.
    """

    layer: int
    divergence: float


def rank_layers(
    next_token: Callable[[list[int]], torch.Tensor], layers: Sequence[int], num_found: int
) -> Iterable[FoundLayer]:
    """
    The layers whose work visual tokens miss least, one after another: each is the one that, beside those before it,
    changes the distribution of the next token least. Of equal ones it is the first.

    Args:
        next_token: (Q, vocabulary) logits of Q questions, from the layers that are left out.
        layers: To choose from.
        num_found: How many.

    Source: ShortV, arXiv 2504.00502, whose layer contribution is the first step's divergence, in the direction of its
        code: KL(without || with). It orders layers by this one step; to search on greedily is what the abstract of
        2501.19036 (RedundancyLens) says, whose measure could not be read.
    """
    whole = next_token([]).float().log_softmax(-1)
    found: list[int] = []
    for _ in range(num_found):
        divergences = {}
        for layer in layers:
            if layer not in found:
                without = next_token([*found, layer]).float().log_softmax(-1)
                divergences[layer] = float(F.kl_div(whole, without, reduction="batchmean", log_target=True))
        layer = min(divergences, key=lambda layer: (divergences[layer], layer))
        found.append(layer)
        yield FoundLayer(layer, divergences[layer])


@torch.inference_mode()
def find_skipped_layers(
    answerer: Answerer, questions: list[PreparedQuestion], settings: HoliTomConfig, num_found: int
) -> Iterable[FoundLayer]:
    """
    The layers in which `settings.inner_method` costs a model least, on some questions.

    Args:
        answerer: With its weights loaded.
        questions: Prepared and encoded.
        settings: With a method that skips; how videos are shortened before the decoder counts, too.
        num_found: How many layers, less than the decoder has.

    Raises:
        ValueError: If the decoder has not that many layers to choose from.
    """
    text = answerer.model.config.text_config
    types = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    layers = [i for i, kind in enumerate(types) if settings.inner_method == SKIP_FFN or kind == "full_attention"]
    if num_found > len(layers):
        raise ValueError(f"{num_found} layers can't be found among {len(layers)} that visual tokens can skip")

    def next_token(skipped: list[int]) -> torch.Tensor:
        used = replace(settings, skipped_layers=skipped)
        logits = [
            answerer.model(
                **question.features,
                mm_encoder_outputs={"video": question.encoded},
                holitom_config=used,
                use_cache=False,
                logits_to_keep=1,
            ).logits[:, -1]
            for question in questions
        ]
        return torch.cat(logits)

    yield from rank_layers(next_token, layers, num_found)
