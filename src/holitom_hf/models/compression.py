"""The compressing forward: what backbones do between vision tower and decoder, and the hooks they fill."""

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..configuration import HoliTomConfig
from ..merging.inner import INNER_METHODS
from ..merging.merged_video import MergedVideo
from ..merging.outer import merge_videos
from ..merging.package import of_package
from ..merging.video_tokens import VideoTokens
from ..sequence.compaction import compact_prompt
from ..sequence.compressed_sequence import CompressedSequence, joined_sizes
from ..sequence.inner_stage import InnerStage
from ..sequence.placeholders import (
    cached_length,
    check_mask,
    check_position_ids,
    last_real,
    token_positions,
)
from .masks import check_takes_mask
from .outputs import CompressedOutput, shared_fields
from .upstream import CACHE_NAME, HAS_ENCODER_OUTPUTS, cache_of


skipped_work, check_skips = (of_package("models.skipping", name) for name in ("skipped_work", "check_skips"))
with_questions = of_package("sequence.questions", "with_questions")
unmerged = of_package("models.virtual_unmerging", "unmerged")


class CompressingModelMixin:
    """
    For the model of a backbone, before upstream's class: its videos are shortened before the decoder and inside it.

    The class encodes videos and images in upstream's `get_video_features` and `get_image_features`, and hands them to
    [`compressing_forward`]. What differs between backbones are these hooks:

    - [`video_tokens`]: what was encoded, as the method wants it;
    - [`token_slots`]: which of a video's placeholders its tokens take;
    - [`full_positions`], [`renumbered`], [`next_position`], [`counted`]: where tokens stand;
    - [`decoder_inputs`]: further feature maps on their way to the decoder;
    - [`upstream_video`], [`insert_images`], [`media_fields`]: the shapes upstream gives to its own.
    """

    output_class: type[CompressedOutput]
    # Hook: whether [`renumbered`] leaves gaps, which transformers would take for several packed rows.
    has_position_gaps = False

    def video_tokens(self, video: BaseModelOutputWithPooling) -> list[VideoTokens]:
        """Hook: the videos of what [`get_video_features`] returns, frame by frame. Every backbone has its own."""
        return video.videos

    def token_slots(self, merged: MergedVideo, video: VideoTokens) -> torch.Tensor | None:
        """
        Hook: which of a video's placeholders each of its tokens takes, (N,) int64 without repetition; `None`: the
        first ones. Tokens are then ordered by them.
        """
        return None

    def kept_slots(self, merged: MergedVideo, video, settings):
        """Hook: the same, (N,) int64, where tokens keep their places. Raises a `ValueError` if newlines have none."""
        if settings.has_outer_stage and settings.newline_position == "row":
            raise ValueError(
                'position_ids="kept" needs newline_position="end": newlines of rows have no place to keep'
            )
        return merged.place

    def full_positions(self, start: torch.Tensor, is_real: torch.Tensor, **position_inputs) -> torch.Tensor:
        """
        Hook: positions of a call's tokens if none of them were dropped.

        Args:
            start: (B, 1), the position that follows what is cached.
            is_real: (B, L) bool, False at padding.
            position_inputs: As [`compressing_forward`] was given.

        Returns:
            (B, L), or (A, B, L) for A position axes. Padding repeats the position before it.
        """
        return start + is_real.cumsum(1) - 1

    def renumbered(self, positions: torch.Tensor, is_dropped: torch.Tensor) -> torch.Tensor:
        """Hook: what becomes of `positions` where tokens are dropped: here, those after them move up."""
        return positions - is_dropped.cumsum(1)

    def next_position(self, positions: torch.Tensor) -> torch.Tensor:
        """Hook: the position of the text token that follows a call at `positions` (B, L) or (A, B, L): (B, 1)."""
        last = positions[..., -1:]
        return (last.amax(0) if last.ndim == 3 else last) + 1

    def counted(
        self,
        past: CompressedSequence | None,
        cache: Cache | None,
        attention_mask: torch.Tensor | None,
        tokens: torch.Tensor,
        position_ids: torch.Tensor | None,
        position_inputs: dict,
    ) -> tuple[torch.Tensor | None, CompressedSequence | None]:
        """
        Hook: positions of a call with videos or images, and what the cache must remember behind it where nothing is
        dropped. A backbone whose positions follow from a cache's length needs neither.

        Args:
            past: The cache's record.
            tokens: (B, L) or (B, L, D), those of the call.
            The rest: As [`compressing_forward`] was given.
        """
        return position_ids, None

    def decoder_inputs(
        self,
        maps: list[torch.Tensor],
        video_mask: torch.Tensor,
        image: BaseModelOutputWithPooling | None = None,
        image_mask: torch.Tensor | None = None,
    ) -> dict:
        """
        Hook: the decoder's arguments for further feature maps.

        Args:
            maps: Each (N, E), of the merged tokens in the order of the prompts.
            video_mask: (B, N) bool, where these tokens stand.
            image, image_mask: Encoded images and where their tokens stand, where there are any.
        """
        return {}

    def placeholder_ids(self, input_ids, position_inputs):
        """Hook: `input_ids` without placeholders that are text."""
        return input_ids

    def upstream_video(self, video: BaseModelOutputWithPooling) -> BaseModelOutputWithPooling:
        """Hook: encoded videos as upstream's forward takes them."""
        return video

    def insert_images(
        self, input_ids, inputs_embeds: torch.Tensor, image: BaseModelOutputWithPooling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hook: `inputs_embeds` with images in their placeholders, and the images' features."""
        features = torch.cat(list(image.pooler_output), dim=0).to(inputs_embeds)
        mask, _ = self.get_placeholder_mask(input_ids, inputs_embeds, image_features=features)
        return inputs_embeds.masked_scatter(mask, features), features

    def media_fields(
        self, image_features: torch.Tensor | None, encoded: dict[str, BaseModelOutputWithPooling]
    ) -> dict:
        """Hook: fields of the output that upstream's has, too: what was encoded, since transformers 5.24."""
        return {f"{kind}_outputs": outputs for kind, outputs in encoded.items()} if HAS_ENCODER_OUTPUTS else {}

    def settings_for(self, holitom_config: HoliTomConfig | dict | str | None) -> HoliTomConfig:
        """The settings of a call: the model's, what a dictionary changes of them, or others in their place."""
        settings = HoliTomConfig.coerce(holitom_config, self.config.holitom_config)
        self.config.check_settings(settings)
        return settings

    def compressing_forward(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        cache: Cache | None,
        use_cache: bool | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
        encoders: dict[str, tuple[str, Callable[[], BaseModelOutputWithPooling]]],
        settings: HoliTomConfig,
        prompt_length: int | None = None,
        position_inputs: dict | None = None,
        **decoder_kwargs,
    ) -> CompressedOutput:
        """
        A forward pass whose decoder runs on fewer video tokens than there are placeholders.

        Args:
            input_ids, inputs_embeds: (B, L) or (B, L, D), one of them.
            attention_mask: (B, P+L), P the positions passed before with this cache, dropped ones included.
            position_ids: As for the uncompressed sequence.
            cache, use_cache: As upstream.
            mm_encoder_outputs: `"video"` and `"image"` where they are encoded already.
            encoders: For each of `"video"` and `"image"` that comes as pixels, its argument and what encodes it.
            settings: Of this call.
            prompt_length: Number of leading positions (P included) that are the prompt; `None`: all.
            position_inputs: What [`full_positions`] needs beside the mask.
            decoder_kwargs: For the decoder.

        Returns:
            The class's `output_class`; upstream's output where nothing is or was compressed.

        Raises:
            ValueError: If placeholders and videos don't match, a mask or position ids have a wrong shape, or the
                settings don't fit the decoder.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        settings.check_decoder_depth(self.config.text_config.num_hidden_layers)
        if settings.proportional_attention and settings.shortens:
            check_takes_mask(self.config.text_config)
        if settings.skips:
            check_skips(self.config.text_config, settings)
        batch_size, num_new = (input_ids if input_ids is not None else inputs_embeds).shape[:2]
        past = CompressedSequence.of(cache, num_new)
        if past is not None:
            past = past.for_batch(batch_size)
        encoded = dict(mm_encoder_outputs) if mm_encoder_outputs else {}
        has_video = "video" in encoders or encoded.get("video") is not None
        is_plain = past is None and not (has_video and (settings.shortens or settings.skips))
        if isinstance(attention_mask, torch.Tensor) and not is_plain and not torch.compiler.is_compiling():
            seen = past.seen_length(cache) if past is not None else cached_length(cache)
            check_mask(attention_mask, (batch_size, seen + num_new))
        for kind, (argument, encode) in encoders.items():
            if encoded.get(kind) is not None:
                raise ValueError(f"pass either {argument} or mm_encoder_outputs['{kind}'], not both")
            encoded[kind] = encode()

        decoder_kwargs = {CACHE_NAME: cache, "use_cache": use_cache, **decoder_kwargs}
        positions, record = position_ids, None
        if any(outputs is not None for outputs in encoded.values()):
            tokens = input_ids if input_ids is not None else inputs_embeds
            positions, record = self.counted(past, cache, attention_mask, tokens, position_ids, position_inputs or {})
        if is_plain:
            if encoded.get("video") is not None:
                encoded["video"] = self.upstream_video(encoded["video"])
            outputs = super().forward(
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids if position_ids is not None else positions,
                mm_encoder_outputs=encoded,
                return_dict=True,
                **decoder_kwargs,
            )
            if record is not None and cache_of(outputs) is not None:
                record.attach(cache_of(outputs))
            return outputs

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        input_ids = self.placeholder_ids(input_ids, position_inputs or {})
        image_mask, video_mask = (mask[..., 0] for mask in self.get_placeholder_mask(input_ids, inputs_embeds))
        image, image_features = encoded.get("image"), None
        if image is not None:
            inputs_embeds, image_features = self.insert_images(input_ids, inputs_embeds, image)
        fields = self.media_fields(image_features, encoded)
        if encoded.get("video") is None:
            if image is not None:
                decoder_kwargs |= self.decoder_inputs([], torch.zeros_like(image_mask), image, image_mask)
            outputs = self._continue(inputs_embeds, attention_mask, positions, past, fields, decoder_kwargs)
            if record is not None and cache_of(outputs) is not None:
                record.attach(cache_of(outputs))
            return outputs
        if record is not None:
            position_ids, position_inputs = None, {"position_ids": positions}
        return self._compress(
            inputs_embeds,
            video_mask,
            self.video_tokens(encoded["video"]),
            image,
            image_mask,
            attention_mask,
            position_ids,
            past,
            settings,
            prompt_length,
            position_inputs or {},
            fields,
            decoder_kwargs,
        )

    def _continue(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict | None,
        position_ids: torch.Tensor | None,
        past: CompressedSequence,
        fields: dict,
        decoder_kwargs: dict,
    ) -> CompressedOutput:
        """A call without a new video on a cache that was compressed: only masks and positions change."""
        num_new, cache = inputs_embeds.shape[1], decoder_kwargs[CACHE_NAME]
        outer_mask = inner_mask = None
        if isinstance(attention_mask, dict):
            outer_mask = attention_mask
        elif past.is_padded or attention_mask is not None:
            whole = attention_mask.shape[1] if attention_mask is not None else past.seen_length(cache) + num_new
            total = past.including(whole - past.full_length, attention_mask)
            if total.is_padded:
                outer_mask, inner_mask = total.outer_mask, total.inner_mask
        if position_ids is not None:
            position_ids = position_ids - past.position_offset[:, None]
        elif isinstance(attention_mask, torch.Tensor):
            after = total.outer_mask[:, past.outer_mask.shape[1] :]
            position_ids = (past.next_position + after.cumsum(1) - 1)[:, -num_new:].clamp_min(0)
        else:  # All that came after is real. How much that is may be known to the device alone.
            num_after = cache.get_seq_length() - past.outer_mask.shape[1]
            position_ids = past.next_position + num_after + torch.arange(num_new, device=inputs_embeds.device)
        is_ready = isinstance(attention_mask, dict)  # masks that hold the sizes already
        sizes = (None, None) if is_ready else (past.outer_sizes, past.inner_sizes)
        if past.inner_layer is not None or sizes[0] is not None or self.language_model.needs_stage:
            stage = InnerStage(layer=past.inner_layer, sizes=sizes[0], inner_sizes=sizes[1])
            if inner_mask is not None:
                stage.past_mask, stage.mask = inner_mask[:, :-num_new], inner_mask[:, -num_new:]
                stage.is_padded = True
            decoder_kwargs = decoder_kwargs | {"inner_stage": stage}
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=outer_mask,
            position_ids=self.language_model.rotary_positions(position_ids),
            **decoder_kwargs,
        )
        return self.output_class(**shared_fields(outputs, self.output_class), **fields)

    def _compress(
        self,
        inputs_embeds: torch.Tensor,
        video_mask: torch.Tensor,
        videos: list[VideoTokens],
        image: BaseModelOutputWithPooling | None,
        image_mask: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past: CompressedSequence | None,
        settings: HoliTomConfig,
        prompt_length: int | None,
        position_inputs: dict,
        fields: dict,
        decoder_kwargs: dict,
    ) -> CompressedOutput:
        """A call with videos: merge them, drop the placeholders they no longer need, run the decoder on the rest."""
        batch_size, num_new = inputs_embeds.shape[:2]
        device = inputs_embeds.device
        num_cached = cached_length(decoder_kwargs[CACHE_NAME])
        past = CompressedSequence.before_call(past, num_cached, attention_mask, batch_size, device)
        is_real = past.is_real(attention_mask, num_new)

        # Stages 1 and 2.
        num_prompt = num_new if prompt_length is None else prompt_length - past.full_length
        if settings.needs_question:
            videos = with_questions(videos, inputs_embeds[:, :num_prompt], video_mask, is_real)
        merged, embeddings = merge_videos(videos, settings)
        is_kept = settings.position_ids == "kept"
        slots = [
            self.kept_slots(tokens, video, settings) if is_kept else self.token_slots(tokens, video)
            for tokens, video in zip(merged, videos)
        ]
        merged, embeddings, slots = in_slot_order(merged, embeddings, slots)
        num_slots = [video.num_slots for video in videos]
        counts = settings.proportional_attention
        sizes = None
        if counts and any(len(tokens) < number for tokens, number in zip(embeddings, num_slots)):
            newline = torch.ones(1, device=device)
            sizes = [torch.cat([v.sizes, newline[: len(e) - v.num_tokens]]) for v, e in zip(merged, embeddings)]
        prompt = compact_prompt(inputs_embeds, video_mask, is_real, embeddings, num_slots, slots, sizes)
        packed, videos_of_row = prompt.packed, prompt.videos_of_row
        layer = past.inner_layer_with(settings.inner_merge_layer if settings.has_inner_stage else None)
        places = prompt  # that the layers hold
        if settings.virtual_unmerging:
            places = unmerged(self, prompt, video_mask, is_real, merged, videos, settings, layer, decoder_kwargs)
        held, is_dropped = places.packed, places.is_dropped
        if videos[0].maps:
            maps = zip(*([tokens.apply(map_) for map_ in video.maps] for tokens, video in zip(merged, videos)))
            decoder_kwargs = decoder_kwargs | self.decoder_inputs(
                [torch.cat(map_) for map_ in maps],
                prompt.video_mask,
                image,
                image_mask.gather(1, packed.index) & packed.mask,
            )

        # Where the tokens that are left stand: by the count of all, less what was dropped.
        full = self.full_positions(past.next_position, is_real, **position_inputs)
        positions = full if is_kept else self.renumbered(full, is_dropped)
        next_position = self.next_position(positions)
        num_skipped = self.next_position(full) - next_position
        if position_ids is not None:
            check_position_ids(position_ids, num_new, full.ndim)
            positions = position_ids - past.position_offset[:, None]
            if not is_kept:
                positions = self.renumbered(positions, is_dropped)
        positions = positions.gather(-1, held.index.expand_as(positions[..., : held.index.shape[1]]))
        positions = positions.masked_fill(~held.mask, 0)

        # Stage 3 runs inside the decoder.
        outer_mask = torch.cat([past.outer_mask, held.mask], dim=1)
        is_padded = past.is_padded or held.is_padded
        has_gaps = (is_kept or self.has_position_gaps or places is not prompt) and positions.ndim == 2
        outer_sizes = joined_sizes(past.outer_sizes, prompt.sizes, past.outer_mask, held.mask)
        needs_stage = self.language_model.needs_stage or settings.skips
        if layer is not None or has_gaps or outer_sizes is not None or needs_stage:
            stage = InnerStage(layer, past.inner_mask, packed.mask, is_padded, num_past=num_cached, has_gaps=has_gaps)
            if settings.skips:
                stage.skips = skipped_work(settings, prompt, embeddings)
            stage.unmerging = None if places is prompt else places
            stage.sizes, stage.inner_sizes, stage.counts_removed = outer_sizes, past.inner_sizes, counts
            if not settings.has_inner_stage:
                stage.inner_sizes = joined_sizes(past.inner_sizes, prompt.sizes, past.inner_mask, held.mask)
            if settings.has_inner_stage:
                num_tokens = [len(tokens) for tokens in embeddings]
                stage.videos = token_positions(prompt.video_mask, videos_of_row, num_tokens)
                stage.merge_ratio, stage.fold = settings.inner_merge_ratio, settings.inner_method == "merge"
                stage.num_real, stage.padding_side = packed.num_kept, packed.padding_side
                stage.query = packed.last_kept.gather(1, last_real(is_real, num_prompt))[:, 0]
                stage.asked = INNER_METHODS[settings.inner_method]
            decoder_kwargs = decoder_kwargs | {"inner_stage": stage}
        outputs = self.language_model(
            inputs_embeds=prompt.embeds,
            attention_mask=outer_mask if is_padded else None,
            position_ids=positions,
            **decoder_kwargs,
        )

        survivors = getattr(outputs, "survivors", None)
        output_index, inner_mask, inner_keep = packed.last_kept, held.mask, None
        inner_sizes = prompt.sizes
        if survivors is not None:
            survivors = survivors.to(device)
            output_index = survivors.last_kept.gather(1, output_index)
            inner_mask = survivors.mask
            inner_sizes = outputs.sizes.to(device) if outputs.sizes is not None else None
            inner_keep = [
                survivors.row(row) - packed.row_start(row) if of_row else None
                for row, of_row in enumerate(videos_of_row)
            ]
        merged_videos = [[merged[v] for v in of_row] for of_row in videos_of_row]
        if cache_of(outputs) is not None:
            CompressedSequence(
                full_length=past.full_length + num_new,
                outer_mask=outer_mask,
                inner_mask=torch.cat([past.inner_mask, inner_mask], dim=1),
                inner_layer=layer,
                next_position=next_position,
                position_offset=past.position_offset + num_skipped[:, 0],
                is_padded=is_padded or (survivors is not None and survivors.is_padded),
                outer_sizes=outer_sizes,
                inner_sizes=joined_sizes(past.inner_sizes, inner_sizes, past.inner_mask, inner_mask),
                merged_videos=merged_videos,
                inner_keep=inner_keep if inner_keep is not None else [None] * batch_size,
            ).attach(cache_of(outputs))
        return self.output_class(
            **shared_fields(outputs, self.output_class),
            merged_videos=merged_videos,
            inner_keep=inner_keep,
            output_index=output_index,
            **fields,
        )


def in_slot_order(
    merged: list[MergedVideo], embeddings: list[torch.Tensor], slots: list[torch.Tensor | None]
) -> tuple[list[MergedVideo], list[torch.Tensor], list[torch.Tensor | None]]:
    """
    Tokens in the order of the placeholders they take.

    Args:
        merged: The V videos after merging.
        embeddings: What goes into the prompt for each: its tokens, and a newline behind them where the model has one.
        slots: For each the (N,) placeholders its tokens take, or `None` for the first ones.

    Returns:
        The same, sorted by `slots`; a newline behind a video takes the last of its placeholders.
    """
    ordered = []
    for video, tokens, taken in zip(merged, embeddings, slots):
        if taken is not None:
            order = taken.argsort()
            video, taken = video.in_order_of(order), taken[order]
            if len(tokens) > len(order):
                end = taken.new_full((1,), video.num_input_tokens)
                taken, order = torch.cat([taken, end]), torch.cat([order, torch.full_like(end, len(order))])
            tokens = tokens[order]
        ordered.append((video, tokens, taken))
    return tuple(map(list, zip(*ordered)))
