"""Data: samples that travel with the package, and the full sets they are taken from."""
