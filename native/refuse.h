/* Missing pages that become errors, for nobody will bring them. */
#ifndef AU_REFUSE_H
#define AU_REFUSE_H

#include "region.h"

#include <stdbool.h>
#include <stdint.h>

/* Take a missing page: it is INSTALLING then, and the caller's.  False if it is not missing. */
bool au_region_take_page(struct au_region *region, uint64_t page);
/* The pages [from, to), which the caller has taken and made errors, are errors now, of that state:
 * publish it and wake. */
void au_region_publish_error(struct au_region *region, uint64_t from, uint64_t to, uint8_t state);
/* A message about a page of a region that closes, or has an error there: an error
 * for who waits.  With the engine's lock held. */
void au_region_refuse(struct au_region *region, uint64_t page);

#endif
