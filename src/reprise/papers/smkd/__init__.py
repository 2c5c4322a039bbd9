"""SMKD: supervised masked knowledge distillation of class and patch tokens for few-shot transformers."""
