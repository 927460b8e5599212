/* Filling the memory of another process, whose mappings change as it likes.
 *
 * Nothing here knows regions or slots: the descriptor came from elsewhere, and what is mapped
 * where is the other process's business.  No allocation, no locks; any thread.
 */
#ifndef AU_FOREIGN_H
#define AU_FOREIGN_H

#include <stdint.h>

/* `op` of enum au_op (COPY, ZERO, POISON, CONTINUE) over [start, start+length), whole pages.
 * What is there already is left and woken; what is not mapped (any more) is passed over and
 * woken; so a thread that waits anywhere in the range goes on or faults afresh.  ZERO of pages
 * larger than the system's copies from `src`, which then is a page of zeros.
 * Returns length, or -1 - (settled << 8 | errno) when it had to stop: EAGAIN (an event is to
 * be read first, or the one who caused it has to run), ESRCH (the process is gone), ENOMEM, ... */
int64_t au_foreign_put(int fd, int op, uint64_t start, const uint8_t *src, uint64_t length,
		       uint64_t page_size);

/* Whether the address space behind the descriptor still exists: 1, or 0. */
int au_foreign_alive(int fd);

#endif
