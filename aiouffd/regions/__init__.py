"""Memory of this process that fills itself: regions, their faults, and the loops that serve."""

__all__: list[str] = []
