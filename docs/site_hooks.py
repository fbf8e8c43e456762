"""What the site needs beyond Markdown in this folder.

Pages that live elsewhere in the repository (experiments' READMEs, CONTRIBUTING.md, ...) join the site, the
notebook becomes a page, and links to files that are no pages (code, results, folders) become plain text.
"""

import json
import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md")
NOTEBOOK = "notebooks/first-steps"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def outside_pages() -> list[str]:
    """Paths in the repository of the pages that do not lie in docs/."""
    readmes = (ROOT / "experiments").glob("*/README.md")
    return [*OUTSIDE, *(path.relative_to(ROOT).as_posix() for path in sorted(readmes))]


def notebook_page(path: pathlib.Path) -> str:
    """A notebook as Markdown: its text as it is, its code in blocks."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def on_files(files, config):
    for path in outside_pages():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, path, content=text))
    page = notebook_page(ROOT / "docs" / f"{NOTEBOOK}.ipynb")
    files.append(File.generated(config, f"{NOTEBOOK}.md", content=page))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites links between docs/ and the rest of the repository."""
    here = page.file.src_uri
    source = here if here in outside_pages() else f"docs/{here}"

    def rewrite(match):
        image, text, target = match.groups()
        address, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not address:
            return match.group(0)
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), address))
        uri = path.removeprefix("docs/") if path.startswith("docs/") else path
        if uri == "README.md":
            uri = "index.md"
        if files.get_file_from_path(uri) is None:
            if not (ROOT / path).exists():
                return match.group(0)  # MkDocs warns of it
            return text
        new = posixpath.relpath(uri, posixpath.dirname(here) or ".")
        return f"{image}[{text}]({new}{'#' + anchor if anchor else ''})"

    return LINK.sub(rewrite, markdown)
