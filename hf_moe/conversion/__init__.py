"""Conversion of checkpoints tensor by tensor: between precisions, layouts and sizes, in little memory."""
