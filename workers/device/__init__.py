"""The only place that imports a tensor framework."""
