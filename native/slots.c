#include "slots.h"

#include "counters.h"
#include "sys.h"

#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define CHUNK_BITS 6
#define CHUNK (1U << CHUNK_BITS)
#define CHUNKS 1024
/* How often the repetitions of one fault are handed on: signals, and the spin of a system call
 * that touches, make thousands. */
#define REPEAT_NS (100 * AU_NS_PER_MS)

static struct au_slot first_chunk[CHUNK];
static _Atomic(struct au_slot *) chunks[CHUNKS] = { first_chunk };
static _Atomic uint32_t allocated = CHUNK;
static _Atomic uint32_t high;
static _Atomic uint32_t live;
static _Atomic uint64_t sequence;
static pthread_mutex_t claim_lock = PTHREAD_MUTEX_INITIALIZER;

uint32_t au_slots_high(void)
{
	return atomic_load(&high);
}

uint32_t au_slots_live(void)
{
	return atomic_load(&live);
}

uint64_t au_slots_sequence(void)
{
	return atomic_load(&sequence);
}

struct au_slot *au_slot_at(uint32_t index)
{
	return &atomic_load(&chunks[index >> CHUNK_BITS])[index & (CHUNK - 1)];
}

#define TO(state) (1U << AU_SLOT_##state)
/* The protocol: from each state to which others.  Who moves a slot so: slots.h. */
static const uint32_t next_states[AU_SLOT_STATES] = {
	[AU_SLOT_FREE] = TO(CLAIM),
	[AU_SLOT_CLAIM] = TO(PENDING) | TO(ASKED),
	[AU_SLOT_PENDING] = TO(YIELDED) | TO(NOGIL) | TO(KERNEL) | TO(FOREIGN) | TO(MASKED) |
			    TO(RESOLVING) | TO(FREE),
	[AU_SLOT_YIELDED] = TO(PENDING) | TO(FREE),
	[AU_SLOT_NOGIL] = TO(PENDING) | TO(FREE),
	[AU_SLOT_KERNEL] = TO(PENDING) | TO(FREE),
	[AU_SLOT_RESOLVING] = TO(PENDING) | TO(FREE),
	[AU_SLOT_FOREIGN] = TO(FREE),
	[AU_SLOT_MASKED] = TO(PENDING) | TO(FREE),
	[AU_SLOT_ASKED] = TO(FREE),
};

bool au_slot_may(enum au_slot_state from, enum au_slot_state to)
{
	return from < AU_SLOT_STATES && to < AU_SLOT_STATES && (next_states[from] & (1U << to));
}

/* The C tests hold every step to the table. */
static void check_step(uint32_t word, enum au_slot_state to)
{
#ifdef AU_TEST_GAPS
	if (!au_slot_may(au_slot_state(word), to))
		abort();
#else
	(void)word;
	(void)to;
#endif
}

bool au_slot_move(struct au_slot *slot, uint32_t word, enum au_slot_state state)
{
	uint32_t next = (word & ~AU_SLOT_STATE_MASK) | state;

	check_step(word, state);
	return atomic_compare_exchange_strong(&slot->word, &word, next);
}

bool au_slot_free(struct au_slot *slot, uint32_t word)
{
	uint32_t next = ((word >> AU_SLOT_STATE_BITS) + 1) << AU_SLOT_STATE_BITS;

	if (au_slot_state(word) != AU_SLOT_FREE)
		check_step(word, AU_SLOT_FREE);
	if (!atomic_compare_exchange_strong(&slot->word, &word, next))
		return false;
	if (au_slot_state(word) != AU_SLOT_FREE) {
		atomic_fetch_sub(&live, 1);
		atomic_fetch_sub_explicit(&au_counters[AU_COUNT_live_slots], 1, memory_order_relaxed);
	}
	if (au_slot_state(word) == AU_SLOT_YIELDED || au_slot_state(word) == AU_SLOT_ASKED)
		au_futex_wake(&slot->word);
	return true;
}

static struct au_slot *grow(void)
{
	uint32_t have = atomic_load(&allocated);
	struct au_slot *chunk;

