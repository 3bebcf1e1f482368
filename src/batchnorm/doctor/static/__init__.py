"""Checks that need no data: one file per family."""
