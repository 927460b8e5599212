"""The guest: a few hundred bytes of 32-bit code, what it finds in its memory, and what it says.

Before the snapshot it makes a list that goes all over the upper half of its memory: places far
from each other, of eight neighbouring pages each, one element per page. Then it stops, and that
is when the snapshot is taken. When it goes on, it follows the list from page to page and adds
up, as a program goes through its data; only then comes its first output. At last it gives some
pages away through its balloon, reads them, and says whether they are zeros.

All of its memory is full: what the guest does not use itself has other contents (`filler`), as
the memory of a machine that has run for a while does.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

MIB = 1 << 20
PAGE = 4096
#: Ports that the guest writes to: characters; an address, then a length, to be given away.
CONSOLE, BALLOON = 0xE9, 0x500
#: Where things are in the guest's memory, and where it begins.
CODE, PARAMETERS, TEXTS = 0x1000, 0x2000, 0x3000
STACK = 0x5000  # its end
BALLOON_PAGES = 64
NEIGHBOURS = 8
#: Elements of the list contain its number times this, of which 32 bits are kept.
FACTOR = 0x9E3779B1

BOOTED = b"guest: the list is made\n"
TOTAL = b"guest: the list adds up to "
END_OF_LINE = b"\n"
ZEROS = b"guest: what the balloon took reads as zeros\n"
STALE = b"guest: THE BALLOON'S PAGES ARE NOT ZEROS\n"
_TEXT = 0x40  # bytes between two texts

_CODE = (
    # ebp: parameters; +0 elements, +4 where places begin, +8 places - 1, +0xc step from place to
    # place, +0x10 and +0x14 address and length of what the balloon takes, +0x18 first element
    "bd 00 20 00 00"  #       mov  ebp, PARAMETERS
    "bc 00 50 00 00"  #       mov  esp, STACK
    "8d 7d 18"  #             lea  edi, [ebp+0x18]     where the next element's address goes
    "31 c9"  #                xor  ecx, ecx            number of the element
    "89 c8"  #          make: mov  eax, ecx
    "c1 e8 03"  #             shr  eax, 3              number of its place,
    "0f af 45 0c"  #          imul eax, [ebp+0xc]
    "23 45 08"  #             and  eax, [ebp+8]        scattered
    "c1 e0 03"  #             shl  eax, 3
    "89 ca"  #                mov  edx, ecx
    "83 e2 07"  #             and  edx, 7
    "01 d0"  #                add  eax, edx
    "c1 e0 0c"  #             shl  eax, 12
    "03 45 04"  #             add  eax, [ebp+4]
    "89 07"  #                mov  [edi], eax
    "89 c7"  #                mov  edi, eax
    "69 d1 b1 79 37 9e"  #    imul edx, ecx, FACTOR
    "89 57 04"  #             mov  [edi+4], edx
    "41"  #                   inc  ecx
    "3b 4d 00"  #             cmp  ecx, [ebp]
    "72 d1"  #                jb   make
    "c7 07 00 00 00 00"  #    mov  dword [edi], 0
    "be 00 30 00 00"  #       mov  esi, BOOTED
    "e8 68 00 00 00"  #       call print
    "f4"  #                   hlt                      here the snapshot is taken
    "31 db"  #                xor  ebx, ebx
    "8b 7d 18"  #             mov  edi, [ebp+0x18]
    "03 5f 04"  #       walk: add  ebx, [edi+4]
    "ff 47 08"  #             inc  dword [edi+8]       a program also writes
    "8b 3f"  #                mov  edi, [edi]
    "85 ff"  #                test edi, edi
    "75 f4"  #                jnz  walk
    "be 40 30 00 00"  #       mov  esi, TOTAL
    "e8 4c 00 00 00"  #       call print
    "b9 08 00 00 00"  #       mov  ecx, 8
    "c1 c3 04"  #      digit: rol  ebx, 4
    "88 d8"  #                mov  al, bl
    "24 0f"  #                and  al, 15
    "04 30"  #                add  al, '0'
    "3c 39"  #                cmp  al, '9'
    "76 02"  #                jbe  decimal
    "04 27"  #                add  al, 'a' - '0' - 10
    "e6 e9"  #       decimal: out  CONSOLE, al
    "e2 ed"  #                loop digit
    "be 80 30 00 00"  #       mov  esi, END_OF_LINE
    "e8 2a 00 00 00"  #       call print
    "8b 7d 10"  #             mov  edi, [ebp+0x10]
    "8b 4d 14"  #             mov  ecx, [ebp+0x14]
    "ba 00 05 00 00"  #       mov  edx, BALLOON
    "89 f8"  #                mov  eax, edi
    "ef"  #                   out  dx, eax
    "89 c8"  #                mov  eax, ecx
    "ef"  #                   out  dx, eax             now they are gone
    "c1 e9 02"  #             shr  ecx, 2
    "31 c0"  #                xor  eax, eax
    "f3 af"  #                repe scasd
    "be c0 30 00 00"  #       mov  esi, ZEROS
    "74 05"  #                je   zeros
    "be 00 31 00 00"  #       mov  esi, STALE
    "e8 01 00 00 00"  # zeros: call print
    "f4"  #                   hlt
    "ac"  #            print: lodsb                    bytes from esi up to a zero
    "84 c0"  #                test al, al
    "74 04"  #                jz   end
    "e6 e9"  #                out  CONSOLE, al
    "eb f7"  #                jmp  print
    "c3"  #              end: ret
)


@dataclass(frozen=True)
class Guest:
    """A guest with ``size`` bytes of memory, a power of two from 8 MiB to 1 GiB, whose list has
    ``elements`` elements: it touches so many pages, and a few more, before its first output."""

    size: int
    elements: int

    def __post_init__(self) -> None:
        if not 8 * MIB <= self.size <= 1024 * MIB or self.size & (self.size - 1):
            raise ValueError(f"{self.size} bytes are no power of two from 8 MiB to 1 GiB")
        if not 0 < self.elements <= self._places * NEIGHBOURS:
            raise ValueError(f"no place for a list of {self.elements} elements")

    @property
    def _arena(self) -> int:
        return self.size // 2

    @property
    def _places(self) -> int:
        return self.size // 2 // (NEIGHBOURS * PAGE)

    @property
    def _step(self) -> int:
        return int(self._places * 0.618) | 1  # odd: no place comes twice

    @property
    def balloon(self) -> tuple[int, int]:
        """Address and length in bytes of what the guest gives away."""
        return self.size // 4, BALLOON_PAGES * PAGE

    def image(self) -> dict[int, bytes]:
        """What stands in its memory when it begins, by address; elsewhere is `filler`."""
        numbers = (self.elements, self._arena, self._places - 1, self._step, *self.balloon, 0)
        texts = (BOOTED, TOTAL, END_OF_LINE, ZEROS, STALE)
        return {
            CODE: bytes.fromhex(_CODE),
            PARAMETERS: struct.pack("<7I", *numbers),
            TEXTS: b"".join(text.ljust(_TEXT, b"\0") for text in texts),
        }

    # What follows says the same as the code, in other words: it is there to check by.

    def said(self) -> str:
        """What it has to say between the snapshot and its end, if its memory is right."""
        total = sum(number * FACTOR for number in range(self.elements)) & 0xFFFFFFFF
        return TOTAL.decode() + f"{total:08x}\n" + ZEROS.decode()

    def _element(self, number: int) -> int:
        """Address of an element of the list; 0 behind the last one."""
        if number == self.elements:
            return 0
        place, neighbour = divmod(number, NEIGHBOURS)
        page = (place * self._step % self._places) * NEIGHBOURS + neighbour
        return self._arena + page * PAGE

    def memory_at_end(self) -> dict[int, bytes]:
        """The pages, by their numbers, that are not `filler` when it has halted for good; but for
        its stack."""
        pages = {}
        for address, data in self.image().items():
            page = address // PAGE
            if address == PARAMETERS:
                data = data[:-4] + struct.pack("<I", self._element(0))
            pages[page] = data + filler(page)[len(data) :]
        for number in range(self.elements):
            page = self._element(number) // PAGE
            rest = filler(page)[8:]
            (count,) = struct.unpack_from("<I", rest)
            numbers = (self._element(number + 1), number * FACTOR & 0xFFFFFFFF, (count + 1) % 2**32)
            pages[page] = struct.pack("<3I", *numbers) + rest[4:]
        start, length = self.balloon
        for page in range(start // PAGE, (start + length) // PAGE):
            pages[page] = bytes(PAGE)
        return pages


def filler(page: int) -> bytes:
    """What stands in a page, given by its number, that the guest does not use."""
    return hashlib.blake2b(page.to_bytes(8, "little")).digest() * (PAGE // 64)
