"""Why batch norm works: the papers' claims as experiments, one file each."""
