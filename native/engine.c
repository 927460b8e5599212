#include "engine.h"

#include "abi.h"
#include "counters.h"
#include "error_page.h"
#include "pagemap.h"
#include "kick.h"
#include "registry.h"
#include "sentry.h"
#include "slots.h"
#include "sys.h"

#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#define BATCH 64
#define QUEUE_START 256

/* Bytes at hand: what the fold found that needs no Python. */
struct at_hand {
	struct au_region *region;
	int op;
	uint64_t offset, length;
};

/* Where folded messages go: the caller's array, or the queue. */
struct sink {
	struct au_entry *out;
	int64_t count, max;
	struct at_hand hands[BATCH];
	int hand_count;
	bool queued;
	bool slots_made;
	bool news;
};

/* ------------------------------------------------------------------ life */

bool au_engine_enter(struct au_engine *engine)
{
	atomic_fetch_add(&engine->users, 1);
	if (atomic_load(&engine->closing)) {
		atomic_fetch_sub(&engine->users, 1);
		return false;
	}
	return true;
}

void au_engine_leave(struct au_engine *engine)
{
	atomic_fetch_sub(&engine->users, 1);
}

struct au_engine *au_engine_create(int fd, int options, int *error)
{
	struct au_engine *engine = calloc(1, sizeof *engine);
	int result;

	*error = ENOMEM;
	if (!engine)
		return NULL;
	engine->fd = fd;
	engine->options = (uint32_t)options;
	engine->page_size = (uint32_t)sysconf(_SC_PAGESIZE);
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

void au_engine_set_loop(struct au_engine *engine, uint32_t tid)
{
	atomic_store(&engine->loop_tid, tid);
}

void au_engine_set_times(struct au_engine *engine, uint64_t grace_ns, uint64_t patience_ns,
			 uint64_t stall_ns)
{
	pthread_mutex_lock(&engine->lock);
	engine->grace_ns = grace_ns;
	engine->patience_ns = patience_ns;
	engine->stall_ns = stall_ns;
	pthread_mutex_unlock(&engine->lock);
}

void au_engine_notify(struct au_engine *engine)
{
	uint64_t one = 1;
	ssize_t written = write(engine->notify_fd, &one, sizeof one);

	/* If it is full or closed nobody has to be woken again.  The flag comes second: a drain
	 * between the two must not clear it and leave the descriptor readable for ever. */
	(void)written;
	atomic_store(&engine->notified, 1);
}

/* --------------------------------------------------------------- regions */

int au_engine_add_region(struct au_engine *engine, struct au_region *region)
{
	struct au_region **bigger = NULL, **old = NULL;
	uint32_t capacity, index;

	/* Allocate outside of the lock; see engine.h. */
	pthread_mutex_lock(&engine->lock);
	capacity = engine->region_capacity;
	index = engine->region_count;
	pthread_mutex_unlock(&engine->lock);
	if (index + 1 >= capacity) {
		capacity = capacity ? capacity * 2 : 16;
		bigger = calloc(capacity, sizeof *bigger);
		if (!bigger)
			return -ENOMEM;
	}
	pthread_mutex_lock(&engine->lock);
	if (bigger && capacity > engine->region_capacity) {
		if (engine->region_count)
			memcpy(bigger, engine->regions, engine->region_count * sizeof *bigger);
		old = engine->regions;
		engine->regions = bigger;
		engine->region_capacity = capacity;
	} else {
		old = bigger;
	}
	if (engine->region_count == engine->region_capacity) {
		pthread_mutex_unlock(&engine->lock);
		free(old);
		return -EAGAIN;
	}
	region->id = ++engine->next_region;
	for (index = engine->region_count; index > 0; index--) {
		if (engine->regions[index - 1]->start < region->start)
			break;
		engine->regions[index] = engine->regions[index - 1];
	}
	engine->regions[index] = region;
	engine->region_count++;
	pthread_mutex_unlock(&engine->lock);
	free(old);
	return 0;
}

void au_engine_remove_region(struct au_engine *engine, struct au_region *region)
{
	uint32_t index;

	pthread_mutex_lock(&engine->lock);
	for (index = 0; index < engine->region_count; index++) {
		if (engine->regions[index] != region)
			continue;
		memmove(&engine->regions[index], &engine->regions[index + 1],
			(engine->region_count - index - 1) * sizeof *engine->regions);
		engine->region_count--;
		break;
	}
	pthread_mutex_unlock(&engine->lock);
}

/* With engine->lock held. */
static struct au_region *find_region(struct au_engine *engine, uint64_t address)
{
	uint32_t low = 0, high = engine->region_count;

