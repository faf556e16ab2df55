"""A report as HTML and as Markdown: blocks of text, tables and charts, the same for both.

Whatever comes out of a record is text to show: every string is escaped, by :mod:`markupsafe` in HTML and by
:func:`_plain` in Markdown, and the page forbids every script but its own by its digest. The page needs no other file
and no network. Charts are SVG whose lengths are percentages, so that they fit every width and their labels, which are
HTML, stay readable.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

SHORT = 22  # a cell of so many letters is not broken into lines
SHORT_NUMBER = 34  # the same of a number with its interval
COLOURS = 14  # of the parts of a stack; there are as many in the style


def _text_only(*values: object) -> None:
    """TypeError for what is no text: a block that exists can be drawn, whatever it was made of."""
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{value!r} is not text")


def _finite(*values: object) -> None:
    """TypeError or ValueError for what is no number that can be drawn."""
    for value in values:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{value!r} is not a number")
        if not math.isfinite(value):
            raise ValueError(f"{value!r} is not finite")


@dataclass(frozen=True)
class Cell:
    """What stands in a table. sort: a number to order by, and to the right then. kind: "red", "unrun", "ours", "muted"
    or "". link: the id of a place in the page. bar: a fraction to draw behind a number, cut at 1."""

    text: str
    sort: float | None = None
    kind: str = ""
    link: str = ""
    bar: float | None = None

    def __post_init__(self) -> None:
        _text_only(self.text)
        _finite(*(x for x in (self.sort, self.bar) if x is not None))


UNRUN = Cell("unrun", kind="unrun")
NOTHING = Cell("–", kind="muted")


@dataclass(frozen=True)
class Table:
    """Rows under heads; more than ``folded`` rows are folded up. name: what the fold says."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    name: str = ""
    folded: int = 60


@dataclass(frozen=True)
class Text:
    """A paragraph. loud: something is wrong. code: a command to type."""

    text: str
    loud: bool = False
    code: str = ""

    def __post_init__(self) -> None:
        _text_only(self.text, self.code)


@dataclass(frozen=True)
class Bar:
    """A value with its interval. kind: "ours", "other", "better", "worse" or "none"."""

    label: str
    value: float
    low: float
    high: float
    text: str
    kind: str = "other"

    def __post_init__(self) -> None:
        _text_only(self.label, self.text)
        _finite(self.value, self.low, self.high)


@dataclass(frozen=True)
class Bars:
    """Bars from 0, which may go both ways. band: values from its low to its high end are shaded: not told from 0."""

    bars: Sequence[Bar]
    band: tuple[float, float] = (0.0, 0.0)
    about: str = ""

    def __post_init__(self) -> None:
        _finite(*self.band)


@dataclass(frozen=True)
class Stack:
    """Parts of a whole, side by side: (name, share)."""

    parts: Sequence[tuple[str, float]]
    about: str

    def __post_init__(self) -> None:
        _text_only(*(name for name, _ in self.parts))
        _finite(*(share for _, share in self.parts))


@dataclass(frozen=True)
class Points:
    """Samples in the order in which they were taken: (name, samples, what to say of them)."""

    rows: Sequence[tuple[str, Sequence[float], str]]


Block = Table | Text | Bars | Stack | Points


@dataclass
class Section:
    """A title with blocks and what lies under it. key: its id in the page. only_page: not for Markdown."""

    title: str
    key: str = ""
    blocks: list[Block] = field(default_factory=list)
    inner: list[Section] = field(default_factory=list)
    folded: bool = False
    only_page: bool = False


# ---------------------------------------------------------------------------------------------------------------- HTML

