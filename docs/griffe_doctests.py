"""Examples in docstrings (`>>> ...`) as blocks of code: Markdown would read them as quotations and links."""

import griffe


def fenced(text: str) -> str:
    """The text with ``` around each run of lines that begins with `>>>` and ends at an empty line."""
    lines, inside = [], False
    for line in text.splitlines():
        starts = line.lstrip().startswith(">>>")
        indent = line[: len(line) - len(line.lstrip())]
        if starts and not inside:
            lines += ["", f"{indent}```pycon"]
            inside, margin = True, indent
        elif inside and not line.strip():
            lines.append(f"{margin}```")
            inside = False
        lines.append(line)
    return "\n".join([*lines, f"{margin}```"] if inside else lines)


class FencedDoctests(griffe.Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None and ">>>" in obj.docstring.value:
            obj.docstring.value = fenced(obj.docstring.value)
