#include "stalls.h"

#include "counters.h"
#include "engine.h"
#include "handler.h"
#include "install.h"
#include "kick.h"
#include "notes.h"
#include "rescue.h"
#include "slots.h"
#include "sys.h"
#include "watched.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

/* How many times the stall time a computation that holds the GIL is waited for. */
#define COMPUTING_TERMS 6

/* Pages were poisoned because nothing moved; the sentry's own note. */
static bool poisoned_and_waiting;
/* For how long nobody has got the GIL back who wants it; the sentry's own note. */
static struct {
	uint64_t regained, waited, last, cpu;
} regain;

/* Of all threads but the sentry, which is who asks. */
static uint64_t cpu_time(void)
{
	struct timespec all, own;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &all);
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &own);
	return (uint64_t)(all.tv_sec - own.tv_sec) * AU_NS_PER_S + (uint64_t)all.tv_nsec -
	       (uint64_t)own.tv_nsec;
}

static void want_rescue(struct au_engine *engine, struct au_slot *slot, struct au_round *round,
			enum au_note_kind why)
{
	if (!atomic_exchange(&slot->reported, 1)) {
		if (!atomic_exchange(&engine->rescue_wanted, 1)) {
			engine->rescue_at = engine->wanted_at = round->now;
			engine->stall_cpu = cpu_time();
			engine->rescue_seen = atomic_load(&engine->rescues);
			engine->stall_stage = 0;
		}
		au_note_down(why, atomic_load(&slot->tid), atomic_load(&slot->page),
			     round->now - atomic_load(&slot->born));
		au_count(AU_COUNT_rescues, 1);
		au_rescue_wake();
	}
}

/* The process cannot move any more and never will: say so, and end. */
static void give_up(struct au_engine *engine)
{
	static const char text[] =
		"aiouffd: fatal: the process is stuck: a thread that waits for a page gave the GIL away "
		"and another one holds it while it waits for the first (a lock inside C code?). "
		"See docs/gotchas.md; aborting.\n";

	(void)engine;
	if (write(STDERR_FILENO, text, sizeof text - 1) < 0)
		abort();
	abort();
}

/* Somebody computes with the GIL held: slow, but not stuck.  Starts another term. */
static bool computes(struct au_engine *engine, const struct au_round *round)
{
	uint64_t used = cpu_time();
	/* A fifth of a processor: other programs may have the rest, and threads that wait
	 * for the GIL use a little as well. */
	bool busy = (used - engine->stall_cpu) * 5 > round->now - engine->rescue_at;

	if (busy) {
		engine->rescue_at = round->now;
		engine->stall_cpu = used;
	}
	return busy;
}

/* Nobody takes the rescue, so somebody holds the GIL who will not let it go: ask all
 * that waits once more before anything is broken. */
static void ask_all_again(struct au_engine *engine)
{
	uint32_t index, high = au_slots_high();

	for (index = 0; index < high; index++) {
		struct au_slot *slot = au_slot_at(index);
		uint32_t word = atomic_load(&slot->word);
		enum au_slot_state state = au_slot_state(word);

		if (atomic_load(&slot->engine) == engine &&
		    (state == AU_SLOT_KERNEL || state == AU_SLOT_NOGIL || state == AU_SLOT_MASKED))
			au_slot_rearm(slot, word);
	}
}

/* Nobody took the rescue for too long: whoever holds the GIL will not let it go.  It is
 * one of those that we cannot ask: give them an error. */
static void stalled(struct au_engine *engine, struct au_round *round)
{
	static const char text[] =
		"aiouffd: no progress for too long; failing threads that wait for pages (SIGBUS or EFAULT)\n";
	uint32_t index, high = au_slots_high();

	if (engine->stall_stage > 1) {
		if (!computes(engine, round))
			give_up(engine);
		return;
	}
	/* But a thread that holds the GIL in a system call which touches, with a signal
	 * pending, burns a processor for ever: so not for ever. */
	if (round->now - engine->wanted_at < COMPUTING_TERMS * engine->stall_ns &&
	    computes(engine, round))
		return;
	engine->stall_stage++;
	engine->stall_cpu = cpu_time();
	if (write(STDERR_FILENO, text, sizeof text - 1) < 0)
		engine->stall_stage = 2;
	au_shared.stalled++;
	poisoned_and_waiting = true;
	engine->rescue_at = round->now;
	for (index = 0; index < high; index++) {
		struct au_slot *slot = au_slot_at(index);
		enum au_slot_state state = au_slot_state(atomic_load(&slot->word));

		if (atomic_load(&slot->engine) != engine ||
		    (state != AU_SLOT_KERNEL && state != AU_SLOT_MASKED && state != AU_SLOT_PENDING &&
		     state != AU_SLOT_YIELDED))
			continue;
		au_count(AU_COUNT_stall_poisons, 1);
		au_note_down(AU_NOTE_STALL_POISON, atomic_load(&slot->tid), atomic_load(&slot->page),
			     round->now - atomic_load(&slot->born));
		au_engine_poison_page(engine, atomic_load(&slot->page), atomic_load(&slot->page_size));
	}
}

struct stuck {
	struct au_round *round;
	struct au_engine *engine;
};