STYLE = """
:root{color-scheme:light dark;--ground:#fff;--text:#1d2330;--muted:#5d6675;--line:#dfe3ea;--panel:#f5f7fa;
--ours:#1f6feb;--other:#9aa7b8;--better:#1a7f4b;--worse:#c0392b;--none:#9aa7b8;--whisker:#1d2330;--band:#e4e8ef;
--red-ground:#fdecea;--red:#a11a0e;--link:#0b57c4;--c0:#4269d0;--c1:#e0932f;--c2:#3a9d6a;--c3:#d1495b;--c4:#8a63c9;
--c5:#2f9bb3;--c6:#b07d4f;--c7:#d77fb3;--c8:#7f8c1f;--c9:#5b6b7f;--c10:#95a8d8;--c11:#efc58a;--c12:#a9b4c2;
--c13:#cfd5de}
@media (prefers-color-scheme:dark){:root{--ground:#12161d;--text:#e4e8ef;--muted:#98a2b3;--line:#2b323d;--panel:#1a2029;
--ours:#5b9bff;--other:#5d6b80;--better:#3fb97b;--worse:#ef6a5b;--none:#5d6b80;--whisker:#e4e8ef;--band:#262d39;
--red-ground:#3a1714;--red:#ffa79d;--link:#82b4ff;--c9:#8595ab;--c12:#6f7b8c;--c13:#4a5463}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:96rem;padding:1.5rem 1.25rem 4rem;background:var(--ground);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;overflow-wrap:break-word}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .4rem}h2{font-size:1.3rem;margin:2.6rem 0 .6rem;padding-top:.8rem;
border-top:1px solid var(--line)}h3{font-size:1.02rem;margin:1.6rem 0 .4rem}p{margin:.5rem 0;max-width:60rem}
a{color:var(--link)}nav{display:flex;flex-wrap:wrap;gap:.3rem 1rem;margin:.8rem 0 0}
.muted{color:var(--muted)}
code{background:var(--panel);border-radius:3px;padding:.1rem .3rem;font:13px/1.45 ui-monospace,monospace;
overflow-wrap:anywhere}
.loud{background:var(--red-ground);color:var(--red);border-left:4px solid var(--red);padding:.55rem .8rem;
font-weight:600;overflow-wrap:anywhere;max-width:none}
/* what is cut at a side shows a shadow there */
.wide{overflow-x:auto;margin:.7rem 0;background:linear-gradient(to right,var(--ground) 40%,transparent) left/3rem 100%
no-repeat local,linear-gradient(to left,var(--ground) 40%,transparent) right/3rem 100% no-repeat local,
linear-gradient(to right,#8888,transparent) left/.8rem 100% no-repeat,
linear-gradient(to left,#8888,transparent) right/.8rem 100% no-repeat}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:.3rem .75rem .3rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
td{max-width:34rem}td.short{white-space:nowrap}th{vertical-align:bottom;max-width:9rem;color:var(--muted);font-weight:600}
th button{all:unset;cursor:pointer}th button:focus-visible{outline:2px solid var(--link);outline-offset:2px}
th[aria-sort=ascending] button:after{content:" ▲"}th[aria-sort=descending] button:after{content:" ▼"}
.number{text-align:right}td.ours{font-weight:650}
td.red,td.red a{color:var(--red);font-weight:700}td.unrun,td.muted{color:var(--muted)}td.unrun{font-style:italic}
td .share{display:block;height:3px;background:var(--ours);border-radius:2px}
td.number:has(.share){min-width:7rem}
.bars{display:grid;grid-template-columns:minmax(9rem,max-content) minmax(8rem,1fr) max-content;gap:.3rem .9rem;
align-items:center;margin:.8rem 0;font-size:14px}
.bars .label{max-width:26rem}.bars .value{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.bars .ours{font-weight:650}
svg{display:block;overflow:visible}svg .ours{fill:var(--ours)}svg .other{fill:var(--other)}
svg .better{fill:var(--better)}svg .worse{fill:var(--worse)}svg .none{fill:var(--none)}svg .band{fill:var(--band)}
svg line{stroke:var(--whisker);stroke-width:1.5}svg line.zero{stroke:var(--muted);stroke-width:1}
svg polyline{fill:none;stroke:var(--ours);stroke-width:1.3;vector-effect:non-scaling-stroke}
.parts{display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;margin:.5rem 0;padding:0;list-style:none;font-size:14px}
.parts i{display:inline-block;width:.75rem;height:.75rem;border-radius:2px;margin-right:.35rem}
details{margin:.5rem 0}summary{cursor:pointer;overflow-wrap:anywhere}details>*:not(summary){margin-left:.2rem}
.record{border:1px solid var(--line);border-radius:6px;padding:.45rem .8rem;margin:.5rem 0}
@media (max-width:42rem){body{padding:1rem .8rem 3rem}h1{font-size:1.4rem}
.bars{grid-template-columns:1fr max-content}.bars .label{grid-column:1/-1;max-width:none;margin-top:.35rem}
td{max-width:16rem}}
""" + "".join(f".c{i}{{background:var(--c{i});fill:var(--c{i})}}" for i in range(COLOURS))

# a click on a head orders the rows below it; a second one turns them round
SCRIPT = """
document.addEventListener("click",function(e){
var b=e.target.closest("th button");if(!b)return;
var th=b.parentNode,body=th.closest("table").tBodies[0],i=th.cellIndex,up=th.getAttribute("aria-sort")!=="ascending";
th.parentNode.querySelectorAll("th").forEach(function(x){x.removeAttribute("aria-sort")});
th.setAttribute("aria-sort",up?"ascending":"descending");
var key=function(r){var c=r.cells[i];return c.dataset.v===undefined?null:+c.dataset.v};
Array.from(body.rows).sort(function(p,q){var a=key(p),b=key(q);
if(a===null&&b===null)return(up?1:-1)*p.cells[i].textContent.localeCompare(q.cells[i].textContent);
if(a===null||b===null)return a===null?1:-1;
return(up?1:-1)*(a-b)}).forEach(function(r){body.appendChild(r)});
});
document.addEventListener("click",function(e){var a=e.target.closest("a[href^='#']");
var d=a&&document.getElementById(a.getAttribute("href").slice(1));if(d&&d.tagName==="DETAILS")d.open=true});
"""


