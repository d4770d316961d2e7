"""Rewards, computed in worker processes."""
