/* Reading lazy memory without touching what is missing.
 *
 * A touch that waits for its page cannot be interrupted.  These calls ask for the pages
 * instead, as a message about a touch would (the loop, the sentry and the rescue loop treat the two
 * alike), sleep on the slot's futex, and come back when a signal was handled or some time has
 * passed, so that the caller can run its own handlers.  Only pages that are there are touched,
 * behind a guard, for they may go away in between.
 */
#ifndef AU_DEMAND_H
#define AU_DEMAND_H

#include "region.h"

/* One such call, which may take several: start with zeros. */
struct au_wait {
	uint64_t at;   /* offset: how far it came, or what cannot be had */
	int64_t found; /* of a search: where, or -1 */
	/* The thread's place among those that wait. */
	struct au_slot *slot;
	uint32_t word;
};

/* Copy [offset, offset+length) of the region.  0, or
 *  -EINTR   give way to signal handlers, and call again for what is left from wait->at on;
 *  -EIO     the page at wait->at has an error;
 *  -EBADF   the region is closed;
 *  -EINVAL  not within the region;
 *  -EOPNOTSUPP  it is a parent's, so that there is nobody here to ask. */
int au_wait_read(struct au_region *region, uint64_t offset, void *destination, uint64_t length,
		 struct au_wait *wait);
/* The lowest offset of `needle`, of at least a byte, in [offset, offset+length): the same. */
int au_wait_find(struct au_region *region, uint64_t offset, uint64_t length, const void *needle,
		 uint64_t needle_length, struct au_wait *wait);
/* After -EINTR, when there will be no next call. */
void au_wait_end(struct au_wait *wait);

/* For memory without an engine here, which another process serves: 1 when all of it is mapped. */
int au_mapped(uint64_t address, uint64_t length);

#endif
