"""From a source to where bytes are needed: the one fetch engine, and what it looks ahead for."""

__all__: list[str] = []
