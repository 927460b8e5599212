#include "where.h"

#include "handler.h"
#include "sys.h"
#include "task.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/types.h>

/* Where a waiting thread waits: "-1 SP PC" is a fault in user mode; a system call's
 * number means that the kernel touched for it, and then a signal would make it spin. */
enum au_where au_where(uint32_t tid, uint64_t *sp, uint64_t *pc)
{
	char buffer[256], *end;
	ssize_t size = au_task_read(tid, "syscall", buffer, sizeof buffer);

	if (size < 0)
		return size == -ENOENT || size == -ESRCH ? AU_WHERE_GONE : AU_WHERE_RUNNING;
	if (buffer[0] == '-' && buffer[1] == '1' && buffer[2] == ' ') {
		*sp = strtoull(buffer + 3, &end, 16);
		*pc = strtoull(end, NULL, 16);
		return AU_WHERE_IN_USER;
	}
	return buffer[0] >= '0' && buffer[0] <= '9' ? AU_WHERE_IN_KERNEL : AU_WHERE_RUNNING;
}

/* Does the program keep our signal from a thread?  It has been sent, so it is pending then.  In
 * our own handler everything is blocked as well, but that comes to an end by itself. */
bool au_where_blocked(uint32_t tid)
{
	uint64_t entries = au_handler_entries();
	uint64_t ours = au_signal_bit(au_handler_signal());
	struct au_task_signals signals;

	if (au_handler_inside(tid) || au_task_signals(tid, &signals))
		return false;
	return (signals.blocked & signals.pending & ours) && au_handler_entries() == entries &&
	       !au_handler_inside(tid);
}

int au_sentry_sees(void)
{
	uint64_t sp, pc;

	return au_where(au_gettid(), &sp, &pc) == AU_WHERE_IN_KERNEL;
}