static void look_for_stuck(struct au_engine *engine, void *argument)
{
	struct stuck *stuck = argument;
	struct au_round *round = stuck->round;

	if (engine->stall_stage < 2 || !atomic_load(&engine->rescue_wanted) ||
	    atomic_load(&engine->rescues) != engine->rescue_seen)
		return;
	poisoned_and_waiting = round->blocked = true;
	if (round->now - engine->rescue_at > engine->stall_ns && !computes(engine, round))
		stuck->engine = engine;
}

/* The error may have helped nobody: the thread that got it wants the GIL back first.  Its
 * slot is gone, so this is not seen by looking at slots. */
void au_stalls_watch(struct au_round *round)
{
	struct stuck stuck = { .round = round };

	if (!poisoned_and_waiting)
		return;
	poisoned_and_waiting = false;
	au_watched_each(look_for_stuck, &stuck);
	if (stuck.engine)
		give_up(stuck.engine);
}

static void least_stall(struct au_engine *engine, void *argument)
{
	uint64_t *least = argument;

	if (engine->stall_ns < *least)
		*least = engine->stall_ns;
}

/* A thread whose page is there wants the GIL back, and does not get it: another one took
 * it in between, and may wait for a lock of C that the first one holds.  No slot tells. */
void au_stalls_watch_gil(struct au_round *round)
{
	uint64_t done = au_handler_regained(), step, stall = UINT64_MAX;

	if (!au_handler_wanting() || done != regain.regained ||
	    __atomic_load_n(&au_shared.exiting, __ATOMIC_SEQ_CST)) {
		regain.regained = done;
		regain.waited = 0;
		return;
	}
	if (!regain.waited) {
		regain.waited = 1;
		regain.last = round->now;
		regain.cpu = cpu_time();
		return;
	}
	/* A process that was stopped has not waited. */
	step = round->now - regain.last;
	regain.waited += step < 50 * AU_NS_PER_MS ? step : 50 * AU_NS_PER_MS;
	regain.last = round->now;
	au_watched_each(least_stall, &stall);
	if (regain.waited <= stall)
		return;
	if ((cpu_time() - regain.cpu) * 20 > regain.waited)
		regain.waited = 0; /* somebody computes with the GIL held */
	else
		give_up(NULL);
}

/* Without the framework there is no rescue loop.  A loop that takes its time is its owner's
 * business; but one that waits for a page which only itself could bring waits for ever. */
static void look_after_raw(struct au_engine *engine, struct au_slot *slot, struct au_round *round,
			   uint32_t loop)
{
	static const char text[] =
		"aiouffd: the thread of an event loop touched a page that only this loop could "
		"bring; it gets an error (SIGBUS or EFAULT)\n";
	uint64_t page = atomic_load(&slot->page);

	if (!loop || atomic_load(&slot->tid) != loop ||
	    round->now - atomic_load(&slot->born) < engine->stall_ns)
		return;
	if (write(STDERR_FILENO, text, sizeof text - 1) > 0)
		au_count(AU_COUNT_stall_poisons, 1);
	au_engine_poison_page(engine, page, atomic_load(&slot->page_size));
}

/* A thread waits and nothing is wrong with it: is somebody coming? */
void au_look_after(struct au_engine *engine, struct au_slot *slot, struct au_round *round)
{
	uint64_t waited = round->now - atomic_load(&slot->born);
	uint64_t drains = atomic_load(&engine->drains);
	uint32_t loop = atomic_load(&engine->loop_tid);

	round->blocked = true;
	if (engine->options & AU_ENGINE_RAW) {
		look_after_raw(engine, slot, round, loop);
		return;
	}
	if (loop && atomic_load(&slot->tid) == loop) {
		want_rescue(engine, slot, round, AU_NOTE_SELF_TOUCH);
	} else if (__atomic_load_n(&engine->stuck, __ATOMIC_RELAXED) && drains == engine->ping_drains) {
		want_rescue(engine, slot, round, AU_NOTE_LOOP_STUCK);
	} else if (engine->ping_at && drains != engine->ping_drains) {
		/* It answered: it only waits for the source.  Ask less often. */
		engine->ping_at = 0;
		engine->ping_wait = engine->ping_wait < AU_NS_PER_S ? engine->ping_wait * 2 :
								      AU_NS_PER_S;
	} else if (engine->ping_at) {
		if (round->now - engine->ping_at > engine->patience_ns) {
			__atomic_store_n(&engine->stuck, 1, __ATOMIC_RELAXED);
			want_rescue(engine, slot, round, AU_NOTE_LOOP_STUCK);
		}
	} else if (waited > engine->patience_ns + engine->ping_wait) {
		engine->ping_at = round->now;
		engine->ping_drains = drains;
		if (!engine->ping_wait)
			engine->ping_wait = engine->patience_ns;
		au_count(AU_COUNT_pings, 1);
		au_engine_notify(engine);
	}
	if (!atomic_load(&engine->rescue_wanted) || !au_rescue_watched() ||
	    atomic_load(&engine->rescues) != engine->rescue_seen)
		return;
	if (engine->stall_stage == 0 && round->now - engine->rescue_at > 2 * engine->patience_ns) {
		engine->stall_stage = 1;
		ask_all_again(engine);
		round->undecided = true;
	} else if (round->now - engine->rescue_at > engine->stall_ns) {
		stalled(engine, round);
	}
}

void au_stalls_forked(void)
{
	poisoned_and_waiting = false;
	memset(&regain, 0, sizeof regain);
}
