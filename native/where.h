/* Where a thread waits, and whether our signal reaches it. */
#ifndef AU_WHERE_H
#define AU_WHERE_H

#include <stdbool.h>
#include <stdint.h>

enum au_where {
	AU_WHERE_RUNNING, /* or it cannot be seen */
	AU_WHERE_IN_USER, /* a fault in user mode */
	AU_WHERE_IN_KERNEL, /* a system call, which touches for it */
	AU_WHERE_GONE,
};
/* Of a thread that waits, with its stack pointer and program counter where it is in user mode. */
enum au_where au_where(uint32_t tid, uint64_t *sp, uint64_t *pc);
/* Does the program keep our signal, which has been sent, from a thread? */
bool au_where_blocked(uint32_t tid);
/* 1 if the sentry can see where threads of this process wait.  It cannot in a process that is
 * not dumpable because it has changed its user. */
int au_sentry_sees(void);

#endif
