"""Jobs that are submitted to a cluster (`python jobs/NAME.py`), benchmarks and experiments (`python -m jobs.…`)."""
