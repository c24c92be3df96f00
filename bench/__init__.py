"""Microbenchmarks of fastattn: `python -m fastattn.bench run`. Ships as `fastattn.bench`."""
