"""Run traced steps on torch tensors, without and with gradients."""