	while (low < high) {
		uint32_t middle = (low + high) / 2;
		struct au_region *region = engine->regions[middle];

		if (address < region->start)
			high = middle;
		else if (address >= region->start + region->length)
			low = middle + 1;
		else
			return region;
	}
	return NULL;
}

/* ----------------------------------------------------------------- queue */

static bool queue_room(struct au_engine *engine)
{
	uint64_t used = engine->queue_tail - engine->queue_head;
	uint64_t capacity = engine->queue_capacity, index;
	struct au_entry *bigger;

	if (used + BATCH < capacity)
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

static void emit(struct au_engine *engine, struct sink *sink, const struct au_entry *entry)
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

static void take_hand(struct sink *sink, struct au_region *region, int op, uint64_t offset,
		      uint64_t length)
{
	struct at_hand *hand;

	if (sink->hand_count == BATCH || !au_region_enter(region)) {
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

/* Returns false when the page was settled meanwhile: look at its state again. */
static bool fold_missing(struct au_engine *engine, struct sink *sink, struct au_region *region,
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
static void fold_fault(struct au_engine *engine, struct sink *sink, struct au_region *region,
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
		if (!fold_missing(engine, sink, region, page, message))
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
		if (!fold_missing(engine, sink, region, page, message))
			goto again;
		return;
	default: /* an error */
		free_slot(slot);
		au_region_refuse(region, page);
		return;
	}
}

static void fold_event(struct au_engine *engine, struct sink *sink,
		       const struct au_uffd_msg *message)
{
	struct au_entry entry = { .kind = AU_ENTRY_EVENT, .message = *message };
	uint32_t index;

	au_count(AU_COUNT_events, 1);
	if (message->event == AU_EVENT_REMAP && find_region(engine, message->arg.remap.to)) {
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

static void fold(struct au_engine *engine, struct sink *sink, uint64_t epoch,
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
			region = find_region(engine, address);
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

/* With engine->lock held; read without it. */
static void count_flood(struct au_engine *engine, bool news)
{
	__atomic_store_n(&engine->flood, news ? 0 : engine->flood + 1, __ATOMIC_RELAXED);
}

/* Read one batch.  With engine->lock held.  Returns messages read, or -errno. */
static int64_t read_batch(struct au_engine *engine, struct sink *sink, int64_t room)
{
	struct au_uffd_msg messages[BATCH];
	uint64_t epoch = atomic_load(&engine->epoch);
	long count, index;

	if (room > BATCH)
		room = BATCH;
	if (room <= 0)
		return 0;
	AU_GAP(EPOCH_READ);
	count = au_abi_read(engine->fd, messages, (int)room);
	AU_GAP(READ_CLAIM);
	for (index = 0; index < count; index++)
		fold(engine, sink, epoch, &messages[index]);
	return count;
}

/* Have everybody who waits for the range fault afresh: in the kernel, or having yielded. */
static void let_go(struct au_engine *engine, uint64_t start, uint64_t length)
{
	au_slots_end(engine, start, start + length);
	au_abi_wake(engine->fd, start, length);
}

/* Install what needs no Python.  Without the lock. */
static void serve_hands(struct au_engine *engine, struct sink *sink)
{
	int index, error;

	for (index = 0; index < sink->hand_count; index++) {
		struct at_hand *hand = &sink->hands[index];
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
			let_go(engine, region->start + hand->offset, hand->length);
		else if (error)
			au_engine_poison_page(engine, region->start + hand->offset, hand->length);
		au_region_leave(region);
	}
	sink->hand_count = 0;
}

int64_t au_engine_drain(struct au_engine *engine, struct au_entry *out, int64_t max, int role)
{
	struct sink sink = { .out = out, .max = max };
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
		int64_t room = max - sink.count < BATCH ? max - sink.count : BATCH;

		count = read_batch(engine, &sink, room);
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
		count_flood(engine, sink.news);
	pthread_mutex_unlock(&engine->lock);
	if (sink.slots_made)
		au_sentry_kick();
	__atomic_store_n(&au_shared.sequence, au_slots_sequence(), __ATOMIC_SEQ_CST);
	au_engine_leave(engine);
	/* EMFILE: a FORK event waits for a free descriptor. */
	return sink.count || count >= 0 || count == -EAGAIN ? sink.count : count;
}

/* Leave to the touchers what was folded: they are woken and ask again. */
static void refuse_hands(struct au_engine *engine, struct sink *sink)
{
	int index;

	for (index = 0; index < sink->hand_count; index++) {
		struct at_hand *hand = &sink->hands[index];

		let_go(engine, hand->region->start + hand->offset, hand->length);
		au_region_leave(hand->region);
	}
	sink->hand_count = 0;
}

static int64_t pump(struct au_engine *engine, bool serve)
{
	struct sink sink = { 0 };
	int64_t total = 0, count = 0;
	bool queued = false, slots = false;

	if (!au_engine_enter(engine))
		return -EBADF;
	do {
		pthread_mutex_lock(&engine->lock);
		count = queue_room(engine) ? read_batch(engine, &sink, BATCH) : 0;
		if (count > 0)
			count_flood(engine, sink.news);
		pthread_mutex_unlock(&engine->lock);
		if (serve)
			serve_hands(engine, &sink);
		else
			refuse_hands(engine, &sink);
		queued |= sink.queued;
		slots |= sink.slots_made;
		if (count > 0)
			total += count;
	} while (count == BATCH && sink.news);
	if (queued)
		au_engine_notify(engine);
	if (slots)
		au_sentry_kick();
	au_engine_leave(engine);
	return total;
}

int64_t au_engine_pump(struct au_engine *engine)
{
	return pump(engine, true);
}

int64_t au_engine_pump_only(struct au_engine *engine)
{
	return pump(engine, false);
}

void au_engine_name(struct au_region *region, const char *name)
{
	pthread_mutex_lock(&region->engine->lock);
	strncpy(region->name, name, sizeof region->name - 1);
	pthread_mutex_unlock(&region->engine->lock);
}

bool au_engine_describe(struct au_engine *engine, uint64_t page, char *name, uint64_t *offset)
{
	struct au_region *region;
	bool named;

	pthread_mutex_lock(&engine->lock);
	region = find_region(engine, page);
	named = region && region->name[0];
	if (named) {
		memcpy(name, region->name, sizeof region->name);
		*offset = page - region->start;
	}
	pthread_mutex_unlock(&engine->lock);
	return named;
}

int au_engine_ask(struct au_region *region, uint64_t page)
{
	struct au_engine *engine = region->engine;
	struct au_uffd_msg message = { .event = AU_EVENT_PAGEFAULT };
	struct sink sink = { 0 };
	int result = 0;

	message.arg.pagefault.address = region->start + (page << region->page_shift);
	message.arg.pagefault.ptid = au_gettid();
	if (!au_engine_enter(engine))
		return -EBADF;
	pthread_mutex_lock(&engine->lock);
	if (atomic_load(&region->closing))
		result = -EBADF;
	else if (!queue_room(engine))
		result = -ENOMEM;
	else
		/* False: it was settled meanwhile, as the caller will see. */
		fold_missing(engine, &sink, region, page, &message);
	pthread_mutex_unlock(&engine->lock);
	serve_hands(engine, &sink);
	if (sink.queued)
		au_engine_notify(engine);
	au_sentry_kick();
	au_engine_leave(engine);
	return result;
}

int64_t au_engine_blocked(struct au_engine *engine, uint64_t *pages, uint32_t *tids, int64_t max)
{
	uint32_t index, high = au_slots_high();
	int64_t count = 0;

	for (index = 0; index < high && count < max; index++) {
		struct au_slot *slot = au_slot_at(index);
		enum au_slot_state state = au_slot_state(atomic_load(&slot->word));

		if (state == AU_SLOT_FREE || state == AU_SLOT_CLAIM ||
		    atomic_load(&slot->engine) != engine)
			continue;
		pages[count] = atomic_load(&slot->page);
		tids[count++] = atomic_load(&slot->tid);
	}
	return count;
}

/* ------------------------------------------------- resolving without regions */

static int issue(struct au_engine *engine, int op, uint64_t start, uint64_t source, uint64_t length,
		 uint64_t mode, int64_t *done)
{
	switch (op) {
	case AU_OP_COPY:
		return au_abi_copy(engine->fd, start, source, length, mode, done);
	case AU_OP_ZERO:
		return au_abi_zeropage(engine->fd, start, length, mode, done);
	case AU_OP_POISON:
		return au_abi_poison(engine->fd, start, length, mode, done);
	case AU_OP_CONTINUE:
		return au_abi_continue(engine->fd, start, length, mode, done);
	case AU_OP_MOVE:
		return au_abi_move(engine->fd, start, source, length, mode, done);
	case AU_OP_WRITEPROTECT:
		return au_abi_writeprotect(engine->fd, start, length, mode);
	case AU_OP_RWPROTECT:
		return au_abi_rwprotect(engine->fd, start, length, mode);
	case AU_OP_WAKE:
		return au_abi_wake(engine->fd, start, length);
	default:
		return -EINVAL;
	}
}

int au_engine_resolve(struct au_engine *engine, int op, uint64_t start, uint64_t source,
		      uint64_t length, uint64_t mode, int64_t *done)
{
	int result;

	if (!au_engine_enter(engine))
		return -EBADF;
	*done = 0;
	au_slots_begin(engine, start, start + length);
	result = issue(engine, op, start, source, length, mode, done);
	atomic_fetch_add(&engine->epoch, 1);
	if (result == 0) {
		if (au_slots_end(engine, start, start + length))
			au_abi_wake(engine->fd, start, length);
	} else {
		if (*done > 0 && au_slots_end(engine, start, start + (uint64_t)*done))
			au_abi_wake(engine->fd, start, (uint64_t)*done);
		au_slots_abort(engine, start, start + length);
		au_sentry_kick();
	}
	au_engine_leave(engine);
	return result;
}

void au_engine_poison_page(struct au_engine *engine, uint64_t page, uint64_t page_size)
{
	struct au_region *region;
	bool entered = false;
	int error, result;

	pthread_mutex_lock(&engine->lock);
	region = find_region(engine, page);
	if (region)
		entered = au_region_enter(region);
	if (region && !entered)
		au_region_refuse(region, (page - region->start) >> region->page_shift);
	pthread_mutex_unlock(&engine->lock);
	if (entered) {
		au_region_install(region, AU_OP_POISON, page - region->start, NULL, page_size, 0,
				  UINT64_MAX, &error);
		/* A page that is there after all was skipped, and nobody woken. */
		au_abi_wake(engine->fd, page, page_size);
		au_region_leave(region);
	} else if (!region) {
		int64_t done;

		result = au_engine_resolve(engine, AU_OP_POISON, page, 0, page_size, 0, &done);
		/* Before Linux 6.6 nothing else keeps a thread from waiting for ever. */
		if ((result == -EINVAL || result == -ENOTTY) && (engine->options & AU_ENGINE_RAW) &&
		    (engine->options & AU_ENGINE_OWN))
			au_error_map(page, page_size, true);
		au_abi_wake(engine->fd, page, page_size);
	}
}

void au_engine_forked(struct au_engine *engine)
{
	uint32_t index;

	/* The mappings stayed with the parent, so their addresses may be in use again, and
	 * whoever was inside a call is not here to leave it. */
	for (index = 0; index < engine->region_count; index++)
		au_region_forked(engine->regions[index]);
	/* The child's copies of the descriptors act on the parent's memory. */
	if (engine->fd >= 0)
		close(engine->fd);
	if (engine->notify_fd >= 0)
		close(engine->notify_fd);
	engine->fd = engine->notify_fd = -1;
	atomic_store(&engine->closing, 1);
	atomic_store(&engine->users, 0);
	pthread_mutex_init(&engine->lock, NULL);
}
