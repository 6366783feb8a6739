"""PruneVid against a plain loop over segments, places and sets, and what it must do with videos one sees through."""

import math
from itertools import combinations

import pytest
import torch

from holitom_hf.merging import MergingSettings, TokenKind, merge_video_tokens
from holitom_hf.merging.methods.prunevid import longest_runs

from .drawn import draw_video


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def plain_clusters(tokens: list, num: int) -> dict[int, list[int]]:
    """DPC-KNN: centre -> its members."""
    places = range(len(tokens))
    table = [[float((a - b).norm()) / math.sqrt(len(a)) for b in tokens] for a in tokens]
    k = min(len(tokens), 7)
    density = [math.exp(-sum(sorted(d * d for d in row)[:k]) / k) for row in table]
    widest = max(map(max, table))
    delta = [min((table[a][b] for b in places if density[b] > density[a]), default=widest) for a in places]
    centers = sorted(sorted(places, key=lambda a: (-delta[a] * density[a], a))[:num])
    members = {center: [center] for center in centers}
    for a in places:
        if a not in centers:
            members[min(centers, key=lambda center: table[a][center])].append(a)
    return members


def plain_labels(labels: list[int]) -> list[int]:
    """Frame by frame: which label each has once only the longest runs of two or more are left."""
    num = len(labels)

    def run(of, frame):
        first = last = frame
        while first > 0 and of[first - 1] == of[frame]:
            first -= 1
        while last < num - 1 and of[last + 1] == of[frame]:
            last += 1
        return last - first + 1

    length = [run(labels, frame) for frame in range(num)]
    longest = {label: max(length[f] for f in range(num) if labels[f] == label) for label in labels}
    left = [labels[f] if length[f] == longest[labels[f]] > 1 else None for f in range(num)]
    for frame in range(num):
        if left[frame] is None:
            stop = frame
            while stop < num and left[stop] is None:
                stop += 1
            before = run(left, frame - 1) if frame else 0
            after = run(left, stop) if stop < num else 0
            label = (left[stop] if after > before else left[frame - 1]) if before or after else 0
            left[frame:stop] = [label] * (stop - frame)
    return left


def plain_segments(labels: list[int]) -> list[tuple[int, int]]:
    starts = [f for f in range(len(labels)) if f == 0 or labels[f] != labels[f - 1]]
    return list(zip(starts, [*starts[1:], len(labels)]))


