/* Reading a region behind a guard.
 *
 * Guarded copies out of and searches in the region wait for missing pages, and end with -EIO when one
 * is poisoned (offset in *where), -EBADF when the region is closed, and with -EHWPOISON when
 * the memory itself is broken, and could have been written to.
 */
#ifndef AU_READING_H
#define AU_READING_H

#include "region.h"

#include <stdint.h>

int au_region_read(struct au_region *region, uint64_t offset, void *destination, uint64_t length,
		   uint64_t *where);
int au_region_touch(struct au_region *region, uint64_t offset, uint64_t length, uint64_t *where);
int au_region_find(struct au_region *region, uint64_t offset, uint64_t length, const void *needle,
		   uint64_t needle_length, uint64_t *where, int64_t *found);

#endif
