"""Training: state, optimizer, step and loop, shared by pretraining, reflow and distillation."""
