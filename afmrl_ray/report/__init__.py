"""Tables, plots and the page of a run."""

from __future__ import annotations

from afmrl_ray.report.write import run_table, write_report

__all__ = ["run_table", "write_report"]
