/* Installing: how bytes become pages, and errors. */
#ifndef AU_INSTALL_H
#define AU_INSTALL_H

#include "engine.h"
#include "region.h"

#include <stdint.h>

/* Install into a region: [offset, offset+length), whole pages, or up to object_length.
 * `src` is read for AU_OP_COPY only.  Pages already there are skipped; with
 * `over_poison` poisoned ones are healed.  `generation` is compared with that of the
 * first block unless it is UINT64_MAX.  Returns the bytes that are settled from
 * `offset` on; *error is 0 or a positive errno telling why it is not all:
 * EAGAIN (try again later), ESTALE (the generation moved), or what the kernel said. */
int64_t au_region_install(struct au_region *region, int op, uint64_t offset, const void *src,
			  uint64_t length, int over_poison, uint64_t generation, int *error);

/* The same in one value, for callers that pay for each argument: the bytes settled, or
 * when that is not all, -1 - (settled << 8 | errno). */
int64_t au_region_put(struct au_region *region, int op, uint64_t offset, const uint8_t *src,
		      uint64_t length, int over_poison, uint64_t generation);

/* The bytes of `page` are in the page cache and its mapping went: map it, and what else went of its
 * block, and wake.  The region is entered.  Whoever waits for what cannot be had faults again. */
void au_region_map_again(struct au_region *region, uint64_t page);

/* Give an error to whoever waits for a page, in a region or not, unless it is there. */
void au_engine_poison_page(struct au_engine *engine, uint64_t page, uint64_t page_size);

#endif
