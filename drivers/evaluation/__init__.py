"""A model on sets of questions, and comparisons of two models."""
