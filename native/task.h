/* What /proc tells about a thread of this process.
 *
 * Everything here is safe in signal handlers, allocates nothing and takes little stack.
 */
#ifndef AU_TASK_H
#define AU_TASK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Sets of signals; bit 0 is signal 1. */
struct au_task_signals {
	uint64_t pending; /* for this thread alone */
	uint64_t shared;  /* for the process: any thread that does not block it may take it */
	uint64_t blocked;
};

static inline uint64_t au_signal_bit(int number)
{
	return 1ULL << (number - 1);
}

/* A descriptor of which a copy is kept for when there is none to be had; -1 to let go of the copy,
 * or, after a fork, to forget it as well as close it. */
void au_task_reserve(int fd);
/* Read a small file of the thread, as "syscall".  Bytes read, with a zero after them, or -errno. */
ssize_t au_task_read(uint32_t tid, const char *leaf, char *buffer, size_t size);
/* Its signals.  0 or -errno. */
int au_task_signals(uint32_t tid, struct au_task_signals *signals);
/* Is there a thread of that id, in any process? */
bool au_task_exists(uint32_t tid);

#endif