def html_page(title: str, about: str, sections: Sequence[Section]) -> bytes:
    """One self-contained page."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    links = Markup("\n").join(Markup('<a href="#{}">{}</a>').format(s.key, s.title) for s in sections)
    text = Markup(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="{}">\n<title>{}</title>\n<style>{}</style>\n</head>\n'
        '<body>\n<header>\n<h1>{}</h1>\n<p class="muted">{}</p>\n<nav>{}</nav>\n</header>\n<main>\n{}\n</main>\n'
        "<script>{}</script>\n</body>\n</html>\n"
    ).format(
        policy, title, Markup(STYLE), title, about, links,
        Markup("\n").join(_section(s, 2) for s in sections), Markup(SCRIPT),
    )  # fmt: skip
    return text.encode("utf-8", "replace")  # half a surrogate pair can be written in JSON, and not in UTF-8


def _section(section: Section, level: int) -> Markup:
    inside = Markup("\n").join(
        [*(_BLOCKS[type(block)](block) for block in section.blocks), *(_section(s, level + 1) for s in section.inner)]
    )
    if section.folded:
        return Markup('<details class="record" id="{}">\n<summary>{}</summary>\n{}\n</details>').format(
            section.key, section.title, inside
        )
    head = Markup("<h{0}>{1}</h{0}>").format(level, section.title)
    where = Markup(' id="{}"').format(section.key) if section.key else Markup("")
    return Markup("<section{}>\n{}\n{}\n</section>").format(where, head, inside)


def _text(block: Text) -> Markup:
    code = Markup(" <code>{}</code>").format(block.code) if block.code else Markup("")
    return Markup("<p{}>{}{}</p>").format(Markup(' class="loud"') if block.loud else "", block.text, code)


def _table(block: Table) -> Markup:
    right = [any(row[i].sort is not None for row in block.rows) for i in range(len(block.heads))]
    heads = Markup("").join(
        Markup('<th scope="col"{}><button type="button">{}</button></th>').format(_class("number" * right[i]), head)
        for i, head in enumerate(block.heads)
    )
    rows = Markup("\n").join(
        Markup("<tr>{}</tr>").format(Markup("").join(_cell(cell, right[i]) for i, cell in enumerate(row)))
        for row in block.rows
    )
    table = Markup(
        '<div class="wide"><table>\n<thead><tr>{}</tr></thead>\n<tbody>\n{}\n</tbody>\n</table></div>'
    ).format(heads, rows)
    if len(block.rows) <= block.folded:
        return table
    return Markup("<details>\n<summary>{} ({} rows)</summary>\n{}\n</details>").format(
        block.name or "Table", len(block.rows), table
    )


def _cell(cell: Cell, right: bool) -> Markup:
    inside = Markup('<a href="#{}">{}</a>').format(cell.link, cell.text) if cell.link else escape(cell.text)
    if cell.bar is not None:
        inside += Markup('<span class="share" style="width:{}%"></span>').format(_percent(cell.bar))
    number = cell.sort is not None
    short = len(cell.text) <= (SHORT_NUMBER if number else SHORT)
    names = [name for name in ("number" * (right and (short or number)), "short" * short, cell.kind) if name]
    value = Markup(' data-v="{}"').format(repr(float(cell.sort))) if cell.sort is not None else ""
    return Markup("<td{}{}>{}</td>").format(_class(" ".join(names)), value, inside)


def _class(names: str) -> Markup:
    return Markup(' class="{}"').format(names) if names else Markup("")


def _percent(fraction: float) -> str:
    """A length in percent, kept within the drawing."""
    return f"{100 * min(max(fraction, 0.0), 1.0):.2f}"


def _bars(block: Bars) -> Markup:
    least = min(0.0, block.band[0], *(bar.low for bar in block.bars), *(bar.value for bar in block.bars))
    most = max(0.0, block.band[1], *(bar.high for bar in block.bars), *(bar.value for bar in block.bars))
    span = (most - least) or 1.0

    def at(value: float) -> str:
        return _percent((value - least) / span)

    band = Markup("")
    if any(block.band):
        band = Markup('<rect class="band" x="{}%" width="{}%" y="0" height="22"/>').format(
            at(block.band[0]), _percent((block.band[1] - block.band[0]) / span)
        )
    rows = []
    for bar in block.bars:
        left, right = sorted((0.0, bar.value))
        whisker = Markup("").join(
            Markup('<line x1="{}%" x2="{}%" y1="{}" y2="{}"/>').format(at(x1), at(x2), y1, y2)
            for x1, x2, y1, y2 in (
                (bar.low, bar.high, 11, 11), (bar.low, bar.low, 7, 15), (bar.high, bar.high, 7, 15),
            )
        ) if bar.high > bar.low else ""  # fmt: skip
        rows.append(
            Markup(
                '<div class="label{}">{}</div><svg width="100%" height="22" role="img" aria-label="{}">{}'
                '<rect class="{}" x="{}%" width="{}%" y="4" height="14" rx="2"/>{}'
                '<line class="zero" x1="{}%" x2="{}%" y1="0" y2="22"/></svg><div class="value">{}</div>'
            ).format(
                " ours" * (bar.kind == "ours"), bar.label, f"{bar.label}: {bar.text}", band, bar.kind, at(left),
                _percent((right - left) / span), whisker, at(0.0), at(0.0), bar.text,
            )
        )  # fmt: skip
    about = Markup('<p class="muted">{}</p>').format(block.about) if block.about else Markup("")
    return Markup('<div class="bars">\n{}\n</div>{}').format(Markup("\n").join(rows), about)


def _stack(block: Stack) -> Markup:
    total = sum(share for _, share in block.parts) or 1.0
    drawn, legend, left = [], [], 0.0
    for i, (name, share) in enumerate(block.parts):
        text = f"{name} {100 * share:.1f} %"
        drawn.append(
            Markup(
                '<rect class="c{}" x="{}%" width="{}%" y="0" height="34"><title>{}</title></rect>'
            ).format(i % COLOURS, _percent(left / total), _percent(share / total), text)
        )  # fmt: skip
        legend.append(Markup('<li><i class="c{}"></i>{}</li>').format(i % COLOURS, text))
        left += share
    return Markup(
        '<svg width="100%" height="34" role="img" aria-label="{}">{}</svg>\n<ul class="parts">{}</ul>'
    ).format(block.about, Markup("").join(drawn), Markup("").join(legend))  # fmt: skip


def _points(block: Points) -> Markup:
    rows = []
    for name, samples, text in block.rows:
        least, most = min(samples), max(samples)
        span, step = (most - least) or 1.0, 100 / max(len(samples) - 1, 1)
        line = " ".join(f"{i * step:.2f},{2 + 20 * (1 - (x - least) / span):.2f}" for i, x in enumerate(samples))
        rows.append(
            Markup(
                '<div class="label">{}</div><svg width="100%" height="24" viewBox="0 0 100 24" '
                'preserveAspectRatio="none" role="img" aria-label="{}"><polyline points="{}"/></svg>'
                '<div class="value">{}</div>'
            ).format(name, f"{name}: {text}", line, text)
        )
    return Markup('<div class="bars">\n{}\n</div>').format(Markup("\n").join(rows))


_BLOCKS: dict[type, Callable[..., Markup]] = {Text: _text, Table: _table, Bars: _bars, Stack: _stack, Points: _points}

# ------------------------------------------------------------------------------------------------------------ Markdown


def markdown(sections: Sequence[Section], level: int = 2) -> str:
    """The texts and tables of the sections that are not only for the page."""
    parts = []
    for section in sections:
        if section.only_page:
            continue
        parts.append(f"{'#' * level} {_plain(section.title)}")
        for block in section.blocks:
            if isinstance(block, Text):
                text = f"**{_plain(block.text)}**" if block.loud else _plain(block.text)
                parts.append(text + (f" {_code(block.code)}" if block.code else ""))
            elif isinstance(block, Table):
                parts.append(_markdown_table(block))
        parts.append(markdown(section.inner, level + 1))
    return "\n\n".join(filter(None, parts))


def _markdown_table(block: Table) -> str:
    right = [any(row[i].sort is not None for row in block.rows) for i in range(len(block.heads))]
    lines = [
        "| " + " | ".join(map(_plain, block.heads)) + " |",
        "|" + "|".join("---:" if r else "---" for r in right) + "|",
    ]
    marks = {"unrun": "*", "red": "**", "ours": "**"}
    for row in block.rows:
        cells = [f"{marks.get(c.kind, '')}{_plain(c.text)}{marks.get(c.kind, '')}" if c.text else "" for c in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """A string as text of one line that means nothing in Markdown: no tag, comment, column, emphasis or link."""
    one = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*|]|(?<!\w)_|_(?!\w)|(?<=\])\(|^[#+-]", r"\\\g<0>", one)


def _code(text: str) -> str:
    """A string between backticks, where no escape has a meaning: what would end it, or look like a marker, is bent."""
    return "`" + " ".join(text.split()).replace("`", "’").replace("<!--", "<! --").replace("|", "¦") + "`"
