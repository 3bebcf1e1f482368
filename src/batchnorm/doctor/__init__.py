"""The doctor: find what is wrong with batch norm in a model, prove it, fix it."""
