#include "watched.h"

#include "engine.h"
#include "regions.h"

#include <errno.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <unistd.h>

#define ENGINES 8192

static pthread_mutex_t engines_lock = PTHREAD_MUTEX_INITIALIZER;
static struct au_engine *engines[ENGINES];
static uint32_t engine_count;
static int epoll_fd = -1;

int au_watched_open(int kick_fd)
{
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = NULL };
	int error;

	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (epoll_fd < 0)
		return -errno;
	if (!epoll_ctl(epoll_fd, EPOLL_CTL_ADD, kick_fd, &event))
		return epoll_fd;
	error = errno;
	au_watched_close();
	return -error;
}

void au_watched_close(void)
{
	if (epoll_fd >= 0)
		close(epoll_fd);
	epoll_fd = -1;
}

/* --------------------------------------------------------------- engines */

int au_sentry_add(struct au_engine *engine)
{
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = engine };
	int result = 0;

	pthread_mutex_lock(&engines_lock);
	if (engine_count == ENGINES)
		result = -ENOSPC;
	else if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, engine->fd, &event))
		result = -errno;
	else
		engines[engine_count++] = engine;
	pthread_mutex_unlock(&engines_lock);
	return result;
}

void au_sentry_remove(struct au_engine *engine)
{
	uint32_t index;

	pthread_mutex_lock(&engines_lock);
	for (index = 0; index < engine_count; index++) {
		if (engines[index] != engine)
			continue;
		engines[index] = engines[--engine_count];
		epoll_ctl(epoll_fd, EPOLL_CTL_DEL, engine->fd, NULL);
		break;
	}
	pthread_mutex_unlock(&engines_lock);
}

bool au_watched_hold(struct au_engine *engine)
{
	uint32_t index;
	bool held = false;

	pthread_mutex_lock(&engines_lock);
	for (index = 0; index < engine_count && !held; index++)
		if (engines[index] == engine)
			held = au_engine_enter(engine);
	pthread_mutex_unlock(&engines_lock);
	return held;
}

void au_watched_each(void (*look)(struct au_engine *engine, void *argument), void *argument)
{
	uint32_t index;

	pthread_mutex_lock(&engines_lock);
	for (index = 0; index < engine_count; index++)
		look(engines[index], argument);
	pthread_mutex_unlock(&engines_lock);
}

void au_watched_forked(void)
{
	uint32_t index;

	for (index = 0; index < engine_count; index++)
		au_engine_forked(engines[index]);
	engine_count = 0;
	au_watched_close();
	pthread_mutex_init(&engines_lock, NULL);
}
