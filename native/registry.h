/* Where lazy memory is, for the SIGBUS handler: addresses, read without a lock.
 *
 * Regions of this process, and memory that another process serves.
 */
#ifndef AU_REGISTRY_H
#define AU_REGISTRY_H

#include <stdbool.h>
#include <stdint.h>

struct au_region;

/* Have the SIGBUS handler know of lazy memory, and forget it.  For regions this is done. */
int au_regions_add(uint64_t start, uint64_t length, struct au_region *region);
void au_regions_remove(uint64_t start);

/* True if [address, address+length) overlaps any region of this process. */
bool au_regions_overlap(uint64_t address, uint64_t length);
/* Offset of `address` in the region that holds it; false if none does.  *region is NULL for memory
 * that another process serves.  Async-signal-safe. */
bool au_regions_find(uint64_t address, uint64_t *offset, struct au_region **region);
/* In a forked child: no lazy memory. */
void au_regions_forked(void);

#endif
