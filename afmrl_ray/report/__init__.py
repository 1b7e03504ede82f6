"""Tables, plots and the HTML report of a run."""

from __future__ import annotations

from afmrl_ray.report.compare import compare
from afmrl_ray.report.compare_tables import comparison_text
from afmrl_ray.report.table import run_table
from afmrl_ray.report.write import write_comparison, write_report

__all__ = ["compare", "comparison_text", "run_table", "write_comparison", "write_report"]
