"""Measurements: one module an operator, run as `python -m bench.NAME`; rows go to bench/results/NAME.jsonl."""
