"""Checkpoints of every kind as what they can do, for scripts/demo.py."""
