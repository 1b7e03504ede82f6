"""Data and measurements of the small packaged checkpoints (`afmrl_ray/assets/README.md`)."""
