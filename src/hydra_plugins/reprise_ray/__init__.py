"""Hydra plugin: the Ray launcher of reprise (see `launcher.py`)."""
