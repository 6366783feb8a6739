"""What a merged video says of itself."""

import re

import pytest
import torch

from holitom_hf.merging import MergedVideo, MergingSettings, TokenKind, merge_video_tokens


@pytest.fixture(scope="module", params=["end", "row"])
def merged(request) -> MergedVideo:
    random = torch.Generator().manual_seed(0)
    still = torch.randn(1, 16, 8, generator=random).expand(3, -1, -1)
    features = torch.cat([still, torch.randn(3, 16, 8, generator=random)])
    newline = torch.zeros(8) if request.param == "row" else None
    settings = MergingSettings(retention_ratio=0.4, newline_position=request.param)
    return merge_video_tokens(features, torch.rand(6, 16, generator=random), settings, newline)


def fates(merged: MergedVideo, start: int, stop: int) -> list[int]:
    """Tokens, static, dynamic, newlines, merged into others, dropped: counted one by one."""
    counts = [0, 0, 0, 0, 0, 0]
    for frame in range(start, stop):
        for output in merged.assignment[frame].tolist():
            counts[0] += 1
            counts[5] += output < 0
    for frame, kind in zip(merged.frame.tolist(), merged.kind.tolist()):
        counts[1 + kind] += start <= frame < stop
    counts[4] = counts[0] - counts[5] - counts[1] - counts[2]
    return counts


def test_its_repr_is_short(merged):
    text = repr(merged)
    assert len(text) < 160
    assert "tensor" not in text
    assert text.startswith(f"MergedVideo(6 frames of 16 tokens in {len(merged.segments)} segments -> ")
    for kind, name in ((TokenKind.STATIC, "static"), (TokenKind.DYNAMIC, "dynamic"), (TokenKind.NEWLINE, "newline")):
        number = sum(each == kind for each in merged.kind.tolist())
        assert (f"{number} {name}" in text) == (number > 0)


def test_in_a_notebook_it_is_a_table_by_segment(merged):
    rows = re.findall(r"<tr><td>(.*?)</td></tr>", merged._repr_html_().replace("</tr><tr>", "</tr>\n<tr>"))
    expected = [[f"{a}-{b - 1}", *fates(merged, a, b)] for a, b in merged.segments] + [["all", *fates(merged, 0, 6)]]
    assert [row.split("</td><td>") for row in rows] == [list(map(str, row)) for row in expected]
    assert "->" not in merged._repr_html_()
    assert all(number >= 0 for row in expected for number in row[1:])
