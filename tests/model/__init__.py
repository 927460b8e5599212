"""Finite models of the protocols, for exhaustive search."""
