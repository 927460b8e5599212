"""NBD on the wire: numbers, layouts, and the errors of a peer that does not keep to them.

After the protocol's description (NetworkBlockDevice/nbd, doc/proto.md). All integers are big
endian. Of the handshakes only newstyle is spoken. Extended headers (64-bit lengths) are not.

A connection begins with the *handshake*: the server's magic and flags, the client's flags, then
options that the client asks for and the server answers, one at a time, with any number of
replies. GO (or EXPORT_NAME, which has no way to say no) ends it. In *transmission* each request
has a cookie, and replies come in any order: *simple* ones (header, then the data of a read), or
after STRUCTURED_REPLY *chunks*, the last of which has the DONE flag.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from ..errors import SourceError

# ---- handshake ----

MAGIC: Final = b"NBDMAGIC"
OPTION_MAGIC: Final = b"IHAVEOPT"
OLDSTYLE_MAGIC: Final = bytes.fromhex("00420281861253")
REPLY_MAGIC: Final = 0x3E889045565A9
#: NBDMAGIC, IHAVEOPT, handshake flags.
GREETING: Final = Struct(">8s8sH")
CLIENT_FLAGS: Final = Struct(">I")
#: IHAVEOPT, option, length.
OPTION: Final = Struct(">8sII")
#: Magic, option, reply type, length.
OPTION_REPLY: Final = Struct(">QIII")
#: Size and transmission flags, after EXPORT_NAME.
EXPORT: Final = Struct(">QH")
EXPORT_PADDING: Final = 124

FLAG_FIXED_NEWSTYLE: Final = 1
FLAG_NO_ZEROES: Final = 2

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_FLAG_ERROR: Final = 1 << 31
REP_ERR_UNSUP: Final = REP_FLAG_ERROR | 1
REP_ERR_POLICY: Final = REP_FLAG_ERROR | 2
REP_ERR_INVALID: Final = REP_FLAG_ERROR | 3
REP_ERR_PLATFORM: Final = REP_FLAG_ERROR | 4
REP_ERR_TLS_REQD: Final = REP_FLAG_ERROR | 5
REP_ERR_UNKNOWN: Final = REP_FLAG_ERROR | 6
REP_ERR_SHUTDOWN: Final = REP_FLAG_ERROR | 7
REP_ERR_BLOCK_SIZE_REQD: Final = REP_FLAG_ERROR | 8
REP_ERR_TOO_BIG: Final = REP_FLAG_ERROR | 9

INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3
#: Type, size, transmission flags.
EXPORT_INFO: Final = Struct(">HQH")
#: Type; smallest, preferred and largest block in bytes.
BLOCK_SIZE_INFO: Final = Struct(">HIII")

U16: Final = Struct(">H")
U32: Final = Struct(">I")

#: The one metadata context that is known: which parts are holes, which read as zeros.
BASE_ALLOCATION: Final = "base:allocation"
#: Longest string of the protocol, in bytes.
STRING_MAX: Final = 4096

# ---- transmission ----

FLAG_HAS_FLAGS: Final = 1 << 0
FLAG_READ_ONLY: Final = 1 << 1
FLAG_SEND_FLUSH: Final = 1 << 2
FLAG_SEND_FUA: Final = 1 << 3
FLAG_ROTATIONAL: Final = 1 << 4
FLAG_SEND_TRIM: Final = 1 << 5
FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
FLAG_SEND_DF: Final = 1 << 7
FLAG_CAN_MULTI_CONN: Final = 1 << 8
FLAG_SEND_CACHE: Final = 1 << 10

CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7

CMD_FLAG_FUA: Final = 1 << 0
CMD_FLAG_NO_HOLE: Final = 1 << 1
CMD_FLAG_DF: Final = 1 << 2
CMD_FLAG_REQ_ONE: Final = 1 << 3
CMD_FLAG_FAST_ZERO: Final = 1 << 4

REQUEST_MAGIC: Final = 0x25609513
SIMPLE_MAGIC: Final = 0x67446698
STRUCTURED_MAGIC: Final = 0x668E33EF
#: Magic, command flags, command, cookie, offset, length.
REQUEST: Final = Struct(">IHHQQI")
#: Magic, error, cookie.
SIMPLE_REPLY: Final = Struct(">IIQ")
#: Magic, flags, type, cookie, length.
CHUNK: Final = Struct(">IHHQI")
#: The same with the offset that follows where the chunk has data.
DATA_CHUNK: Final = Struct(">IHHQIQ")

CHUNK_FLAG_DONE: Final = 1
CHUNK_NONE: Final = 0
CHUNK_OFFSET_DATA: Final = 1
CHUNK_OFFSET_HOLE: Final = 2
CHUNK_BLOCK_STATUS: Final = 5
CHUNK_FLAG_ERROR: Final = 1 << 15
CHUNK_ERROR: Final = CHUNK_FLAG_ERROR | 1
CHUNK_ERROR_OFFSET: Final = CHUNK_FLAG_ERROR | 2

OFFSET: Final = Struct(">Q")
#: Offset and length.
HOLE: Final = Struct(">QI")
#: Length and state flags.
EXTENT: Final = Struct(">II")
#: Error, length of the text that follows.
ERROR: Final = Struct(">IH")

STATE_HOLE: Final = 1
STATE_ZERO: Final = 2

#: Errors by their numbers on the wire, which are Linux's.
EPERM: Final = 1
EIO: Final = 5
ENOMEM: Final = 12
EINVAL: Final = 22
ENOSPC: Final = 28
EOVERFLOW: Final = 75
ENOTSUP: Final = 95
ESHUTDOWN: Final = 108

#: Longest request where nobody said otherwise, in bytes.
PAYLOAD_MAX: Final = 32 << 20


class NbdProtocolError(SourceError):
    """The peer sent what the protocol does not allow. Not transient; the connection is closed."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, transient=False, hint=hint)


def option(number: int, payload: bytes = b"") -> bytes:
    """A client's option."""
    return OPTION.pack(OPTION_MAGIC, number, len(payload)) + payload


def option_reply(number: int, kind: int, payload: bytes = b"") -> bytes:
    """A server's reply to option ``number``."""
    return OPTION_REPLY.pack(REPLY_MAGIC, number, kind, len(payload)) + payload


def string(text: str) -> bytes:
    """Length and UTF-8 bytes."""
    data = text.encode()
    return U32.pack(len(data)) + data
