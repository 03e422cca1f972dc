"""Functions on tensors: grids, sampling, fields, derivatives, smoothing."""
