#include "engine.h"

#include "abi.h"
#include "kick.h"
#include "slots.h"
#include "sys.h"

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

int au_engine_resolve(struct au_engine *engine, int op, uint64_t start, uint64_t source,
		      uint64_t length, uint64_t mode, int64_t *done)
{
	int result;

	if (!au_engine_enter(engine))
		return -EBADF;
	au_slots_begin(engine, start, start + length);
	result = au_abi_apply(engine->fd, op, start, source, length, mode, done);
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
