#include "fold.h"

#include "abi.h"
#include "counters.h"
#include "kick.h"
#include "pagemap.h"
#include "refuse.h"
#include "regions.h"
#include "slots.h"
#include "sys.h"

#include <errno.h>
#include <sys/mman.h>

/* ----------------------------------------------------------------- queue */

bool au_fold_room(struct au_engine *engine)
{
	uint64_t used = engine->queue_tail - engine->queue_head;
	uint64_t capacity = engine->queue_capacity, index;
	struct au_entry *bigger;

	if (used + AU_BATCH < capacity)
		return true;
	bigger = mmap(NULL, capacity * 2 * sizeof *bigger, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (bigger == MAP_FAILED)
		return false; /* messages stay in the kernel until there is room */
	for (index = 0; index < used; index++)
		bigger[index] = engine->queue[(engine->queue_head + index) % capacity];
	munmap(engine->queue, capacity * sizeof *engine->queue);
	engine->queue = bigger;
	engine->queue_capacity = capacity * 2;
	engine->queue_head = 0;
	engine->queue_tail = used;
	return true;
}

static void emit(struct au_engine *engine, struct au_sink *sink, const struct au_entry *entry)
{
	sink->news = true;
	if (sink->out) {
		sink->out[sink->count++] = *entry;
		return;
	}
	engine->queue[engine->queue_tail++ % engine->queue_capacity] = *entry;
	sink->queued = true;
}

/* ------------------------------------------------------------------ fold */

/* Is there a page at `address`?  The kernel's own answer. */
static bool page_is_there(uint64_t address)
{
	uint64_t item;

	return au_pagemap_read(address, &item, 1) &&
	       (item & (AU_PAGEMAP_PRESENT | AU_PAGEMAP_SWAPPED));
}

static void take_hand(struct au_sink *sink, struct au_region *region, int op, uint64_t offset,
		      uint64_t length)
{
	struct au_at_hand *hand;

	if (sink->hand_count == AU_BATCH || !au_region_enter(region)) {
		/* It closes just now: who asks again gets the answer. */
		au_abi_wake(region->engine->fd, region->start + offset, length);
		return;
	}
	hand = &sink->hands[sink->hand_count++];
	hand->region = region;
	hand->op = op;
	hand->offset = offset;
	hand->length = length;
	sink->news = true;
}

bool au_fold_missing(struct au_engine *engine, struct au_sink *sink, struct au_region *region,
		     uint64_t page, const struct au_uffd_msg *message)
{
	uint64_t block = page >> (region->block_shift - region->page_shift);
	uint64_t offset = block << region->block_shift;
	struct au_entry entry = {
		.region = region->id,
		.block = block,
		.generation = (uint32_t)atomic_load(&region->generations[block]),
		.thread = message->arg.pagefault.ptid,
		.message = *message,
	};
	uint8_t before;

	if (__atomic_load_n(&region->backing, __ATOMIC_ACQUIRE)) {
		uint64_t length = region->length - offset;

		take_hand(sink, region, AU_OP_COPY, offset,
			  length < region->block_size ? length : region->block_size);
		return true;
	}
	AU_GAP(LOOK_TELL);
	before = atomic_fetch_or(&region->flags[block], AU_BLOCK_IN_FLIGHT | AU_BLOCK_WANTED);
	if ((atomic_load(&region->states[page]) & AU_PAGE_STATE) != AU_PAGE_MISSING) {
		/* An installer finished between our two looks; it has cleared the flags. */
		if (!(before & AU_BLOCK_IN_FLIGHT))
			atomic_fetch_and(&region->flags[block],
					 (uint8_t) ~(AU_BLOCK_IN_FLIGHT | AU_BLOCK_WANTED));
		return false;
	}
	if (!(before & AU_BLOCK_WANTED))
		atomic_fetch_add_explicit(&region->touched_blocks, 1, memory_order_relaxed);
	if (!(before & AU_BLOCK_IN_FLIGHT)) {
		au_count(AU_COUNT_misses, 1);
		entry.kind = AU_ENTRY_MISS;
		emit(engine, sink, &entry);
		return true;
	}
	if ((region->options & AU_REGION_REPORT_HITS) && !(before & AU_BLOCK_REPORTED)) {
		atomic_fetch_or(&region->flags[block], AU_BLOCK_REPORTED);
		au_count(AU_COUNT_hits_in_flight, 1);
		entry.kind = AU_ENTRY_HIT;
		emit(engine, sink, &entry);
		return true;
	}
	au_count(AU_COUNT_duplicates, 1);
	return true;
}

/* The slot made for the message being folded, if any. */
struct claim {
	struct au_slot *slot;
	uint32_t published;
};

static void free_slot(const struct claim *claim)
{
	if (claim->slot)
		au_slot_withdraw(claim->slot, claim->published);
}

/* The slot is PENDING: now look at the page again, for it may have come since the
 * message was read, or have come and gone. */
static void fold_fault(struct au_engine *engine, struct au_sink *sink, struct au_region *region,
		       const struct claim *slot, uint64_t epoch, const struct au_uffd_msg *message)
{
	uint64_t page = (message->arg.pagefault.address - region->start) >> region->page_shift;
	uint64_t address = region->start + (page << region->page_shift);
	uint64_t block = page >> (region->block_shift - region->page_shift);
	bool minor = message->arg.pagefault.flags & AU_PAGEFAULT_FLAG_MINOR;
	uint8_t state;

again:
	state = atomic_load(&region->states[page]);
	switch (state & AU_PAGE_STATE) {
	case AU_PAGE_MISSING:
		if (atomic_load(&region->generations[block]) > epoch) {
			/* Installed and gone again between the read and now, or a
			 * neighbour was: the message cannot be trusted.  A woken
			 * toucher faults afresh. */
			free_slot(slot);
			au_abi_wake(engine->fd, address, region->page_size);
			au_count(AU_COUNT_spurious, 1);
			sink->news = true;
			return;
		}
		if (!au_fold_missing(engine, sink, region, page, message))
			goto again;
		return;
	case AU_PAGE_INSTALLING:
		if (!atomic_compare_exchange_strong(&region->states[page], &state,
						    (uint8_t)(state | AU_PAGE_TOUCHED)))
			goto again;
		free_slot(slot);
		au_count(AU_COUNT_duplicates, 1);
		return;
	case AU_PAGE_PRESENT:
		if (minor) {
			/* Reclaim, say, has unmapped it: the bytes are in the page cache. */
			take_hand(sink, region, AU_OP_CONTINUE, page << region->page_shift,
				  region->page_size);
			return;
		}
		if (page_is_there(address)) {
			free_slot(slot);
			au_abi_wake(engine->fd, address, region->page_size);
			au_count(AU_COUNT_spurious, 1);
			return;
		}
		/* Dropped by somebody (MADV_DONTNEED) without an event. */
		if (atomic_compare_exchange_strong(&region->states[page], &state, AU_PAGE_MISSING))
			atomic_fetch_sub(&region->present_pages, 1);
		if (!au_fold_missing(engine, sink, region, page, message))
			goto again;
		return;
	default: /* an error */
		free_slot(slot);
		au_region_refuse(region, page);
		return;
	}
}

static void fold_event(struct au_engine *engine, struct au_sink *sink,
		       const struct au_uffd_msg *message)
{
	struct au_entry entry = { .kind = AU_ENTRY_EVENT, .message = *message };
	uint32_t index;

	au_count(AU_COUNT_events, 1);
	if (message->event == AU_EVENT_REMAP && au_engine_region_at(engine, message->arg.remap.to)) {
		sink->news = true; /* an error page heals */
		return;
	}
	if (message->event == AU_EVENT_REMOVE || message->event == AU_EVENT_UNMAP) {
		for (index = 0; index < engine->region_count; index++)
			au_region_removed(engine->regions[index], message->arg.remove.start,
					  message->arg.remove.end);
	}
	emit(engine, sink, &entry);
}

static void fold(struct au_engine *engine, struct au_sink *sink, uint64_t epoch,
		 const struct au_uffd_msg *message)
{
	struct au_region *region = NULL;
	struct claim claim = { 0 };
	bool duplicate = false;
	uint32_t tid = message->arg.pagefault.ptid;
	uint64_t address = message->arg.pagefault.address, page_size = engine->page_size;

	au_count(AU_COUNT_messages, 1);
	if (message->event != AU_EVENT_PAGEFAULT && !(engine->options & AU_ENGINE_RAW)) {
		fold_event(engine, sink, message);
		return;
	}
	if (message->event == AU_EVENT_PAGEFAULT) {
		if (!(engine->options & AU_ENGINE_RAW)) {
			region = au_engine_region_at(engine, address);
			/* Nobody will ever bring it: an error, never zeros. */
			if (region && atomic_load(&region->closing)) {
				au_region_refuse(region,
						 (address - region->start) >> region->page_shift);
				return;
			}
			if (!region) {
				/* The address may be another's by now: no mapping. */
				address &= ~(page_size - 1);
				au_abi_poison(engine->fd, address, page_size, 0, NULL);
				au_abi_wake(engine->fd, address, page_size);
				return;
			}
			page_size = region->page_size;
		}
		if ((engine->options & AU_ENGINE_OWN) && tid) {
			claim.slot = au_slot_claim(engine, tid, address & ~(page_size - 1),
						   page_size, epoch, &duplicate);
			if (claim.slot) {
				AU_GAP(CLAIM_PENDING);
				claim.published = au_slot_publish(claim.slot);
				AU_GAP(PENDING_LOOK);
				sink->slots_made = true;
			}
		}
	}
	if (region) {
		fold_fault(engine, sink, region, &claim, epoch, message);
	} else {
		struct au_entry entry = { .kind = AU_ENTRY_RAW, .thread = tid, .message = *message };

		if (duplicate) {
			/* The same fault, interrupted by a signal: it was told already. */
			au_count(AU_COUNT_duplicates, 1);
			return;
		}
		if (claim.slot && atomic_load(&engine->epoch) != epoch) {
			/* Something was resolved meanwhile, perhaps this page. */
			free_slot(&claim);
			au_abi_wake(engine->fd, address & ~(page_size - 1), page_size);
			return;
		}
		emit(engine, sink, &entry);
	}
}

void au_fold_flood(struct au_engine *engine, bool news)
{
	__atomic_store_n(&engine->flood, news ? 0 : engine->flood + 1, __ATOMIC_RELAXED);
}

int64_t au_fold_batch(struct au_engine *engine, struct au_sink *sink, int64_t room)
{
	struct au_uffd_msg messages[AU_BATCH];
	uint64_t epoch = atomic_load(&engine->epoch);
	long count, index;

	if (room > AU_BATCH)
		room = AU_BATCH;
	if (room <= 0)
		return 0;
	AU_GAP(EPOCH_READ);
	count = au_abi_read(engine->fd, messages, (int)room);
	AU_GAP(READ_CLAIM);
	for (index = 0; index < count; index++)
		fold(engine, sink, epoch, &messages[index]);
	return count;
}

void au_engine_let_go(struct au_engine *engine, uint64_t start, uint64_t length)
{
	au_slots_end(engine, start, start + length);
	au_abi_wake(engine->fd, start, length);
}

/* Leave to the touchers what was folded: they are woken and ask again. */
static void refuse_hands(struct au_engine *engine, struct au_sink *sink)
{
	int index;

	for (index = 0; index < sink->hand_count; index++) {
		struct au_at_hand *hand = &sink->hands[index];

		au_engine_let_go(engine, hand->region->start + hand->offset, hand->length);
		au_region_leave(hand->region);
	}
	sink->hand_count = 0;
}

int64_t au_fold_all(struct au_engine *engine, au_settle *settle)
{
	struct au_sink sink = { 0 };
	int64_t total = 0, count = 0;
	bool queued = false, slots = false;

	if (!au_engine_enter(engine))
		return -EBADF;
	do {
		pthread_mutex_lock(&engine->lock);
		count = au_fold_room(engine) ? au_fold_batch(engine, &sink, AU_BATCH) : 0;
		if (count > 0)
			au_fold_flood(engine, sink.news);
		pthread_mutex_unlock(&engine->lock);
		settle(engine, &sink);
		queued |= sink.queued;
		slots |= sink.slots_made;
		if (count > 0)
			total += count;
	} while (count == AU_BATCH && sink.news);
	if (queued)
		au_engine_notify(engine);
	if (slots)
		au_sentry_kick();
	au_engine_leave(engine);
	return total;
}

int64_t au_engine_pump_only(struct au_engine *engine)
{
	return au_fold_all(engine, refuse_hands);
}
