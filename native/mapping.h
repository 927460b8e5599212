/* How the memory of a region is mapped. */
#ifndef AU_MAPPING_H
#define AU_MAPPING_H

#include "region.h"

#include <stdint.h>

#define AU_HUGE_SHIFT 21 /* of the huge pages that regions have */

/* Map the memory of a new region, empty and not registered: sets its start, memfd, inode and
 * `mapped`.  0 or -errno. */
int au_region_map(struct au_region *region);
/* Memory as it was first at `offset`, mapped at `address`, which replaces what is there; it is not
 * registered.  0 or -errno. */
int au_region_map_anew(const struct au_region *region, void *address, uint64_t offset,
		       uint64_t length);

#endif
