"""
The published method once more, as plain loops over tokens: no cache, no batch, no packing, nothing of holitom_hf.

Slow and simple on purpose: what the package does fast is compared with what is written down here, and this is compared
with the recorded outputs of the published code.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutputWithPast


def best_gain(similarity: torch.Tensor, threshold: float, longest: int | None) -> int:
    """Largest total gain of any partition, by trying all of them."""
    num_frames = similarity.shape[0] + 1

    def gain(start: int, stop: int) -> int:
        if stop - start < 2:
            return 0
        return int((similarity[start : stop - 1] > threshold).all(0).sum()) * (stop - start - 1)

    def best(start: int) -> int:
        if start == num_frames:
            return 0
        limit = num_frames if longest is None else min(num_frames, start + longest)
        return max(gain(start, stop) + best(stop) for stop in range(start + 1, limit + 1))

    return best(0)


def plain_segments(similarity: torch.Tensor, threshold: float, longest: int | None) -> tuple[list, int]:
    """The dynamic programme as the design states it, ties included."""
    num_frames = similarity.shape[0] + 1
    longest = num_frames if longest is None else longest
    best, choice = [0] * (num_frames + 1), [0] * (num_frames + 1)
    for stop in range(1, num_frames + 1):
        best[stop] = -1
        for length in range(1, min(stop, longest) + 1):
            start = stop - length
            static = int((similarity[start : stop - 1] > threshold).all(0).sum()) if length > 1 else 0
            if best[start] + static * (length - 1) > best[stop]:
                best[stop], choice[stop] = best[start] + static * (length - 1), length
    segments, stop = [], num_frames
    while stop:
        segments.append((stop - choice[stop], stop))
        stop -= choice[stop]
    return segments[::-1], best[num_frames]


def plain_clusters(tokens: torch.Tensor, num_clusters: int, neighbors: int, weight: float):
    """DPC-KNN token by token: (m, D) outputs, the m centres, and the cluster of every token."""
    n, dim = tokens.shape
    tokens = tokens.float()
    distance = torch.stack([torch.linalg.vector_norm(tokens - token, dim=-1) for token in tokens]) / math.sqrt(dim)
    k = min(neighbors, num_clusters)
    density = [math.exp(-float(row.sort().values[:k].square().mean())) for row in distance]
    delta = []
    for i in range(n):
        denser = [float(distance[i, j]) for j in range(n) if density[j] > density[i]]
        delta.append(min(denser) if denser else float(distance.max()))
    score = [delta[i] * density[i] for i in range(n)]
    centers = sorted(sorted(range(n), key=lambda i: (-score[i], i))[:num_clusters])
    cluster = [
        centers.index(i) if i in centers else min(range(num_clusters), key=lambda c: float(distance[i, centers[c]]))
        for i in range(n)
    ]
    outputs = []
    for c, center in enumerate(centers):
        members = [i for i in range(n) if cluster[i] == c and i != center]
        mean = tokens[members].mean(0) if members else None
        outputs.append(tokens[center] if mean is None else weight * tokens[center] + (1 - weight) * mean)
    return torch.stack(outputs), centers, cluster


def plain_merge(features: torch.Tensor, importance: torch.Tensor, config, newline: torch.Tensor | None = None):
    """
    Stages 1 and 2, one token after another. Returns the embeddings, (frame, position) of each, and for how many of the
    tokens that came in it stands.
    """
    num_frames, num_tokens, _ = features.shape
    similarity = F.cosine_similarity(features[:-1].float(), features[1:].float(), dim=-1)
    segments, gain = plain_segments(similarity, config.similarity_threshold, config.max_segment_frames)
    total = num_frames * num_tokens
    ratio = min(config.retention_ratio / ((total - gain) / total), 1)
    outputs = []  # (embedding, frame, position, members, is static)
    for start, stop in segments:
        is_static = [
            stop - start > 1 and bool((similarity[start : stop - 1, t] > config.similarity_threshold).all())
            for t in range(num_tokens)
        ]
        static = [t for t in range(num_tokens) if is_static[t]]
        dynamic = [t for t in range(num_tokens) if not is_static[t]]
        in_segment = []
        num_clusters = round(len(static) * ratio)
        if num_clusters:
            means = torch.stack([features[start:stop, t].mean(0) for t in static])
            merged, centers, cluster = plain_clusters(
                means, num_clusters, config.cluster_neighbors, config.cluster_center_weight
            )
            members = [
                {(f, t) for f in range(start, stop) for t, of in zip(static, cluster) if of == i}
                for i in range(num_clusters)
            ]
            in_segment += [(merged[i], start, static[c], members[i], True) for i, c in enumerate(centers)]
        for f in range(start, stop):
            kept = math.ceil(len(dynamic) * ratio)
            num_dominant = round(kept * (1 - config.contextual_ratio))
            by_importance = sorted(dynamic, key=lambda t: (-float(importance[f, t]), t))
            dominant = sorted(by_importance[:num_dominant])
            in_segment += [(features[f, t], f, t, {(f, t)}, False) for t in dominant]
            if kept > num_dominant:
                others = [t for t in dynamic if t not in dominant]
                merged, centers, cluster = plain_clusters(
                    features[f, others], kept - num_dominant, config.cluster_neighbors, config.cluster_center_weight
                )
                members = [{(f, t) for t, of in zip(others, cluster) if of == i} for i in range(len(centers))]
                in_segment += [(merged[i], f, others[c], members[i], False) for i, c in enumerate(centers)]
        outputs += in_segment
    if config.exact_budget:
        outputs = plain_budget(outputs, features, importance, config.retention_ratio)
    if config.newline_position == "row":
        width = math.isqrt(num_tokens)
        rows = {(f, row): [] for f in range(num_frames) for row in range(width)}
        for token in outputs:
            rows[token[1], token[2] // width].append(token)
        num_empty = min(len(outputs), len(rows)) - sum(map(bool, rows.values())) if config.exact_budget else 0
        outputs = []
        for (f, row), tokens in rows.items():
            outputs += sorted(tokens, key=lambda token: token[2])
            num_empty -= not tokens
            if tokens or num_empty >= 0:
                outputs.append((newline, f, row * width + width - 1, {()}, False))
    embeddings = torch.stack([features[0, 0], *(token[0].to(features.dtype) for token in outputs)])[1:]
    return embeddings, [token[1:3] for token in outputs], plain_sizes(features, embeddings, [o[3] for o in outputs])


def plain_budget(outputs: list[tuple], features: torch.Tensor, importance: torch.Tensor, ratio: float) -> list[tuple]:
    """
    `exact_budget`: the least important output goes, or the most important dropped token comes back, until the number
    is right; where none is left that was dropped, of those that were merged into others the next of an even spread.

    `outputs` and what is returned are (embedding, frame, position, members, whether it is static), in order.
    """
    num_frames, num_tokens = importance.shape
    outputs, budget = list(outputs), max(1, round(num_frames * num_tokens * ratio))
    while len(outputs) > budget:
        least = min(float(importance[f, t]) for _, f, t, *_ in outputs)
        del outputs[max(i for i, (_, f, t, *_) in enumerate(outputs) if float(importance[f, t]) == least)]
    while len(outputs) < budget:
        merged = set().union(*(members for *_, members, _ in outputs))
        taken = {(f, t) for _, f, t, *_ in outputs}
        others = [(f, t) for f in range(num_frames) for t in range(num_tokens) if (f, t) not in taken]
        dropped = [place for place in others if place not in merged]
        if dropped:
            frame, position = max(dropped, key=lambda place: float(importance[place]))
        else:  # multiples of 2^32 / the golden ratio, modulo 2^32
            frame, position = min(others, key=lambda place: (place[0] * num_tokens + place[1]) * 2654435769 % 2**32)
        for *_, members, _ in outputs:
            members.discard((frame, position))
        behind = [
            i
            for i, (_, f, t, _, is_static) in enumerate(outputs)
            if f > frame or (f == frame and not is_static and t > position)
        ]
        back = (features[frame, position], frame, position, {(frame, position)}, False)
        outputs.insert(min(behind, default=len(outputs)), back)
    return outputs


def plain_sizes(features: torch.Tensor, embeddings: torch.Tensor, members: list[set]) -> list[int]:
    """
    For how many input tokens each output stands: its members, and those without an output that are most like it among
    the outputs with members in their frame, or in the nearest frame before (at the start: behind) where there is one.
    """
    num_frames, num_tokens, _ = features.shape
    sizes = [len(of) for of in members]
    if not members:
        return []
    inside = [[i for i, of in enumerate(members) if any(m and m[0] == f for m in of)] for f in range(num_frames)]
    for f in range(num_frames):
        for t in range(num_tokens):
            if any((f, t) in of for of in members):
                continue
            home = next(g for g in [*range(f, -1, -1), *range(f, num_frames)] if inside[g])
            likeness = F.cosine_similarity(features[f, t].float()[None], embeddings[inside[home]].float(), dim=-1)
            sizes[inside[home][int(likeness.argmax())]] += 1
    return sizes


def plain_inner_merge(hidden: torch.Tensor, importance: torch.Tensor, visual: list[int], ratio: float, fold: bool):
    """
    Stage 3 on (N, D), one folding after another. Returns the hidden states, the surviving indices, and for each
    removed index the one it is most like.
    """
    num_kept = min(len(visual), max(1, round(len(visual) * (1 - ratio))))
    kept = sorted(sorted(visual, key=lambda i: (-float(importance[i]), i))[:num_kept])
    others = [i for i in visual if i not in kept]
    hidden = hidden.clone()
    unit = F.normalize(hidden.float(), dim=-1)
    targets = {other: kept[int((unit[kept] @ unit[other]).argmax())] for other in others}
    if fold:
        for other, target in targets.items():
            hidden[target] = (hidden[target] + hidden[other]) / 2
    keep = [i for i in range(len(hidden)) if i not in others]
    return hidden[keep], keep, targets


def plain_layer(layer, hidden: torch.Tensor, mask: torch.Tensor, rotation, visual: list[int], method: str | None):
    """
    A decoder layer over (1, N, D) whose attention and feed-forward network are computed for all; what `method` leaves
    out of it for the `visual` positions is taken away afterwards. `None` leaves nothing out.
    """
    normed = layer.input_layernorm(hidden)
    if hasattr(layer, "linear_attn"):
        change = layer.linear_attn(hidden_states=normed, attention_mask=None)
    else:
        change = layer.self_attn(hidden_states=normed, attention_mask=mask, position_embeddings=rotation)[0]
    if method in ("skip_attention", "freeze"):
        change[:, visual] = 0
    hidden = hidden + change
    change = layer.mlp(layer.post_attention_layernorm(hidden))
    if method in ("skip_ffn", "freeze"):
        change[:, visual] = 0
    return hidden + change


def plain_attention(weights: torch.Tensor, owner: list[int | None], last: int, settings) -> torch.Tensor:
    """
    (N,), what stage 3 chooses by, of a layer's (H, N, N) attention: that of the prompt's last token, a mean over
    heads, or the largest of any head and any token behind the prompt's last video. `owner` says whose token each is.
    """
    weights = weights.float()
    if settings.inner_method != "prune_by_question":
        return weights.mean(0)[last]
    behind = [i for i in range(last + 1) if all(of is None for of in owner[i : last + 1])] or [last]
    return torch.stack([weights[head, i] for head in range(len(weights)) for i in behind]).amax(0)


@dataclass
class PlainVideo:
    """
    A video after stages 1 and 2: its tokens, newline included, how many placeholders it came with, which of them its
    tokens take, and for how many of the tokens that came in each stands.
    """

    tokens: torch.Tensor
    num_slots: int
    slots: list[int]
    sizes: list[int]


class PlainModel:
    """Upstream's weights, run without a cache on one row at a time, compressed by the loops above."""

    def __init__(self, model):
        config = LlavaOnevisionConfig(**model.config.to_dict())
        config.holitom_config = config.auto_map = None
        self.upstream = LlavaOnevisionForConditionalGeneration._from_config(config, attn_implementation="eager")
        self.upstream.load_state_dict(model.state_dict())
        self.upstream.to(model.dtype).eval()
        self.config = self.upstream.config

    def importance(self, video: torch.Tensor) -> torch.Tensor:
        """(F, T): the last vision layer's attention matrices, averaged over heads and queries, pooled."""
        tower = self.upstream.model.vision_tower
        attention = tower(video, output_attentions=True).attentions[-1].float().mean((1, 2))  # (F, P)
        side = math.isqrt(attention.shape[1])
        pooled = F.interpolate(attention.view(-1, 1, side, side), size=[math.ceil(side / 2)] * 2, mode="bilinear")
        return pooled.flatten(1)

    @torch.no_grad()
    def encode(self, video: torch.Tensor, settings) -> PlainVideo:
        features = self.upstream.model.get_video_features(video[None]).pooler_output[0]
        frames, newline = features[:-1].view(len(video), -1, features.shape[-1]), features[-1:]
        if settings.outer_method == "none" or settings.retention_ratio == 1:
            return PlainVideo(features, len(features), list(range(len(features))), [1] * len(features))
        tokens, places, sizes = plain_merge(frames, self.importance(video), settings, newline[0])
        if settings.newline_position == "end":
            tokens, sizes = torch.cat([tokens, newline]), [*sizes, 1]
        slots = list(range(len(tokens)))
        if settings.position_ids == "kept":
            slots = [f * frames.shape[1] + t for f, t in places] + [len(features) - 1]
            order = sorted(range(len(slots)), key=slots.__getitem__)
            tokens, slots, sizes = tokens[order], [slots[i] for i in order], [sizes[i] for i in order]
        return PlainVideo(tokens, len(features), slots, sizes)

    @torch.no_grad()
    def logits(self, input_ids, videos, settings, prompt_length=None, images=None, encoded=None) -> torch.Tensor:
        """
        (L, vocabulary) logits of one row: at a dropped position those of the last token before it that survived.

        `input_ids` (L,), `videos` a list of (F, C, H, W), `images` upstream's keyword arguments for images,
        `encoded` the videos where a caller has encoded them already, `prompt_length` one number or one per video.
        """
        upstream, length = self.upstream, len(input_ids)
        embeds = upstream.get_input_embeddings()(input_ids)
        if images is not None:
            pictures = torch.cat(upstream.model.get_image_features(**images).pooler_output)
            embeds = embeds.masked_scatter((input_ids == self.config.image_token_id)[:, None], pictures)
        encoded = [self.encode(video, settings) for video in videos] if encoded is None else encoded
        tokens, places, owner, sizes, slot, video = [], [], [], [], 0, 0
        for place in range(length):
            if int(input_ids[place]) != self.config.video_token_id:
                tokens.append(embeds[place])
                places.append(place)
                owner.append(None)
                sizes.append(1)
                continue
            if slot in encoded[video].slots:
                which = encoded[video].slots.index(slot)
                tokens.append(encoded[video].tokens[which])
                places.append(place)
                owner.append(video)
                sizes.append(encoded[video].sizes[which] if settings.proportional_attention else 1)
            slot += 1
            if slot == encoded[video].num_slots:
                slot, video = 0, video + 1

        all_places, all_owners = places, owner
        decoder = upstream.model.language_model
        hidden = torch.stack(tokens)[None]
        positions = torch.tensor(places)[None] if settings.position_ids == "kept" else torch.arange(len(tokens))[None]
        has_inner = settings.has_inner_stage
        weights = {}
        for index, layer in enumerate(decoder.layers):
            if has_inner and index == settings.inner_merge_layer:
                kept_so_far = list(range(len(places)))
                ends = prompt_length if isinstance(prompt_length, list) else [prompt_length] * len(encoded)
                for v, end in enumerate(ends):
                    last = max(i for i, place in enumerate(all_places) if end is None or place < end)
                    attention = plain_attention(weights["last"][0], all_owners, last, settings)[kept_so_far]
                    visual = [i for i, of in enumerate(owner) if of == v]
                    merged, keep, targets = plain_inner_merge(
                        hidden[0], attention, visual, settings.inner_merge_ratio, settings.inner_method == "merge"
                    )
                    if settings.proportional_attention:
                        for other, target in targets.items():
                            sizes[target] += sizes[other]
                    sizes = [sizes[i] for i in keep]
                    hidden, positions = merged[None], positions[:, keep]
                    kept_so_far = [kept_so_far[i] for i in keep]
                    places, owner = [places[i] for i in keep], [owner[i] for i in keep]
            n = hidden.shape[1]
            mask = torch.full((n, n), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)[None, None]
            mask = mask + torch.tensor(sizes).log()
            handle = layer.self_attn.register_forward_hook(lambda _, __, out: weights.update(last=out[1]))
            visual = [i for i, of in enumerate(owner) if of is not None]
            method = settings.inner_method if settings.skips and index in settings.skipped_layers else None
            hidden = plain_layer(layer, hidden, mask, decoder.rotary_emb(hidden, positions), visual, method)
            handle.remove()
        logits = upstream.lm_head(decoder.norm(hidden))[0]
        fill = [max(max((i for i, p in enumerate(places) if p <= place), default=0), 0) for place in range(length)]
        return logits[fill]

    @torch.no_grad()
    def generate(self, input_ids, videos, settings, num_tokens: int, images=None, prompt_length=None):
        """Greedy: (num_tokens,) ids and (num_tokens, vocabulary) logits; stage 3 asks the prompt's last token."""
        prompt_length = len(input_ids) if prompt_length is None else prompt_length
        encoded = [self.encode(video, settings) for video in videos]
        ids, logits = input_ids, []
        for _ in range(num_tokens):
            logits.append(self.logits(ids, videos, settings, prompt_length, images, encoded)[-1])
            ids = torch.cat([ids, logits[-1].argmax()[None]])
        return ids[-num_tokens:], torch.stack(logits)


