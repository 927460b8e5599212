#include "kick.h"

#include "counters.h"
#include "sys.h"

#include <sys/eventfd.h>

struct au_shared au_shared;

static int kick_fd = -1;
static _Atomic uint32_t sleeping;

void au_sentry_kick(void)
{
	uint32_t yes = 1;

	atomic_thread_fence(memory_order_seq_cst);
	if (atomic_load(&sleeping) && atomic_compare_exchange_strong(&sleeping, &yes, 0)) {
		au_count(AU_COUNT_kicks, 1);
		au_event_signal(kick_fd);
	}
}

int au_kick_open(void)
{
	kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return kick_fd;
}

void au_kick_close(void)
{
	close(kick_fd);
	kick_fd = -1;
	atomic_store(&sleeping, 0);
}

void au_kick_drain(void)
{
	au_event_drain(kick_fd);
}

void au_kick_wanted(bool wanted)
{
	atomic_store(&sleeping, wanted);
	atomic_thread_fence(memory_order_seq_cst);
}
