"""Logged runs as curves and as an HTML page."""
