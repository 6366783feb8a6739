"""What training Qwen3-VL takes beside the recipe: pairs of frames, times in the prompt, three axes, DeepStack."""

import numpy as np
import torch
from torch import nn

from ...models.llava_onevision.modeling import HoliTomLlavaOnevisionForConditionalGeneration
from ...models.llava_onevision.processing import HoliTomProcessor
from .. import BUNDLED_MODEL
from ..tiny_qwen3_vl import IMAGE, VIDEO, VISION_END, VISION_START, tiny_qwen3_vl, tiny_qwen3_vl_processor
from .batches import Batch, PairedClips, PairedFrames
from .trainer import Prefix, Trainer


SECONDS_PER_FRAME = 0.25  # of a clip whose times are not stretched


class Qwen3VLTrainer(Trainer):
    """Trains the small Qwen3-VL, from what the bundled LLaVA-OneVision has learned."""

    question = "{text}<|im_end|>\n<|im_start|>assistant\n"

    def make(self):
        """Overrides Trainer.make."""
        processor = tiny_qwen3_vl_processor()
        model = tiny_qwen3_vl(processor.tokenizer)
        start_from_bundled(model, processor.tokenizer)
        return processor, model

    def vision_parts(self) -> list[nn.Module]:
        """Overrides Trainer.vision_parts: the whole tower, mergers included."""
        return [self.model.model.visual]

    def freeze(self) -> None:
        """Overrides Trainer.freeze: the tower without its mergers, which go on learning."""
        tower = self.model.model.visual
        for part in (tower.patch_embed, tower.pos_embed, tower.blocks):
            part.requires_grad_(False)

    def frames(self) -> PairedFrames:
        """Overrides Trainer.frames."""
        return PairedFrames(64 // self.num_processes, self.step, self.rank)

    def clips(self) -> PairedClips:
        """Overrides Trainer.clips."""
        return PairedClips(self.step, self.answer_steps, self.rank)

    def vision_loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Overrides Trainer.vision_loss: every token tells what is there, and DeepStack's feature of it, too."""
        labels = [coarse for _, coarse in batch.labels]
        features, deepstack, _ = self.features(batch.frames)
        loss, metrics = self.heads["patch"](features.flatten(0, 1), labels)
        for layer in deepstack:
            loss = loss + 0.5 * self.heads["patch"](layer.flatten(0, 1), labels)[0]
        return loss, metrics

    def projections(self, frames: np.ndarray) -> list[tuple[nn.Linear, torch.Tensor]]:
        """Overrides Trainer.projections: the mergers' last maps."""
        features, deepstack, _ = self.features(frames[:, None])
        tower = self.model.model.visual
        mergers = [tower.merger, *tower.deepstack_merger_list]
        return [(merger.linear_fc2, values) for merger, values in zip(mergers, [features, *deepstack])]

    def features(self, frames: np.ndarray) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """
        Clips or images of (B, F, 112, 112, 3) pixels through the tower.

        Returns:
            (B, T, N, dim), the same of every DeepStack layer, and the grids (B, 3).
        """
        videos = torch.from_numpy(frames).permute(0, 1, 4, 2, 3)
        inputs = self.processor.video_processor(
            list(videos), do_sample_frames=False, do_resize=False, return_tensors="pt"
        ).to(self.device)
        grids = inputs["video_grid_thw"]
        encoded = self.model.model.visual(inputs["pixel_values_videos"], grid_thw=grids)
        values = [encoded.pooler_output, *encoded.deepstack_features]
        features, *deepstack = (v.view(len(frames), int(grids[0, 0]), -1, v.shape[-1]) for v in values)
        return features, deepstack, grids

    def prefix(self, batch: Batch) -> Prefix:
        """Overrides Trainer.prefix: the prompt as the processor writes it, a time before every pair of frames."""
        num_clips, num_frames = batch.frames.shape[:2]
        is_video = batch.layout == "video"
        frames = batch.frames if is_video else batch.frames.reshape(-1, 1, *batch.frames.shape[2:])
        features, deepstack, grids = self.features(frames)
        placeholder = VIDEO if is_video else IMAGE
        picture = VISION_START + placeholder * features.shape[2] + VISION_END
        pictures = picture * num_frames
        if is_video:
            middles = SECONDS_PER_FRAME * batch.stretch * (2 * np.arange(features.shape[1]) + 0.5)
            pictures = VISION_START + "".join(f"<{s:.1f} seconds>{picture}" for s in middles) + VISION_END
        tokenizer, model = self.processor.tokenizer, self.model.model
        ids = tokenizer(f"<|im_start|>user\n{pictures}", return_tensors="pt")["input_ids"].to(self.device)
        is_token = ids == tokenizer.convert_tokens_to_ids(placeholder)
        grid = {"video_grid_thw" if is_video else "image_grid_thw": grids[: 1 if is_video else num_frames]}
        positions, _ = model.get_rope_index(ids, is_token.int() * (2 if is_video else 1), **grid)

        mask = is_token.expand(num_clips, -1)
        embeds = self.model.get_input_embeddings()(ids).repeat(num_clips, 1, 1)
        embeds[mask] = features.flatten(0, 2)
        if is_video:
            is_behind = torch.arange(ids.shape[1], device=ids.device) == ids.shape[1] - 1
        else:
            is_behind = ids[0] == tokenizer.convert_tokens_to_ids(VISION_END)
        return Prefix(
            embeds,
            (is_token[0] | is_behind).nonzero()[:, 0],
            positions[:, 0],
            {"visual_pos_masks": mask, "deepstack_visual_embeds": [layer.flatten(0, 2) for layer in deepstack]},
        )


@torch.no_grad()
def start_from_bundled(model, tokenizer) -> None:
    """
    Weights of the bundled LLaVA-OneVision wherever the small Qwen3-VL has the same part: the tower's blocks, without
    its rotations; the decoder, without biases and norms of queries and keys; embeddings of the words both know.
    What DeepStack adds to the decoder is nothing at first.
    """
    bundled = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    words = HoliTomProcessor.from_pretrained(BUNDLED_MODEL).tokenizer.get_vocab()
    source, target = bundled.model.vision_tower, model.model.visual
    patches = source.embeddings.patch_embedding
    target.patch_embed.proj.weight.copy_(patches.weight[:, :, None].expand_as(target.patch_embed.proj.weight) / 2)
    target.patch_embed.proj.bias.copy_(patches.bias)
    target.pos_embed.weight.copy_(source.embeddings.position_embedding.weight)
    for ours, theirs in zip(target.blocks, source.encoder.layers, strict=True):
        projections = (theirs.self_attn.q_proj, theirs.self_attn.k_proj, theirs.self_attn.v_proj)
        ours.attn.qkv.weight.copy_(torch.cat([projection.weight for projection in projections]))
        ours.attn.qkv.bias.copy_(torch.cat([projection.bias for projection in projections]))
        for part, other in (
            (ours.norm1, theirs.layer_norm1),
            (ours.norm2, theirs.layer_norm2),
            (ours.attn.proj, theirs.self_attn.out_proj),
            (ours.mlp.linear_fc1, theirs.mlp.fc1),
            (ours.mlp.linear_fc2, theirs.mlp.fc2),
        ):
            part.load_state_dict(other.state_dict())
    decoder = {
        name: value for name, value in bundled.model.language_model.state_dict().items() if not name.endswith("bias")
    }
    del decoder["embed_tokens.weight"]
    model.model.language_model.load_state_dict(decoder, strict=False)
    renamed = {"<image>": IMAGE, "<video>": VIDEO}
    known = [(renamed.get(word, word), number) for word, number in words.items()]
    numbers = tokenizer.get_vocab()
    rows = torch.tensor([(numbers[word], number) for word, number in known if word in numbers])
    for ours, theirs in (
        (model.get_input_embeddings(), bundled.get_input_embeddings()),
        (model.lm_head, bundled.lm_head),
    ):
        ours.weight[rows[:, 0]] = theirs.weight[rows[:, 1]]
