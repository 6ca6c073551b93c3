"""Result rows to Markdown, CSV, LaTeX, JSON and one scatter plot."""

from advtune.report.formats import render
from advtune.report.plot import scatter
from advtune.report.table import table

__all__ = ["render", "scatter", "table"]
