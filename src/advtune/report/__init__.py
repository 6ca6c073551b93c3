"""Result rows to Markdown, CSV, LaTeX, JSON, figures and a page; published numbers with ours beside them."""

from advtune.report.beside import render_against
from advtune.report.formats import render
from advtune.report.plot import scatter
from advtune.report.table import table

__all__ = ["render", "render_against", "scatter", "table"]
