/* Copies that survive a poisoned page.
 *
 * A raw touch of a page whose source failed raises SIGBUS.  These copies run with
 * a way back: the signal becomes -EIO and the address.  They run without the GIL
 * and touch in user mode, so they work with user-mode-only descriptors too.
 */
#ifndef AU_GUARD_H
#define AU_GUARD_H

#include <stdint.h>

/* Install the SIGBUS handler, in front of what is there.  0 or -errno. */
int au_guard_start(void);

/* Copy `length` bytes; one side may be lazy memory.  0, or -EIO with *address set. */
int au_guard_copy(void *destination, const void *source, uint64_t length, uint64_t *address);

/* Read one byte of each page of [start, start+length): makes them resident.
 * 0, or -EIO with *address set. */
int au_guard_touch(const void *start, uint64_t length, uint64_t page_size, uint64_t *address);

/* Store -1 or the first position of the byte string, searched with guarded reads. */
int64_t au_guard_find(const void *start, uint64_t length, const void *needle, uint64_t needle_length,
		      uint64_t *address);

#endif
