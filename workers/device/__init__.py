"""The seam between the workers and a tensor framework; nothing outside this folder imports one."""
