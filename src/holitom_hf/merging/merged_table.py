"""What became of a video's tokens, as a table for notebooks."""

from html import escape

from .merged_video import MergedVideo, TokenKind


def merged_table(merged: MergedVideo) -> str:
    """HTML: segment by segment, how many tokens there were and what became of them."""
    frame, kind, assignment = merged.frame.cpu(), merged.kind.cpu(), merged.assignment.cpu()
    rows = []
    for start, stop in [*merged.segments, (0, len(assignment))]:
        inside = (frame >= start) & (frame < stop)
        num, dropped = assignment[start:stop].numel(), int((assignment[start:stop] < 0).sum())
        kinds = [int((inside & (kind == each)).sum()) for each in TokenKind]
        rows.append((f"{start}-{stop - 1}", num, *kinds, num - dropped - sum(kinds[:2]), dropped))
    rows[-1] = ("all", *rows[-1][1:])
    head = ("frames", "tokens", "static", "dynamic", "newlines", "merged into these", "dropped")
    lines = (f"<td>{'</td><td>'.join(map(str, row))}</td>" for row in rows)
    table = f"<tr><th>{'</th><th>'.join(head)}</th></tr><tr>{'</tr><tr>'.join(lines)}</tr>"
    return f"<p>{escape(repr(merged))}</p><table>{table}</table>"
