"""MoCo v1, v2 and v3: contrastive learning against keys from a slowly moving copy of the encoder."""
