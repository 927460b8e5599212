/* Filling the memory of another process, whose mappings change as it likes.
 *
 * Nothing here knows regions or slots: the descriptor came from elsewhere, and what is mapped
 * where is the other process's business.  No allocation, no locks; any thread.
 */
#ifndef AU_FOREIGN_H
#define AU_FOREIGN_H

#include "uapi.h"

#include <stdint.h>

/* `op` of enum au_op (COPY, ZERO, POISON, CONTINUE) over [start, start+length), whole pages.
 * What is there already is left and woken; what is not mapped (any more) is passed over and
 * woken; so a thread that waits anywhere in the range goes on or faults afresh.  ZERO of pages
 * larger than the system's copies from `src`, which then is a page of zeros.
 * Returns length, or -1 - (settled << 8 | errno) when it had to stop: EAGAIN (an event is to
 * be read first, or the one who caused it has to run), ESRCH (the process is gone), ENOMEM, ... */
int64_t au_foreign_put(int fd, int op, uint64_t start, const uint8_t *src, uint64_t length,
		       uint64_t page_size);

/* The same, and notes in `states`, one byte per page from `start` on, which pages are INSTALLED now and
 * which were ABSENT: not mapped, or behind the end of the file that is mapped.  *absent counts the
 * bytes of these. */
int64_t au_foreign_fill(int fd, int op, uint64_t start, const uint8_t *src, uint64_t length,
			uint64_t page_size, uint8_t *states, uint64_t *absent);

/* Read at most `max` messages: how many, or a negated errno. Never waits, whatever the other process
 * makes of O_NONBLOCK, which is of the open file and so in its hands as well. */
int64_t au_foreign_read(int fd, struct au_uffd_msg *messages, int64_t max);

/* An area of the other process whose bytes are in our memory. */
struct au_foreign_area {
	uint64_t start, length;
	uint64_t page_size;
	const uint8_t *bytes; /* of the whole area */
	uint8_t *states;      /* one per page: 0, or what only the caller understands */
};

#define AU_FOREIGN_INSTALLED 2
#define AU_FOREIGN_ABSENT 8

/* Read messages, and answer those faults that need nothing but a copy: in one of `areas` (by
 * address), on a page whose state is 0, which then is INSTALLED; with it its neighbours of the
 * same `window` bytes (a power of two), if all of them are in state 0.  Everything else is handed
 * on in `out`, and so is a whole batch with an event in it, which has to be looked at before
 * anything is filled.
 * Returns how many are in `out` (at most `max`), or a negated errno; *faults and *installed count
 * what was answered here, and its bytes.  -EAGAIN: there was nothing to read. */
int64_t au_foreign_pump(int fd, const struct au_foreign_area *areas, uint64_t count,
			uint64_t window, struct au_uffd_msg *out, int64_t max, uint64_t *faults,
			uint64_t *installed);

/* Whether the address space behind the descriptor still exists: 1, or 0. */
int au_foreign_alive(int fd);

#endif
