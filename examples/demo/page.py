"""report.html: one file with its images inside, which fetches nothing. It follows a dark or light system."""

import base64
from html import escape
from string import Template

from examples.demo import captions
from examples.demo.figures import DARK, FIGURES, LIGHT, render
from examples.demo.results import Results, Text
from examples.demo.tables import Table, bits_table, decode_table, quality_table

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>rana_kernels: demo report</title>
<style>
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --soft: #666; --line: #d8d8d8; --code: #f5f5f5 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181b; --soft: #aaa; --line: #444; --code: #212429 }
}
body { margin: 0 auto; padding: 1rem; max-width: 46rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif }
h1, h2 { line-height: 1.2; text-wrap: balance }
h2 { margin-top: 2.5rem }
figure { margin: 1rem 0 }
img { display: block; width: 100%; max-width: 36rem; height: auto; margin: 0 auto }
figcaption { margin-top: .5rem; color: var(--soft); font-size: .875rem }
figcaption small { display: block; margin-top: .25rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child { text-align: left; padding-left: 0 }
tbody th { font-weight: inherit }
thead th { vertical-align: bottom; white-space: normal }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem }
.texts article { min-width: 0 }
h3 { margin: 0; font-size: 1rem }
pre { margin: .5rem 0 0; padding: .75rem; background: var(--code); white-space: pre-wrap;
  overflow-wrap: anywhere; font: .8125rem/1.45 ui-monospace, monospace }
.prompt { color: var(--soft) }
</style>
</head>
<body>
<header>
<h1>What RaNA does to a small model</h1>
<p>$summary</p>
</header>
<main>
$sections
</main>
<footer>
<p><small>$provenance · Python $python · transformers $transformers.
The demo took $seconds s. All numbers are in report.json, beside this page.</small></p>
</footer>
</body>
</html>
""")


def page(results: Results) -> str:
    provenance = results.provenance
    return PAGE.substitute(
        summary=escape(captions.summary(results)),
        sections="\n".join(_sections(results)),
        provenance=escape(provenance.line()),
        python=escape(provenance.python),
        transformers=escape(provenance.transformers),
        seconds=f"{results.seconds:.0f}",
    )


def _sections(results: Results) -> list[str]:
    plots = {name: _plot(name, results) for name in FIGURES}
    quality = _table(quality_table(results.quality))
    bits = _table(bits_table(results.bits))
    decode = _table(decode_table(results.decode_steps))
    texts = "\n".join(_text(text, results.texts.prompt) for text in results.texts.texts)
    return [
        _section(
            "Perplexity and cost",
            _figure("quality", quality, captions.quality(results), results),
            plots["perplexity"],
            _figure("bits", bits, captions.bits(results), results),
        ),
        _section(
            "What the models write",
            _figure("texts", f'<div class="texts">\n{texts}\n</div>', captions.texts(results), results),
        ),
        _section(
            "Speed of a decode step",
            _figure("decode", decode, captions.decode(results), results),
            plots["density"],
        ),
        _section("Inside the layers", plots["live_ranks"], plots["spectra"], plots["output_error"]),
    ]


def _section(title: str, *figures: str) -> str:
    return "\n".join(["<section>", f"<h2>{escape(title)}</h2>", *figures, "</section>"])


def _figure(name: str, content: str, caption: str, results: Results) -> str:
    """Return a figure that says what produced it, because figures are copied without their page."""
    produced = escape(results.provenance.line())
    return (
        f'<figure id="{name}">\n{content}\n'
        f"<figcaption>{escape(caption)}<small>{produced}</small></figcaption>\n</figure>"
    )


def _plot(name: str, results: Results) -> str:
    """Return a plot with the caption of the same name."""
    light, dark = (_data_url(render(FIGURES[name], results, theme)) for theme in (LIGHT, DARK))
    caption = getattr(captions, name)(results)
    picture = (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(caption)}"></picture>'
    )
    return _figure(name, picture, caption, results)


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = "\n".join(f"<tr>{_row(row)}</tr>" for row in table.rows)
    parts = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="wide"><table>\n{parts}\n</table></div>'


def _row(cells: tuple[str, ...]) -> str:
    name, *numbers = map(escape, cells)
    return f'<th scope="row">{name}</th>' + "".join(f"<td>{number}</td>" for number in numbers)


def _text(text: Text, prompt: str) -> str:
    return (
        f'<article><h3>{escape(text.label)}</h3>\n<pre><span class="prompt">{escape(prompt)}</span>'
        f"{escape(text.continuation)}</pre></article>"
    )
