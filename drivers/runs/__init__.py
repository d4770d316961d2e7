"""Files of a run: folder, log, checkpoints, completions."""
