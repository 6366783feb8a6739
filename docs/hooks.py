"""
What of the repository is in the site beside the pages in docs/, and how pages link to it.

Pages are written so that their links work in the repository: `../src/...`, `../examples/merging.png`. In the site
the Markdown files in `PAGES` are pages, pictures keep their place below the root, and every other file that a page
links to becomes text that a browser shows.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).parents[1]
# Written elsewhere, read here, too: where they are in the repository, and in the site.
PAGES = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "configs/README.md": "presets.md",
    "examples/benchmark/scaling.md": "benchmark.md",
    "examples/evaluation/table.md": "evaluation_rows.md",
}
PICTURES = {".png", ".jpg", ".svg"}
# [text](target) or ![text](target), and what is code instead.
LINK_OR_CODE = re.compile(r"(?P<code>```.*?^```|`[^`\n]+`)|(?P<link>(?<=\]\()[^)\s]+(?=\)))", re.DOTALL | re.MULTILINE)


def links(markdown: str) -> list[str]:
    """What a page links to within the repository, anchors included; those inside of code are none."""
    found = [match["link"] for match in LINK_OR_CODE.finditer(markdown) if match["link"]]
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def repository_path(page: str, link: str) -> str:
    """
    The file that a page links to.

    Args:
        page: Its path in the repository, such as `docs/speed.md`.
        link: As it is written, without an anchor.
    """
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def site_path(path: str) -> str | None:
    """Where a file of the repository is in the site, by source; `None` for folders, which a site can't show."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in PAGES:
        return PAGES[path]
    if Path(path).suffix in PICTURES:
        return path
    return f"{path}.txt" if (ROOT / path).is_file() else None


def origin(file: File) -> str:
    """Where a page of the site is in the repository."""
    return next((path for path, place in PAGES.items() if place == file.src_uri), f"docs/{file.src_uri}")


def on_files(files, config):
    """Adds the pages from elsewhere, and the files that pages link to."""
    for path, place in PAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    for page in files.documentation_pages():
        for link in links(page.content_string):
            path = repository_path(origin(page), link.partition("#")[0])
            place = site_path(path)
            if place is not None and (ROOT / path).is_file() and files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links of the repository into links of the site."""

    def rewritten(match: re.Match) -> str:
        link = match["link"]
        if link is None or link.startswith("#") or re.match(r"[a-z]+:", link):
            return match[0]
        target, mark, anchor = link.partition("#")
        place = site_path(repository_path(origin(page.file), target))
        if place is None:
            return match[0]  # MkDocs warns of it
        return posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".") + mark + anchor

    return LINK_OR_CODE.sub(rewritten, markdown)
