"""DETR: end-to-end object detection with transformers (Carion et al., ECCV 2020, arXiv 2005.12872)."""
