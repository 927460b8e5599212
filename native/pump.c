#include "pump.h"

#include "abi.h"
#include "counters.h"
#include "fold.h"
#include "install.h"
#include "kick.h"
#include "slots.h"
#include "sys.h"

#include <errno.h>

/* Install what needs no Python.  Without the lock. */
static void serve_hands(struct au_engine *engine, struct au_sink *sink)
{
	int index, error;

	for (index = 0; index < sink->hand_count; index++) {
		struct au_at_hand *hand = &sink->hands[index];
		struct au_region *region = hand->region;
		const uint8_t *backing = __atomic_load_n(&region->backing, __ATOMIC_ACQUIRE);
		int64_t settled;

		if (hand->op == AU_OP_CONTINUE) {
			au_region_map_again(region, hand->offset >> region->page_shift);
			au_count(AU_COUNT_native_serves, 1);
			au_region_leave(region);
			continue;
		}
		settled = au_region_install(region, hand->op, hand->offset,
					    backing ? backing + hand->offset : NULL,
					    hand->length, 0, UINT64_MAX, &error);
		au_count(AU_COUNT_native_serves, 1);
		if (error == EAGAIN && settled < (int64_t)hand->length)
			/* The toucher asks again when woken; nothing is lost. */
			au_engine_let_go(engine, region->start + hand->offset, hand->length);
		else if (error)
			au_engine_poison_page(engine, region->start + hand->offset, hand->length);
		au_region_leave(region);
	}
	sink->hand_count = 0;
}

int64_t au_engine_drain(struct au_engine *engine, struct au_entry *out, int64_t max, int role)
{
	struct au_sink sink = { .out = out, .max = max };
	int64_t count = 0, total = 0;
	uint64_t ignored;

	if (max <= 0)
		return -EINVAL;
	if (!au_engine_enter(engine))
		return -EBADF;
	if (role == AU_DRAIN_LOOP) {
		atomic_fetch_add(&engine->drains, 1);
		if (__atomic_load_n(&engine->stuck, __ATOMIC_RELAXED))
			__atomic_store_n(&engine->stuck, 0, __ATOMIC_RELAXED);
	} else {
		atomic_fetch_add(&engine->rescues, 1);
	}
	if (atomic_load(&engine->notified) && role == AU_DRAIN_LOOP) {
		atomic_store(&engine->notified, 0);
		while (read(engine->notify_fd, &ignored, sizeof ignored) > 0)
			;
	}
	pthread_mutex_lock(&engine->lock);
	while (engine->queue_head != engine->queue_tail && sink.count < max) {
		out[sink.count++] = engine->queue[engine->queue_head++ % engine->queue_capacity];
		sink.news = true;
	}
	while (sink.count < max) {
		int64_t room = max - sink.count < AU_BATCH ? max - sink.count : AU_BATCH;

		count = au_fold_batch(engine, &sink, room);
		if (count > 0)
			total += count;
		if (sink.hand_count) {
			pthread_mutex_unlock(&engine->lock);
			serve_hands(engine, &sink);
			pthread_mutex_lock(&engine->lock);
		}
		if (count < room)
			break; /* a short read: there was no more */
		if (!sink.news)
			break; /* a flood of duplicates: let the caller breathe */
	}
	if (total)
		au_fold_flood(engine, sink.news);
	pthread_mutex_unlock(&engine->lock);
	if (sink.slots_made)
		au_sentry_kick();
	__atomic_store_n(&au_shared.sequence, au_slots_sequence(), __ATOMIC_SEQ_CST);
	au_engine_leave(engine);
	/* EMFILE: a FORK event waits for a free descriptor. */
	return sink.count || count >= 0 || count == -EAGAIN ? sink.count : count;
}

int64_t au_engine_pump(struct au_engine *engine)
{
	return au_fold_all(engine, serve_hands);
}

int au_engine_ask(struct au_region *region, uint64_t page)
{
	struct au_engine *engine = region->engine;
	struct au_uffd_msg message = { .event = AU_EVENT_PAGEFAULT };
	struct au_sink sink = { 0 };
	int result = 0;

	message.arg.pagefault.address = region->start + (page << region->page_shift);
	message.arg.pagefault.ptid = au_gettid();
	if (!au_engine_enter(engine))
		return -EBADF;
	pthread_mutex_lock(&engine->lock);
	if (atomic_load(&region->closing))
		result = -EBADF;
	else if (!au_fold_room(engine))
		result = -ENOMEM;
	else
		/* False: it was settled meanwhile, as the caller will see. */
		au_fold_missing(engine, &sink, region, page, &message);
	pthread_mutex_unlock(&engine->lock);
	serve_hands(engine, &sink);
	if (sink.queued)
		au_engine_notify(engine);
	au_sentry_kick();
	au_engine_leave(engine);
	return result;
}
