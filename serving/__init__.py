"""What goes over the wire. It knows nothing of tensors."""
