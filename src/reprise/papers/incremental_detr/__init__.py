"""Incremental-DETR: incremental few-shot object detection via self-supervised learning (2205.04042)."""
