"""FedNTD: not-true distillation preserves global knowledge in federated learning (Lee et al., NeurIPS 2022)."""
