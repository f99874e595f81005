"""Building blocks of the models; scale enters a model only through `ModelOps`."""
