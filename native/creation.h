/* Making a region, and the end of it. */
#ifndef AU_CREATION_H
#define AU_CREATION_H

#include "engine.h"
#include "region.h"

#include <stdint.h>

/* New region of `length` bytes in engine, mapped and registered.  block_size 0
 * means one page.  NULL with *error set to a positive errno. */
struct au_region *au_region_create(struct au_engine *engine, uint64_t length, int kind, int options,
				   uint64_t block_size, int *error);

/* Serve the region from memory of this process, which has to stay and never be
 * lazy itself: `data` holds object_length bytes. */
int au_region_set_backing(struct au_region *region, const void *data, uint64_t length);

/* Its memory goes, and it; closed before, unless it was never known to anybody else. */
void au_region_free(struct au_region *region);

#endif
