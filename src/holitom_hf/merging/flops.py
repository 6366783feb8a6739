"""Operations from sizes alone: the decoder's by the paper's formula (HoliTom, section 4.1), and stage 1's."""

from collections.abc import Sequence


def prefill_flops(num_tokens: Sequence[int], hidden_size: int, intermediate_size: int) -> float:
    """
    Operations of a prompt's way through the decoder, as the paper and FastV count them.

    Args:
        num_tokens: n of every layer.
        hidden_size: d.
        intermediate_size: m.

    Returns:
        The sum of 4nd^2 + 2n^2d + 2ndm over the layers.

    Source: section 4.1.
    """
    return float(
        sum(
            4 * n * hidden_size**2 + 2 * n**2 * hidden_size + 2 * n * hidden_size * intermediate_size
            for n in num_tokens
        )
    )


def tokens_by_layer(num_outer: int, num_inner: int, inner_merge_layer: int | None, num_layers: int) -> list[int]:
    """Tokens that every decoder layer sees: `num_outer` before the layer of stage 3, `num_inner` from it on."""
    first_inner = num_layers if inner_merge_layer is None else inner_merge_layer
    return [num_outer if layer < first_inner else num_inner for layer in range(num_layers)]
