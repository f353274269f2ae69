"""Tables as Markdown, LaTeX and HTML."""

import html
from collections.abc import Callable, Sequence
from typing import Protocol


class Sheet(Protocol):
    """What is written: see `table.Section`."""

    @property
    def title(self) -> str: ...
    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def rows(self) -> tuple[tuple[str, ...], ...]: ...


Write = Callable[[str, Sequence[Sheet], Sequence[str]], str]


def markdown(name: str, sheets: Sequence[Sheet], notes: Sequence[str]) -> str:
    """Pipe tables, numbers to the right, the notes as a list."""
    parts = []
    for sheet in sheets:
        rule = "|---|" + "---:|" * (len(sheet.columns) - 1)
        rows = [_piped(sheet.columns), rule, *(_piped(row) for row in sheet.rows)]
        parts += [f"**{sheet.title}**"] if sheet.title else []
        parts.append("\n".join(rows))
    parts.append("\n".join("- " + note.replace("*", "\\*") for note in notes))
    return "\n\n".join(parts) + "\n"


def _piped(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |"


def latex(name: str, sheets: Sequence[Sheet], notes: Sequence[str]) -> str:
    """Tables for booktabs, the notes below them in small print."""
    parts = []
    for sheet in sheets:
        title = f"{name}, {sheet.title}" if sheet.title else name
        body = [r" & ".join(_tex(cell) for cell in row) + r" \\" for row in sheet.rows]
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    rf"\caption{{{_tex(title)}}}",
                    rf"\begin{{tabular}}{{l{'r' * (len(sheet.columns) - 1)}}}",
                    r"\toprule",
                    r" & ".join(_tex(column) for column in sheet.columns) + r" \\",
                    r"\midrule",
                    *body,
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )
        )
    small = "\n\n".join(_tex(note) for note in notes)
    return (
        "\n\n".join([r"% \usepackage{booktabs}", *parts, rf"{{\footnotesize {small}\par}}"]) + "\n"
    )


_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "·": r"$\cdot$",
    "–": "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)


_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;margin:2rem;color:#1a1a1a;background:#fff}"
    "div{overflow-x:auto}table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}"
    "caption{text-align:left;font-weight:600;padding:.3rem 0}"
    "th,td{padding:.3rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid #ddd}"
    "th:first-child,td:first-child{text-align:left}thead th{border-bottom:2px solid #555}"
    "ul{max-width:60rem;color:#444}"
)


def page(name: str, sheets: Sequence[Sheet], notes: Sequence[str]) -> str:
    """A page that stands for itself."""
    parts = [_html_table(f"{name}, {s.title}" if s.title else name, s) for s in sheets]
    items = "\n".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f"<title>{html.escape(name)}</title>\n<style>{_STYLE}</style>\n"
        + "\n".join(parts)
        + f"\n<ul>\n{items}\n</ul>\n</html>\n"
    )


def _html_table(caption: str, sheet: Sheet) -> str:
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in sheet.columns)
    rows = "\n".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in sheet.rows
    )
    return (
        f"<div><table>\n<caption>{html.escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


WRITERS: dict[str, Write] = {"md": markdown, "latex": latex, "html": page}
