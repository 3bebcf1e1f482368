"""Checks on a handful of batches: what is observed, and one file per family of checks on it."""