class PlainGenerator(LlavaOnevisionForConditionalGeneration):
    """
    Upstream's `generate` over [`PlainModel`]: every mode of generation without a cache, one row at a time.

    Rows are told apart by how they begin: `prompts` are the (L,) ids without padding, `videos` what each holds.
    """

    @classmethod
    def over(cls, plain: PlainModel, prompts, videos, settings, prompt_lengths=None, images=None) -> "PlainGenerator":
        generator = cls._from_config(plain.config)
        generator.plain, generator.prompts, generator.settings = plain, prompts, settings
        generator.videos = [[plain.encode(video, settings) for video in row] for row in videos]
        generator.prompt_lengths = prompt_lengths or [len(prompt) for prompt in prompts]
        generator.images = images or [None] * len(prompts)
        return generator.eval()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        rows = []
        for row, ids in enumerate(input_ids):
            real = ids if attention_mask is None else ids[attention_mask[row].bool()]
            which = next(
                i for i, prompt in enumerate(self.prompts) if torch.equal(real[: len(prompt)], prompt[: len(real)])
            )
            logits = self.plain.logits(
                real,
                self.videos[which],
                self.settings,
                self.prompt_lengths[which],
                self.images[which],
                self.videos[which],
            )
            rows.append(F.pad(logits, (0, 0, len(ids) - len(real), 0)))
        return CausalLMOutputWithPast(logits=torch.stack(rows))

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}
