"""Errors, files, signals, environment variables, ranks and the terminal: what every folder uses."""
