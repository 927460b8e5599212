"""The NBD protocol, both sides: as a source of bytes, and to serve any source.

``wire`` has the numbers and the layouts, ``client_core`` and ``server_core`` are state machines
without I/O, ``client`` and ``server`` put them on asyncio.
"""
