"""Tables, plots and the HTML report of a run."""

from __future__ import annotations

from afmrl_ray.report.table import run_table
from afmrl_ray.report.write import write_report

__all__ = ["run_table", "write_report"]
