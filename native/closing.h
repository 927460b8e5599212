/* Closing a region: what is missing becomes an error, and nobody waits any more. */
#ifndef AU_CLOSING_H
#define AU_CLOSING_H

#include "region.h"

/* Close: nobody can install any more; what is missing is poisoned, waiters are
 * woken.  With `unmap` the memory goes as well; without, what is resident stays
 * readable until au_region_free.  0 or -errno. */
int au_region_close(struct au_region *region, int unmap);

#endif
