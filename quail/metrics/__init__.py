"""Metrics of unlearning: pure functions from texts, log-probabilities and scores to figures, one file a protocol.

Nothing here runs a model; ``quail.evaluate`` does, and hands over what these functions take. README.md beside this
file has a line for each metric. Import from the modules.
"""
