#include "lifecycle.h"

#include "counters.h"
#include "sentry.h"
#include "slots.h"
#include "sys.h"
#include "watched.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#define QUEUE_START 256

struct au_engine *au_engine_create(int fd, int options, int *error)
{
	struct au_engine *engine = calloc(1, sizeof *engine);
	int result;

	*error = ENOMEM;
	if (!engine)
		return NULL;
	engine->fd = fd;
	engine->options = (uint32_t)options;
	engine->page_size = (uint32_t)au_page_size();
	engine->grace_ns = 50000;
	engine->patience_ns = 50 * AU_NS_PER_MS;
	engine->stall_ns = 10 * AU_NS_PER_S;
	engine->queue_capacity = QUEUE_START;
	pthread_mutex_init(&engine->lock, NULL);
	engine->queue = mmap(NULL, QUEUE_START * sizeof *engine->queue, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (engine->queue == MAP_FAILED) {
		free(engine);
		return NULL;
	}
	engine->notify_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (engine->notify_fd < 0) {
		*error = errno;
		munmap(engine->queue, QUEUE_START * sizeof *engine->queue);
		free(engine);
		return NULL;
	}
	result = au_sentry_start();
	if (!result)
		result = au_sentry_add(engine);
	if (result) {
		*error = -result;
		close(engine->notify_fd);
		munmap(engine->queue, QUEUE_START * sizeof *engine->queue);
		free(engine);
		return NULL;
	}
	au_count(AU_COUNT_live_engines, 1);
	*error = 0;
	return engine;
}

void au_engine_close(struct au_engine *engine)
{
	if (atomic_exchange(&engine->closing, 1))
		return;
	au_sentry_remove(engine);
	while (atomic_load(&engine->users))
		au_sleep_ns(20000);
	au_slots_drop_engine(engine);
	engine->fd = -1;
}

void au_engine_free(struct au_engine *engine)
{
	au_engine_close(engine);
	/* Only now: a loop of another thread may have watched it until a moment ago. */
	if (engine->notify_fd >= 0)
		close(engine->notify_fd);
	munmap(engine->queue, engine->queue_capacity * sizeof *engine->queue);
	free(engine->regions);
	pthread_mutex_destroy(&engine->lock);
	free(engine);
	atomic_fetch_sub(&au_counters[AU_COUNT_live_engines], 1);
}
