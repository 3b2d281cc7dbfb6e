"""A traced cell as something callable on torch tensors, without and with gradients."""
