"""SAM: Sharpness-Aware Minimization for Efficiently Improving Generalization (Foret et al., ICLR 2021)."""
