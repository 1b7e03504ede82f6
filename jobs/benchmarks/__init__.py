"""Timings beside other implementations. Run from the repository's root: `python -m jobs.benchmarks.agcl`."""
