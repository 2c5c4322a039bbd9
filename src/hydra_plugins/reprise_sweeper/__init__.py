"""Hydra plugin: the sweeper of reprise (see `sweeper.py`)."""
