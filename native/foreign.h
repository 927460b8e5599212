/* Filling the memory of another process, whose mappings change as it likes.
 *
 * Nothing here knows regions or slots: the descriptor came from elsewhere, and what is mapped
 * where is the other process's business.  No allocation, no locks; any thread.
 */
#ifndef AU_FOREIGN_H
#define AU_FOREIGN_H

#include "uapi.h"

#include <stdint.h>

/* What is read while something is tried again. */
struct au_foreign_heard {
	uint64_t patience;	     /* ns, after which EAGAIN is the answer */
	struct au_uffd_msg *messages;
	int64_t room, count;	     /* messages that fit, and those that are there */
};

/* `op` of enum au_op (COPY, ZERO, POISON, CONTINUE) over [start, start+length), whole pages.
 * What is there already is left and woken; what is not mapped (any more) is passed over and
 * woken; so a thread that waits anywhere in the range goes on or faults afresh.  ZERO of pages
 * larger than the system's copies from `src`, which then is a page of zeros.
 * Returns length, or -1 - (settled << 8 | errno) when it had to stop: EAGAIN (an event is to
 * be read first, or the one who caused it has to run), ESRCH (the process is gone), ENOMEM, ...
 *
 * Notes in `states`, one byte per page from `start` on, or NULL, which pages are INSTALLED now and
 * which were ABSENT: not mapped, or behind the end of the file that is mapped.  *absent counts the
 * bytes of these.
 *
 * A process that drops pages one after another, as a balloon does, is in the way nearly always:
 * from the moment when it asks until its thread has run again after its event was read, and a
 * microsecond or two later it asks anew.  With `heard`, which may be NULL, messages are read and
 * the fill is tried in turns, so as to meet these microseconds.  The caller has to apply what was
 * read before anything else is filled.  A message that concerns the range, or is of more than a
 * removal, ends it with EAGAIN.  The calling thread may change its CPU; its affinity is as before. */
int64_t au_foreign_fill(int fd, int op, uint64_t start, const uint8_t *src, uint64_t length,
			uint64_t page_size, uint8_t *states, uint64_t *absent,
			struct au_foreign_heard *heard);

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
