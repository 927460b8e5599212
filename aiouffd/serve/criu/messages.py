"""The messages in CRIU's image files, as far as faults need them.

They are protocol buffers (proto2). Their descriptors are built here at run time, of the few fields
that are looked at: the wire format skips the others, so images of all versions can be read, and no
compiler is needed. Every field is declared optional, for what must be there is checked by those
who need it, with an error that says which file is broken.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, Final

from ...errors import UnsupportedError
from ...util.extras import install_hint

__all__ = ["message_class"]

#: Numbers of fields, and how they are encoded, by message. ``*`` marks a repeated one.
_FIELDS: Final[dict[str, dict[str, tuple[int, str]]]] = {
    "inventory_entry": {"img_version": (1, "uint32")},
    "pstree_entry": {"pid": (1, "uint32")},
    "pagemap_head": {"pages_id": (1, "uint32")},
    "pagemap_entry": {
        "vaddr": (1, "uint64"),
        # Until 4.1 this one is the number of pages. Since 4.2 it is there, but may be 0.
        "compat_nr_pages": (2, "uint32"),
        # Until 2.12 this one stood for flags.
        "in_parent": (3, "bool"),
        "flags": (4, "uint32"),
        "nr_pages": (5, "uint64"),
    },
    "vma_entry": {
        "start": (1, "uint64"),
        "end": (2, "uint64"),
        "flags": (6, "uint32"),
        "status": (7, "uint32"),
    },
    "mm_entry": {"vmas": (14, "*vma_entry")},
}


@functools.cache
def _classes() -> dict[str, Any]:
    try:
        descriptors = importlib.import_module("google.protobuf.descriptor_pb2")
        pools = importlib.import_module("google.protobuf.descriptor_pool")
        factory = importlib.import_module("google.protobuf.message_factory")
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "reading CRIU's images needs protobuf", hint=install_hint("criu")
        ) from error
    kinds = descriptors.FieldDescriptorProto
    file = descriptors.FileDescriptorProto(name="aiouffd/criu.proto", syntax="proto2")
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            entry = message.field.add(name=field, number=number, label=kinds.LABEL_OPTIONAL)
            if kind.startswith("*"):
                entry.label = kinds.LABEL_REPEATED
                entry.type = kinds.TYPE_MESSAGE
                entry.type_name = f".{kind[1:]}"
            else:
                entry.type = getattr(kinds, f"TYPE_{kind.upper()}")
    # A pool of our own: the default one belongs to the program, which may know these names too.
    pool = pools.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {name: factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in _FIELDS}


def message_class(name: str) -> Any:
    """The class of a message, by CRIU's name. Raises UnsupportedError without protobuf."""
    return _classes()[name]
