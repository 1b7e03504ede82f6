"""Studies that train and measure variants. Run from the repository's root: `python -m jobs.experiments.ladder`."""
