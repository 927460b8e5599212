#include "sentry.h"

#include "children.h"
#include "counters.h"
#include "engine.h"
#include "error_page.h"
#include "guard.h"
#include "handler.h"
#include "inherit.h"
#include "interrupt.h"
#include "kick.h"
#include "notes.h"
#include "pagemap.h"
#include "pump.h"
#include "regions.h"
#include "registry.h"
#include "rescue.h"
#include "slots.h"
#include "sys.h"
#include "task.h"
#include "verdicts.h"
#include "watched.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>

#define EVENTS 64
#define GRACE_MIN_NS 50000ULL
/* Calm rounds stretch the grace up to this many times. */
#define CALM_MAX 8

static pthread_mutex_t start_lock = PTHREAD_MUTEX_INITIALIZER;
static bool started, fork_hooked;
static int epoll_fd = -1;

/* Messages that are still unread after a grace: read them unless a loop is at it. */
static void visit_engine(struct au_engine *engine, struct au_round *round)
{
	uint64_t drains;
	int64_t count;

	if (!au_watched_hold(engine))
		return;
	drains = atomic_load(&engine->drains);
	if (drains != engine->seen_drains && !__atomic_load_n(&engine->flood, __ATOMIC_RELAXED)) {
		engine->seen_drains = drains;
		round->undecided = true;
	} else {
		count = au_engine_pump(engine);
		if (count > 0) {
			au_count(AU_COUNT_sentry_messages, (uint64_t)count);
			round->acted = true;
			round->undecided = true;
		}
		if (__atomic_load_n(&engine->flood, __ATOMIC_RELAXED))
			round->flood = true;
	}
	au_engine_leave(engine);
}

/* Engines whose bytes are at hand need no grace.  Returns how many events were theirs. */
static int serve_urgent(const struct epoll_event *events, int count)
{
	int index, served = 0;
	int64_t count_read;

	for (index = 0; index < count; index++) {
		struct au_engine *engine = events[index].data.ptr;

		if (!engine || !au_watched_hold(engine))
			continue;
		if (__atomic_load_n(&engine->urgent, __ATOMIC_SEQ_CST)) {
			count_read = au_engine_pump(engine);
			if (count_read > 0)
				au_count(AU_COUNT_sentry_messages, (uint64_t)count_read);
			served++;
		}
		au_engine_leave(engine);
	}
	return served;
}

/* Ctrl-C while the main thread waits for a page that it has touched. */
static void watch_main(struct au_round *round)
{
	static uint64_t page, since, seen;
	char name[AU_REGION_NAME];
	uint64_t offset = round->main_page;
	bool named = false;

	if (round->main_engine) {
		if (round->main_page != page || round->now - seen > 100 * AU_NS_PER_MS)
			since = round->now;
		page = round->main_page;
		seen = round->now;
	}
	if (!au_interrupt_watch(round->main_engine != NULL, round->now))
		return;
	if (au_watched_hold(round->main_engine)) {
		named = au_engine_describe(round->main_engine, page, name, &offset);
		au_engine_leave(round->main_engine);
	}
	au_interrupt_say(named ? name : NULL, offset, round->now - since);
}

/* A signal handler cannot tell, and nobody else may know. */
static void watch_renewed(void)
{
	uint64_t address = atomic_exchange(&au_renewed, 0);

	if (address) {
		au_note_down(AU_NOTE_RENEWED, 0, address, 0);
		au_rescue_wake();
	}
}

static void *sentry_main(void *ignored)
{
	struct epoll_event events[EVENTS];
	struct au_round round = { 0 };
	uint32_t calm = 0;
	int count, index, timeout;

	(void)ignored;
	prctl(PR_SET_NAME, "aiouffd-sentry");
	prctl(PR_SET_TIMERSLACK, 1UL);
	for (;;) {
		if (round.undecided) {
			timeout = 0;
		} else {
			timeout = round.blocked ? 5 : -1;
			au_kick_wanted(true);
			if (!round.blocked && au_slots_live())
				timeout = 0;
			else if (au_handler_away())
				timeout = 5;
		}
		if (timeout) {
			count = epoll_wait(epoll_fd, events, EVENTS, timeout);
			au_count(AU_COUNT_sentry_wakeups, 1);
		}
		au_kick_wanted(false);
		if (timeout && count > 0 && serve_urgent(events, count) == count && !round.blocked &&
		    !au_slots_live())
			continue;
		if (timeout <= 0 || count > 0) {
			round.grace = GRACE_MIN_NS * (1 + (calm < CALM_MAX ? calm : CALM_MAX));
			au_sleep_ns(round.flood ? AU_NS_PER_MS : round.grace);
		}
		count = epoll_wait(epoll_fd, events, EVENTS, 0);
		round.now = au_now_ns();
		round.undecided = round.blocked = round.acted = round.flood = false;
		round.main_engine = NULL;
		for (index = 0; index < count; index++) {
			if (!events[index].data.ptr)
				au_kick_drain();
			else
				visit_engine(events[index].data.ptr, &round);
		}
		round.now = au_now_ns();
		if (au_slots_live())
			au_judge_slots(&round);
		watch_main(&round);
		au_stalls_watch(&round);
		au_stalls_watch_gil(&round);
		watch_renewed();
		calm = round.acted ? 0 : calm + 1;
	}
	return NULL;
}

/* ----------------------------------------------------------------- start */

static int start_thread(void)
{
	sigset_t all, before;
	pthread_attr_t attributes;
	pthread_t thread;
	int result;

	sigfillset(&all);
	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attributes, 256 * 1024);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	result = pthread_create(&thread, &attributes, sentry_main, NULL);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	return -result;
}

static void in_child(void)
{
	au_sentry_forked();
	au_inherit();
}

int au_sentry_start(void)
{
	int result = 0, kick_fd;

	pthread_mutex_lock(&start_lock);
	if (!started) {
		kick_fd = au_kick_open();
		if (kick_fd < 0 || au_rescue_open() < 0)
			result = -errno;
		if (!result) {
			epoll_fd = au_watched_open(kick_fd);
			result = epoll_fd < 0 ? epoll_fd : 0;
		}
		if (!result)
			result = au_handler_start();
		if (!result)
			au_task_reserve(kick_fd);
		/* Before the thread, which could not be taken back. */
		if (!result && !fork_hooked) {
			result = -pthread_atfork(au_children_lock, au_children_unlock, in_child);
			fork_hooked = !result;
		}
		if (!result)
			result = start_thread();
		if (result) {
			/* It can be tried again, as if this had not been. */
			au_watched_close();
			au_kick_close();
			au_rescue_close();
			au_task_reserve(-1);
			epoll_fd = -1;
		}
		started = result == 0;
	}
	pthread_mutex_unlock(&start_lock);
	return result ? result : au_guard_start();
}

void au_sentry_forked(void)
{
	au_watched_forked();
	au_kick_close();
	memset(&au_shared, 0, sizeof au_shared);
	au_rescue_close();
	au_task_reserve(-1);
	epoll_fd = -1;
	started = false;
	pthread_mutex_init(&start_lock, NULL);
	au_notes_forked();
	au_stalls_forked();
	au_pagemap_forked();
	au_interrupt_forked();
	au_handler_forked();
	au_slots_reset();
	au_regions_forked();
	au_error_forked();
}