	if (have >= CHUNK * CHUNKS)
		return NULL;
	chunk = mmap(NULL, sizeof(struct au_slot) * CHUNK, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (chunk == MAP_FAILED)
		return NULL;
	atomic_store(&chunks[have >> CHUNK_BITS], chunk);
	atomic_store(&allocated, have + CHUNK);
	return chunk;
}

static bool same_fault(const struct au_slot *slot, const struct au_engine *engine, uint64_t page)
{
	return atomic_load(&slot->engine) == engine && atomic_load(&slot->page) == page;
}

/* What a message means for a slot that its thread has already.
 * Returns true when the slot stands for this very fault. */
static bool absorb(struct au_slot *slot, const struct au_engine *engine, uint64_t page)
{
	uint32_t word = atomic_load(&slot->word);

	switch (au_slot_state(word)) {
	case AU_SLOT_FREE:
		return false;
	case AU_SLOT_RESOLVING:
		/* The message may be younger than the ioctl under way: the caller
		 * makes a second slot and looks at the page again. */
		return false;
	default:
		if (same_fault(slot, engine, page)) {
			atomic_fetch_add(&slot->repeated, 1);
			return true;
		}
	}
	/* The thread waits somewhere else now, so it has left this fault. */
	if (au_slot_state(word) != AU_SLOT_CLAIM && au_slot_state(word) != AU_SLOT_YIELDED)
		au_slot_free(slot, word);
	return false;
}

struct au_slot *au_slot_claim(struct au_engine *engine, uint32_t tid, uint64_t page,
			      uint64_t page_size, uint64_t epoch, bool *duplicate)
{
	struct au_slot *found = NULL;
	uint32_t index, limit, free_index = UINT32_MAX, word;
	uint64_t now;

	*duplicate = false;
	pthread_mutex_lock(&claim_lock);
	limit = atomic_load(&high);
	for (index = 0; index < limit; index++) {
		struct au_slot *slot = au_slot_at(index);

		if (au_slot_state(atomic_load(&slot->word)) == AU_SLOT_FREE) {
			if (free_index == UINT32_MAX)
				free_index = index;
			continue;
		}
		if (atomic_load(&slot->tid) != tid)
			continue;
		if (absorb(slot, engine, page)) {
			now = au_now_ns();
			*duplicate = now - atomic_load(&slot->told_at) < REPEAT_NS;
			if (!*duplicate)
				atomic_store(&slot->told_at, now);
			pthread_mutex_unlock(&claim_lock);
			return NULL;
		}
	}
	if (free_index == UINT32_MAX) {
		if (limit == atomic_load(&allocated) && !grow()) {
			/* 65,536 threads wait already.  The fault is still served; only
			 * the GIL yield and the rescue are lost to it. */
			pthread_mutex_unlock(&claim_lock);
			return NULL;
		}
		free_index = limit;
	}
	found = au_slot_at(free_index);
	word = atomic_load(&found->word);
	atomic_store(&found->tid, tid);
	atomic_store(&found->engine, engine);
	atomic_store(&found->page, page);
	atomic_store(&found->page_size, page_size);
	atomic_store(&found->epoch, epoch);
	atomic_store(&found->sequence, atomic_fetch_add(&sequence, 1) + 1);
	atomic_store(&found->signalled_at, 0);
	atomic_store(&found->signals, 0);
	atomic_store(&found->reported, 0);
	atomic_store(&found->repeated, 0);
	now = au_now_ns();
	atomic_store(&found->born, now);
	atomic_store(&found->told_at, now);
	atomic_fetch_add(&live, 1);
	au_count(AU_COUNT_live_slots, 1);
	au_slot_move(found, word, AU_SLOT_CLAIM);
	if (free_index >= limit)
		atomic_store(&high, free_index + 1);
	pthread_mutex_unlock(&claim_lock);
	return found;
}

static uint32_t publish(struct au_slot *slot, enum au_slot_state state)
{
	uint32_t claimed = atomic_load(&slot->word);

	au_slot_move(slot, claimed, state);
	/* Store the state, then look at the page: the other half of this Dekker pair
	 * is the installer's "page INSTALLING, fence, look at the slots". */
	atomic_thread_fence(memory_order_seq_cst);
	return (claimed & ~AU_SLOT_STATE_MASK) | state;
}

uint32_t au_slot_publish(struct au_slot *slot)
{
	return publish(slot, AU_SLOT_PENDING);
}

uint32_t au_slot_publish_asked(struct au_slot *slot)
{
	return publish(slot, AU_SLOT_ASKED);
}

void au_slot_withdraw(struct au_slot *slot, uint32_t published)
{
	uint32_t word = atomic_load(&slot->word);

	while ((word & ~AU_SLOT_STATE_MASK) == (published & ~AU_SLOT_STATE_MASK) &&
	       au_slot_state(word) != AU_SLOT_FREE && !au_slot_free(slot, word))
		word = atomic_load(&slot->word);
}

void au_slot_rearm(struct au_slot *slot, uint32_t word)
{
	atomic_store(&slot->sequence, AU_SLOT_UNPROVABLE);
	atomic_store(&slot->repeated, 0);
	atomic_store(&slot->signals, 0);
	atomic_store(&slot->signalled_at, 0);
	atomic_store(&slot->born, au_now_ns());
	au_slot_move(slot, word, AU_SLOT_PENDING);
}

static bool in_range(const struct au_slot *slot, const struct au_engine *engine, uint64_t start,
		     uint64_t end)
{
	uint64_t page = atomic_load(&slot->page);

	return atomic_load(&slot->engine) == engine && page >= start && page < end;
}

void au_slots_begin(struct au_engine *engine, uint64_t start, uint64_t end)
{
	uint32_t index, limit;

	atomic_thread_fence(memory_order_seq_cst);
	if (atomic_load(&live) == 0)
		return;
	limit = atomic_load(&high);
	for (index = 0; index < limit; index++) {
		struct au_slot *slot = au_slot_at(index);
		uint32_t word = atomic_load(&slot->word);

		if (au_slot_state(word) == AU_SLOT_PENDING && in_range(slot, engine, start, end))
			au_slot_move(slot, word, AU_SLOT_RESOLVING);
	}
}

void au_slots_abort(struct au_engine *engine, uint64_t start, uint64_t end)
{
	uint32_t index, limit = atomic_load(&high);

	for (index = 0; index < limit; index++) {
		struct au_slot *slot = au_slot_at(index);
		uint32_t word = atomic_load(&slot->word);

		if (au_slot_state(word) == AU_SLOT_RESOLVING && in_range(slot, engine, start, end)) {
			/* A signal that came meanwhile found nothing to do. */
			atomic_store(&slot->signalled_at, 0);
			au_slot_move(slot, word, AU_SLOT_PENDING);
		}
	}
}

bool au_slots_end(struct au_engine *engine, uint64_t start, uint64_t end)
{
	uint32_t index, limit;
	bool late = false;

	atomic_thread_fence(memory_order_seq_cst);
	if (atomic_load(&live) == 0)
		return false;
	limit = atomic_load(&high);
	for (index = 0; index < limit; index++) {
		struct au_slot *slot = au_slot_at(index);
		uint32_t word = atomic_load(&slot->word);
		enum au_slot_state state = au_slot_state(word);

		if (state == AU_SLOT_FREE || state == AU_SLOT_CLAIM)
			continue;
		if (!in_range(slot, engine, start, end))
			continue;
		late |= state != AU_SLOT_RESOLVING && state != AU_SLOT_YIELDED &&
			state != AU_SLOT_ASKED;
		/* The word can change under us (a handler yields, or gives way):
		 * take it as it is then, for the page is there whatever it says. */
		while (!au_slot_free(slot, word)) {
			word = atomic_load(&slot->word);
			state = au_slot_state(word);
			if (state == AU_SLOT_FREE || state == AU_SLOT_CLAIM ||
			    !in_range(slot, engine, start, end))
				break;
		}
	}
	return late;
}

void au_slots_dismiss(struct au_engine *engine, uint64_t start, uint64_t end)
{
	uint32_t index, limit = atomic_load(&high);

	for (index = 0; index < limit; index++) {
		struct au_slot *slot = au_slot_at(index);
		uint32_t word = atomic_load(&slot->word);

		if (au_slot_state(word) == AU_SLOT_ASKED && in_range(slot, engine, start, end))
			au_slot_free(slot, word);
	}
}

void au_slots_drop_engine(struct au_engine *engine)
{
	au_slots_end(engine, 0, UINT64_MAX);
}

bool au_slots_refer(struct au_engine *engine, uint64_t start, uint64_t end)
{
	uint32_t index, limit = atomic_load(&high);

	for (index = 0; index < limit; index++) {
		struct au_slot *slot = au_slot_at(index);

		if (au_slot_state(atomic_load(&slot->word)) != AU_SLOT_FREE &&
		    in_range(slot, engine, start, end))
			return true;
	}
	return false;
}

struct au_slot *au_slot_pending_of(uint32_t tid)
{
	uint32_t index, limit = atomic_load(&high);

	for (index = 0; index < limit; index++) {
		struct au_slot *slot = au_slot_at(index);

		if (atomic_load(&slot->tid) == tid &&
		    au_slot_state(atomic_load(&slot->word)) == AU_SLOT_PENDING)
			return slot;
	}
	return NULL;
}

void au_slots_reset(void)
{
	uint32_t index, limit = atomic_load(&high);

	for (index = 0; index < limit; index++)
		atomic_store(&au_slot_at(index)->word, 0);
	atomic_store(&live, 0);
	atomic_store(&high, 0);
	atomic_store(&au_counters[AU_COUNT_live_slots], 0);
	pthread_mutex_init(&claim_lock, NULL);
}
