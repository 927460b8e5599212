"""What aiouffd is measured against: a fault server, a toucher and a byte server in C."""
