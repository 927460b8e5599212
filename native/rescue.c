#include "rescue.h"

#include "engine.h"
#include "sys.h"

#include <poll.h>
#include <sys/eventfd.h>

static int rescue_fd = -1;
static _Atomic uint32_t watched;

int au_rescue_open(void)
{
	rescue_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return rescue_fd;
}

void au_rescue_close(void)
{
	close(rescue_fd);
	rescue_fd = -1;
	atomic_store(&watched, 0);
}

bool au_rescue_watched(void)
{
	return atomic_load(&watched);
}

int au_rescue_fd(void)
{
	atomic_store(&watched, 1);
	return rescue_fd;
}

int au_rescue_wait(int timeout_ms)
{
	struct pollfd item = { .fd = rescue_fd, .events = POLLIN };
	int count;

	atomic_store(&watched, 1);
	count = poll(&item, 1, timeout_ms);
	return count > 0;
}

int au_rescue_take(struct au_engine *engine)
{
	return (int)atomic_exchange(&engine->rescue_wanted, 0);
}

void au_rescue_wake(void)
{
	au_event_signal(rescue_fd);
}
