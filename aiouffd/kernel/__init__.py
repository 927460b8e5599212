"""The kernel's interface as it is, typed: userfaultfd, pagemap, and what this kernel can do."""

__all__: list[str] = []