def plain_prunevid(features, num_kept):
    """(frame, position) of every output, in their order -> its embedding; the segments."""
    num_frames, num_tokens, _ = features.shape
    video = features.double()
    home = [0] * num_frames
    for center, members in plain_clusters([frame.mean(0) for frame in video], max(1, num_frames // 4)).items():
        for member in members:
            home[member] = center
    segments = plain_segments(plain_labels(home))

    static = []  # (similarity, segment, place)
    for s, (start, stop) in enumerate(segments):
        for t in range(num_tokens) if stop - start > 1 else ():
            pairs = list(combinations(range(start, stop), 2))
            alike = sum(cosine(video[a, t], video[b, t]) for a, b in pairs) / len(pairs)
            if alike > 0.8:
                static.append((round(alike, 5), s, t))
    room = num_frames * num_tokens - num_kept
    chosen = set()
    for _, s, t in sorted(static, key=lambda each: (-each[0], each[1], each[2])):
        room -= segments[s][1] - segments[s][0] - 1
        if room < 0:
            break
        chosen.add((s, t))

    sets = []  # (frame, places, tokens)
    for s, (start, stop) in enumerate(segments):
        places = [t for t in range(num_tokens) if (s, t) in chosen]
        sets.append((start, places, [video[start:stop, t].mean(0) for t in places]))
        places = [t for t in range(num_tokens) if (s, t) not in chosen]
        sets += [(f, places, [video[f, t] for t in places]) for f in range(start, stop)]
    sets = [each for each in sets if each[1]]
    # Webster's method, one at a time; first those that have none.
    counts = [0] * len(sets)
    for _ in range(num_kept):
        free = [i for i, each in enumerate(sets) if counts[i] < len(each[1])]
        first = [i for i in free if counts[i] == 0]
        counts[max(first or free, key=lambda i: len(sets[i][1]) / (2 * counts[i] + 1))] += 1
    outputs = {}
    for (frame, places, tokens), count in zip(sets, counts):
        for center, members in plain_clusters(tokens, count).items() if count else ():
            outputs[frame, places[center]] = (sum(tokens[a] for a in members) / len(members)).tolist()
    return outputs, segments


def merge(features, ratio, **fields):
    settings = MergingSettings(outer_method="prunevid", retention_ratio=ratio, **fields)
    return merge_video_tokens(features, features.new_zeros(features.shape[:2]), settings)


@pytest.mark.parametrize("ratio", [0.03, 0.1, 0.25, 0.6, 0.9])
@pytest.mark.parametrize("size", [(1, 9), (3, 8), (12, 20), (26, 12)])
def test_outputs_are_those_of_the_plain_loop(ratio, size):
    features, _ = draw_video(*size, num_scenes=3, seed=5)
    merged = merge(features, ratio)
    expected, segments = plain_prunevid(features, max(1, round(size[0] * size[1] * ratio)))
    assert merged.segments == segments
    assert list(zip(merged.frame.tolist(), merged.position.tolist())) == list(expected)
    torch.testing.assert_close(merged.embeddings, torch.tensor(list(expected.values())).float(), atol=1e-5, rtol=1e-4)


def test_runs_of_frames_are_those_of_the_plain_loop():
    random = torch.Generator().manual_seed(0)
    assert longest_runs([0, 0, 1, 0, 2, 2, 2, 1]) == [(0, 2), (2, 8)]
    for num_frames in range(1, 24):
        for num_labels in (1, 2, 4, 6):
            labels = torch.randint(num_labels, (num_frames,), generator=random).tolist()
            assert longest_runs(labels) == plain_segments(plain_labels(labels)), labels


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.3, 0.7, 0.999])
def test_it_keeps_as_many_as_asked_for(ratio):
    for num_frames, noise in ((1, 1.0), (12, 0.0), (12, 0.05), (12, 1.0)):
        random = torch.Generator().manual_seed(0)
        features = torch.randn(1, 10, 16, generator=random) + noise * torch.randn(num_frames, 10, 16, generator=random)
        merged = merge(features, ratio, proportional_attention=True)
        assert merged.num_tokens == max(1, round(num_frames * 10 * ratio))
        assert len(merged.place.unique()) == merged.num_tokens
        assert float(merged.sizes.sum()) == num_frames * 10


def test_a_still_picture_stays_once_a_scene_and_what_moves_in_every_frame():
    """Four still scenes of 4 frames: at a budget of four pictures and 16 tokens nothing is lost."""
    random = torch.Generator().manual_seed(1)
    features = torch.randn(4, 1, 10, 64, generator=random).expand(-1, 4, -1, -1).reshape(16, 10, 64).clone()
    features[:, 4] = torch.randn(16, 64, generator=random)
    merged = merge(features, (4 * 9 + 16) / 160)
    assert merged.segments == [(start, start + 4) for start in (0, 4, 8, 12)]
    is_static = merged.kind == TokenKind.STATIC
    assert list(zip(merged.frame[is_static].tolist(), merged.position[is_static].tolist())) == [
        (start, t) for start in (0, 4, 8, 12) for t in range(10) if t != 4
    ]
    assert merged.frame[~is_static].tolist() == list(range(16))
    assert (merged.position[~is_static] == 4).all()
    torch.testing.assert_close(merged.embeddings[merged.assignment], features)


def test_places_that_stand_still_are_told_apart_where_fewer_tokens_than_asked_for_would_be_left():
    """Half of a still video is asked for: only the first places, of which all are equally still, become one."""
    picture = torch.randn(1, 10, 64, generator=torch.Generator().manual_seed(1))
    merged = merge(picture.expand(12, -1, -1).contiguous(), 0.5)
    assert merged.segments == [(0, 12)]
    static = merged.position[merged.kind == TokenKind.STATIC]
    assert len(static)
    assert static.max() < 5  # 55 tokens go where 5 places become one; 60 may
