"""Throughput of the ops beside what people use instead: ``python -m bench.gpu`` and ``pytest bench/``."""
