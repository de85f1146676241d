"""The ERNIE-4.5 model, layer by layer."""
