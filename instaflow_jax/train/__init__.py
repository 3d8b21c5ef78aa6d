"""Training: state, optimiser, step and loop, shared by pretraining, reflow and distillation."""
