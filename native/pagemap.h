/* What the kernel says of pages of this process: /proc/self/pagemap.
 *
 * The descriptor is opened once and kept, for those who ask while none is free. A forked child
 * opens its own: the old one tells of the parent's memory.
 */
#ifndef AU_PAGEMAP_H
#define AU_PAGEMAP_H

#include <stdbool.h>
#include <stdint.h>

#define AU_PAGEMAP_PRESENT (1ULL << 63)
/* In swap, or a marker such as poison. */
#define AU_PAGEMAP_SWAPPED (1ULL << 62)

/* The entries of `count` base pages from `address` on.  False if they cannot be had. */
bool au_pagemap_read(uint64_t address, uint64_t *items, uint64_t count);
/* In a forked child. */
void au_pagemap_forked(void);

#endif
