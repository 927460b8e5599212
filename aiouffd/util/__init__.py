"""Small tools without a domain: they know nothing of memory, sources or loops of ours."""

__all__: list[str] = []
