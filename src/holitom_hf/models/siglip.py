"""The SigLIP vision tower over packed rows: only the patches of a video that change go through its layers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipEncoder, eager_attention_forward
from transformers.utils.generic import is_flash_attention_requested

from ..merging.patches import PatchPlan, plan_patches
from ..merging.settings import MergingSettings


class HoliTomSiglipAttention(SiglipAttention):
    """`SiglipAttention` whose queries may be fewer than its keys, in another number in every frame."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        patch_plan: PatchPlan | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Overrides SiglipAttention.forward.

        Args:
            hidden_states: (F, P, D); with a `patch_plan` its packed rows (1, N, D).
            attention_mask: As upstream, without a plan.
            patch_plan: Every row is a query among all P places of its frame.
        """
        if patch_plan is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        query, key, value = (
            project(hidden_states[0]).unflatten(-1, (self.num_heads, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        kwargs = {"is_causal": False, "scaling": self.scale, "dropout": self.dropout if self.training else 0.0}
        if is_flash_attention_requested(self.config):
            # One call for all frames, each with as many queries as it has rows.
            slot = patch_plan.slot.flatten()[None]
            inputs = (query[None], key[slot], value[slot])
            output, _ = attend(
                self, *(x.transpose(1, 2) for x in inputs), None, **kwargs, **patch_plan.variable_lengths
            )
            return self.out_proj(output.reshape(1, -1, self.embed_dim)), None
        batches, found_at = patch_plan.batches
        attended = []
        for frames, rows in batches:
            slot = patch_plan.slot[frames]
            inputs = (query[rows], key[slot], value[slot])
            output, _ = attend(self, *(x.transpose(1, 2) for x in inputs), None, **kwargs)
            attended.append(output.reshape(-1, self.embed_dim))
        return self.out_proj(torch.cat(attended)[found_at])[None], None


class HoliTomSiglipEncoder(SiglipEncoder):
    """`SiglipEncoder` of layers that can go over packed rows."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn = HoliTomSiglipAttention(config)

    def forward(self, inputs_embeds: torch.Tensor, *args, **kwargs) -> BaseModelOutput:
        """
        Overrides SiglipEncoder.forward: patches lie one behind the other in memory. As they come out of the patch
        embedding, every sum and norm of every layer would go over them in strides.
        """
        return super().forward(inputs_embeds.contiguous(), *args, **kwargs)


@dataclass
class PackedStates:
    """
    What a tower computed of some frames.

    Attributes:
        rows: By index of the hidden state, as transformers counts them: (n, D) rows.
        slot: (f, P), the row of every place of these frames.
        slots: By index, where that hidden state has other rows than the last one.
    """

    rows: dict[int, torch.Tensor]
    slot: torch.Tensor
    slots: dict[int, torch.Tensor] = field(default_factory=dict)

    def frames(self, index: int) -> torch.Tensor:
        """(f, P, D), a hidden state at every place."""
        return self.rows[index][self.slots.get(index, self.slot)]


class HoliTomSiglipVisionModel(SiglipVisionModel):
    """`SiglipVisionModel` that can leave out what repeats. As upstream's where nobody asks for that."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        # In place of the plain encoder that upstream's __init__ made. (Loading makes both without memory.)
        self.encoder = HoliTomSiglipEncoder(config)
        self.post_init()

    def encode_changes(
        self,
        chunks: Iterable[torch.Tensor],
        num_frames: list[int],
        settings: MergingSettings,
        wanted: set[int],
        frames_at_once: int,
        shared_from: int | None = None,
        **embedding_kwargs,
    ) -> tuple[PatchPlan, Iterator[PackedStates]]:
        """
        The hidden states of videos whose repeating patches are computed once per segment. (Ours, after HoliTom's
        stage 1; section 3.1 has the segments.)

        After `vision_reuse_layer` layers the plan is made; from there on a patch that repeats has the row of its
        segment's first frame, as key and value for the others, and at the end.

        Args:
            chunks: (f, C, H, W) pixels, together the frames of all videos.
            num_frames: Of every video.
            settings: Which layer, and what repeats.
            wanted: Indices of hidden states, counted from the front; the largest one decides how many layers run.
            frames_at_once: So many frames, or as many patches as they have, go through a layer at once.
            shared_from: Index of the first hidden state that has the same rows as the later ones; by default the one
                before the last. Here all have the same.
            embedding_kwargs: For the embeddings.

        Returns:
            The plan, and the states of some frames after others.
        """
        start, stop = settings.vision_reuse_layer, max(wanted)
        dense = self.first_states(chunks, start, wanted, embedding_kwargs)
        plan = plan_patches(dense[start], num_frames, settings)
        rows = {index: plan.gather(states) for index, states in dense.items()}
        del dense
        current = rows[start]
        num_patches = plan.slot.shape[1]
        num_rows = torch.from_numpy(plan.num_rows)
        plan.rows_by_layer = torch.stack(
            [torch.full_like(num_rows, num_patches)] * start + [num_rows] * (stop - start)
        )
        pieces = list(plan.pieces(frames_at_once))
        for index, layer in enumerate(self.encoder.layers[start:stop], start + 1):
            current = torch.cat([_layer_over(piece, layer, current, num_patches) for piece in pieces])
            if index in wanted:
                rows[index] = current
        states = (
            PackedStates({index: piece.take(rows[index]) for index in wanted}, piece.own_slot.to(current.device))
            for piece in pieces
        )
        return plan, states

    def first_states(
        self, chunks: Iterable[torch.Tensor], num_layers: int, wanted: set[int], embedding_kwargs: dict
    ) -> dict[int, torch.Tensor]:
        """(F, P, D) hidden states of whole frames by index, of all chunks: those that are wanted and the last one."""
        by_chunk = []
        for pixels in chunks:
            states = self.embeddings(pixels, **embedding_kwargs).contiguous()
            kept = {0: states} if 0 in wanted else {}
            for index, layer in enumerate(self.encoder.layers[:num_layers], 1):
                states = layer(states, None)
                if index in wanted or index == num_layers:
                    kept[index] = states
            by_chunk.append(kept)
        return {index: torch.cat([states.pop(index) for states in by_chunk]) for index in list(by_chunk[0])}


def _layer_over(piece, layer: nn.Module, rows: torch.Tensor, num_patches: int) -> torch.Tensor:
    """What a layer makes of a piece's own rows, of all rows (N, D) that go into it."""
    taken = piece.take(rows)
    if piece.plan.is_dense:
        return piece.own(layer(taken.view(-1, num_patches, taken.shape[-1]), None).flatten(0, 1))
    return piece.own(layer(taken[None], None, patch_plan=piece.plan)[0])
