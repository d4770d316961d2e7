"""Flags, recipes and the checks that reject invalid combinations; loads no torch."""
