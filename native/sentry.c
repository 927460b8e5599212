#include "sentry.h"

#include "abi.h"
#include "children.h"
#include "counters.h"
#include "engine.h"
#include "error_page.h"
#include "gil.h"
#include "guard.h"
#include "handler.h"
#include "inherit.h"
#include "install.h"
#include "interrupt.h"
#include "kick.h"
#include "pagemap.h"
#include "pump.h"
#include "regions.h"
#include "registry.h"
#include "rescue.h"
#include "slots.h"
#include "sys.h"
#include "task.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>

#define ENGINES 8192
#define EVENTS 64
#define GRACE_MIN_NS 50000ULL
/* Calm rounds stretch the grace up to this many times. */
#define CALM_MAX 8
/* A signal that has not been answered for so long is looked into. */
#define UNANSWERED_NS (20 * AU_NS_PER_MS)
/* How soon a verdict is taken back after the same fault was read again. */
#define RECHECK_KERNEL_NS (2 * AU_NS_PER_MS)
#define RECHECK_NOGIL_NS (100 * AU_NS_PER_MS)
/* How many times the stall time a computation that holds the GIL is waited for. */
#define COMPUTING_TERMS 6
#define LIVENESS_NS AU_NS_PER_S
#define MAX_SIGNALS 2
#define NOTES 64

static pthread_mutex_t engines_lock = PTHREAD_MUTEX_INITIALIZER;
static struct au_engine *engines[ENGINES];
static uint32_t engine_count;

static pthread_mutex_t start_lock = PTHREAD_MUTEX_INITIALIZER;
static bool started, fork_hooked;
static int epoll_fd = -1;
/* Pages were poisoned because nothing moved; the sentry's own note. */
static bool poisoned_and_waiting;
/* For how long nobody has got the GIL back who wants it; the sentry's own note. */
static struct {
	uint64_t regained, waited, last, cpu;
} regain;

static struct au_note notes[NOTES];
static _Atomic uint32_t note_head, note_tail;

/* ---------------------------------------------------------- small things */

static void note(enum au_note_kind kind, uint32_t tid, uint64_t address, uint64_t waited)
{
	uint32_t tail = atomic_load(&note_tail);

	if (tail - atomic_load(&note_head) == NOTES)
		return;
	notes[tail % NOTES] = (struct au_note){
		.kind = kind, .tid = tid, .address = address, .waited_ns = waited
	};
	atomic_store(&note_tail, tail + 1);
}

int au_sentry_take_note(struct au_note *out)
{
	uint32_t head = atomic_load(&note_head);

	if (head == atomic_load(&note_tail))
		return 0;
	*out = notes[head % NOTES];
	atomic_store(&note_head, head + 1);
	return 1;
}

enum where { RUNNING, IN_USER, IN_KERNEL, GONE };

/* Where a waiting thread waits: "-1 SP PC" is a fault in user mode; a system call's
 * number means that the kernel touched for it, and then a signal would make it spin. */
static enum where locate(uint32_t tid, uint64_t *sp, uint64_t *pc)
{
	char buffer[256], *end;
	ssize_t size = au_task_read(tid, "syscall", buffer, sizeof buffer);

	if (size < 0)
		return size == -ENOENT || size == -ESRCH ? GONE : RUNNING;
	if (buffer[0] == '-' && buffer[1] == '1' && buffer[2] == ' ') {
		*sp = strtoull(buffer + 3, &end, 16);
		*pc = strtoull(end, NULL, 16);
		return IN_USER;
	}
	return buffer[0] >= '0' && buffer[0] <= '9' ? IN_KERNEL : RUNNING;
}

/* Does the program keep our signal from a thread?  It has been sent, so it is pending then.  In
 * our own handler everything is blocked as well, but that comes to an end by itself. */
static bool signal_blocked(uint32_t tid)
{
	uint64_t entries = au_handler_entries();
	uint64_t ours = au_signal_bit(au_handler_signal());
	struct au_task_signals signals;

	if (au_handler_inside(tid) || au_task_signals(tid, &signals))
		return false;
	return (signals.blocked & signals.pending & ours) && au_handler_entries() == entries &&
	       !au_handler_inside(tid);
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

/* A reference to `engine` if it still lives; pointers from epoll and slots may be stale. */
static bool hold(struct au_engine *engine)
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

/* ---------------------------------------------------------------- a round */

struct round {
	uint64_t now;
	uint64_t grace;
	bool undecided; /* look again after a grace */
	bool blocked;   /* threads wait that only time can help */
	bool acted;
	bool flood;
	/* What the main thread waits for, if it has touched. */
	struct au_engine *main_engine;
	uint64_t main_page;
};

static void judge_signalled(struct au_slot *slot, uint32_t word, struct round *round)
{
	uint32_t tid = atomic_load(&slot->tid);

	if (au_handler_inside(tid)) {
		/* Perhaps for an earlier fault, and waits for the GIL: it will come to this one. */
		atomic_store(&slot->signalled_at, round->now);
		return;
	}
	round->undecided = true;
	if (round->now - atomic_load(&slot->signalled_at) < UNANSWERED_NS)
		return;
	au_count(AU_COUNT_signals_unanswered, 1);
	if (!au_handler_installed()) {
		au_handler_start();
		atomic_store(&slot->signalled_at, 0);
		return;
	}
	if (signal_blocked(tid)) {
		if (au_slot_move(slot, word, AU_SLOT_MASKED))
			note(AU_NOTE_MASKED, tid, atomic_load(&slot->page),
			     round->now - atomic_load(&slot->born));
		return;
	}
	/* Stopped, traced, or the signal met the slot in another state: ask again. */
	atomic_store(&slot->signalled_at, 0);
}

static void judge_pending(struct au_engine *engine, struct au_slot *slot, uint32_t word,
			  struct round *round)
{
	uint64_t sp = 0, pc = 0, born = atomic_load(&slot->born);
	uint32_t tid = atomic_load(&slot->tid);

	round->blocked = true;
	if (!(engine->options & AU_ENGINE_YIELD)) {
		au_slot_move(slot, word, AU_SLOT_NOGIL);
		return;
	}
	/* Who holds one of several GILs proves nothing of the others. */
	if (atomic_load(&slot->sequence) <= __atomic_load_n(&au_shared.proof, __ATOMIC_SEQ_CST) &&
	    au_gil_only()) {
		if (au_slot_move(slot, word, AU_SLOT_NOGIL))
			au_count(AU_COUNT_verdict_proved, 1);
		return;
	}
	if (round->now < born + engine->grace_ns) {
		round->undecided = true;
		return;
	}
	if (atomic_load(&slot->signalled_at)) {
		judge_signalled(slot, word, round);
		return;
	}
	switch (locate(tid, &sp, &pc)) {
	case GONE:
		/* Not a thread of ours: another process that reads our memory, a
		 * kernel worker, or a thread that has ended. */
		if (au_slot_move(slot, word, AU_SLOT_FOREIGN))
			au_count(AU_COUNT_verdict_foreign, 1);
		return;
	case IN_KERNEL:
		if (au_slot_move(slot, word, AU_SLOT_KERNEL))
			au_count(AU_COUNT_verdict_kernel, 1);
		return;
	case RUNNING:
		/* Or it cannot be seen: then look_after brings it to an end. */
		round->undecided |= round->now - born < UNANSWERED_NS;
		return;
	case IN_USER:
		break;
	}
	round->acted = true;
	if (atomic_load(&slot->signals) >= MAX_SIGNALS) {
		/* Twice it was found elsewhere: the slot is stale, or we are wrong about
		 * it.  A wake makes a thread that does wait fault afresh. */
		uint64_t page = atomic_load(&slot->page), size = atomic_load(&slot->page_size);

		if (au_slot_free(slot, word))
			au_abi_wake(engine->fd, page, size);
		return;
	}
	atomic_store(&slot->sp, sp);
	atomic_store(&slot->pc, pc);
	atomic_fetch_add(&slot->signals, 1);
	atomic_store(&slot->signalled_at, round->now);
	round->undecided = true;
	AU_GAP(LOOK_SIGNAL);
	if (atomic_load(&slot->word) == word && au_handler_send(tid) == -ESRCH)
		au_slot_move(slot, word, AU_SLOT_FOREIGN);
}

static uint64_t cpu_time(void)
{
	struct timespec all, own;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &all);
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &own);
	return (uint64_t)(all.tv_sec - own.tv_sec) * AU_NS_PER_S + (uint64_t)all.tv_nsec -
	       (uint64_t)own.tv_nsec;
}

static void want_rescue(struct au_engine *engine, struct au_slot *slot, struct round *round,
			enum au_note_kind why)
{
	if (!atomic_exchange(&slot->reported, 1)) {
		if (!atomic_exchange(&engine->rescue_wanted, 1)) {
			engine->rescue_at = engine->wanted_at = round->now;
			engine->stall_cpu = cpu_time();
			engine->rescue_seen = atomic_load(&engine->rescues);
			engine->stall_stage = 0;
		}
		note(why, atomic_load(&slot->tid), atomic_load(&slot->page),
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

/* Of all threads but the sentry, which is who asks. */
/* Somebody computes with the GIL held: slow, but not stuck.  Starts another term. */
static bool computes(struct au_engine *engine, const struct round *round)
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

/* Nobody took the rescue for too long: whoever holds the GIL will not let it go.  It is
 * one of those that we cannot ask: give them an error. */
static void stalled(struct au_engine *engine, struct round *round)
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
		note(AU_NOTE_STALL_POISON, atomic_load(&slot->tid), atomic_load(&slot->page),
		     round->now - atomic_load(&slot->born));
		au_engine_poison_page(engine, atomic_load(&slot->page), atomic_load(&slot->page_size));
	}
}

/* The error may have helped nobody: the thread that got it wants the GIL back first.  Its
 * slot is gone, so this is not seen by looking at slots. */
static void watch_stalled(struct round *round)
{
	struct au_engine *stuck = NULL;
	uint32_t index;

	if (!poisoned_and_waiting)
		return;
	poisoned_and_waiting = false;
	pthread_mutex_lock(&engines_lock);
	for (index = 0; index < engine_count; index++) {
		struct au_engine *engine = engines[index];

		if (engine->stall_stage < 2 || !atomic_load(&engine->rescue_wanted) ||
		    atomic_load(&engine->rescues) != engine->rescue_seen)
			continue;
		poisoned_and_waiting = round->blocked = true;
		if (round->now - engine->rescue_at > engine->stall_ns && !computes(engine, round))
			stuck = engine;
	}
	pthread_mutex_unlock(&engines_lock);
	if (stuck)
		give_up(stuck);
}

/* A thread whose page is there wants the GIL back, and does not get it: another one took
 * it in between, and may wait for a lock of C that the first one holds.  No slot tells. */
static void watch_regain(struct round *round)
{
	uint64_t done = au_handler_regained(), step, stall = UINT64_MAX;
	uint32_t index;

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
	pthread_mutex_lock(&engines_lock);
	for (index = 0; index < engine_count; index++)
		if (engines[index]->stall_ns < stall)
			stall = engines[index]->stall_ns;
	pthread_mutex_unlock(&engines_lock);
	if (regain.waited <= stall)
		return;
	if ((cpu_time() - regain.cpu) * 20 > regain.waited)
		regain.waited = 0; /* somebody computes with the GIL held */
	else
		give_up(NULL);
}

/* Verdicts are taken back when the fault was read once more: the thread may have left
 * the kernel, or have taken the GIL, and have come to the same page again. */
static bool reconsider(struct au_slot *slot, uint32_t word, enum au_slot_state state,
		       struct round *round)
{
	uint64_t age = round->now - atomic_load(&slot->born);
	uint64_t wait = state == AU_SLOT_KERNEL ? RECHECK_KERNEL_NS : RECHECK_NOGIL_NS;

	if ((state != AU_SLOT_KERNEL && state != AU_SLOT_NOGIL && state != AU_SLOT_MASKED) ||
	    !atomic_load(&slot->repeated) || age < wait)
		return false;
	au_slot_rearm(slot, word);
	round->undecided = true;
	return true;
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

/* Without the framework there is no rescue loop.  A loop that takes its time is its owner's
 * business; but one that waits for a page which only itself could bring waits for ever. */
static void look_after_raw(struct au_engine *engine, struct au_slot *slot, struct round *round,
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
static void look_after(struct au_engine *engine, struct au_slot *slot, struct round *round)
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

static void judge_slots(struct round *round)
{
	uint32_t index, high = au_slots_high();

	for (index = 0; index < high; index++) {
		struct au_slot *slot = au_slot_at(index);
		uint32_t word = atomic_load(&slot->word);
		struct au_engine *engine = atomic_load(&slot->engine);
		enum au_slot_state state = au_slot_state(word);

		if (state == AU_SLOT_FREE)
			continue;
		if (state == AU_SLOT_CLAIM || state == AU_SLOT_RESOLVING) {
			round->undecided = true;
			continue;
		}
		if (!hold(engine))
			continue;
		if ((pid_t)atomic_load(&slot->tid) == getpid() && state != AU_SLOT_ASKED) {
			round->main_engine = engine;
			round->main_page = atomic_load(&slot->page);
		}
		if (state == AU_SLOT_PENDING) {
			judge_pending(engine, slot, word, round);
			word = atomic_load(&slot->word);
			state = au_slot_state(word);
		}
		if (reconsider(slot, word, state, round)) {
			au_engine_leave(engine);
			continue;
		}
		if (state == AU_SLOT_YIELDED || state == AU_SLOT_NOGIL || state == AU_SLOT_KERNEL ||
		    state == AU_SLOT_FOREIGN || state == AU_SLOT_MASKED || state == AU_SLOT_ASKED ||
		    (state == AU_SLOT_PENDING &&
		     round->now - atomic_load(&slot->born) > engine->patience_ns))
			look_after(engine, slot, round);
		if ((state == AU_SLOT_FOREIGN || state == AU_SLOT_NOGIL || state == AU_SLOT_ASKED) &&
		    round->now - atomic_load(&slot->born) > LIVENESS_NS &&
		    !au_task_exists(atomic_load(&slot->tid)))
			au_slot_free(slot, word);
		au_engine_leave(engine);
	}
}

/* Messages that are still unread after a grace: read them unless a loop is at it. */
static void visit_engine(struct au_engine *engine, struct round *round)
{
	uint64_t drains;
	int64_t count;

	if (!hold(engine))
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

		if (!engine || !hold(engine))
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
static void watch_main(struct round *round)
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
	if (hold(round->main_engine)) {
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
		note(AU_NOTE_RENEWED, 0, address, 0);
		au_rescue_wake();
	}
}

static void *sentry_main(void *ignored)
{
	struct epoll_event events[EVENTS];
	struct round round = { 0 };
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
			judge_slots(&round);
		watch_main(&round);
		watch_stalled(&round);
		watch_regain(&round);
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
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = NULL };
	int result = 0, kick_fd, rescue_fd;

	pthread_mutex_lock(&start_lock);
	if (!started) {
		epoll_fd = epoll_create1(EPOLL_CLOEXEC);
		kick_fd = au_kick_open();
		rescue_fd = au_rescue_open();
		if (epoll_fd < 0 || kick_fd < 0 || rescue_fd < 0 ||
		    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, kick_fd, &event))
			result = -errno;
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
			close(epoll_fd);
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

int au_sentry_sees(void)
{
	uint64_t sp, pc;

	return locate(au_gettid(), &sp, &pc) == IN_KERNEL;
}

void au_sentry_forked(void)
{
	uint32_t index;

	for (index = 0; index < engine_count; index++)
		au_engine_forked(engines[index]);
	engine_count = 0;
	close(epoll_fd);
	au_kick_close();
	au_rescue_close();
	au_task_reserve(-1);
	epoll_fd = -1;
	started = poisoned_and_waiting = false;
	atomic_store(&note_head, atomic_load(&note_tail));
	memset(&au_shared, 0, sizeof au_shared);
	pthread_mutex_init(&engines_lock, NULL);
	pthread_mutex_init(&start_lock, NULL);
	memset(&regain, 0, sizeof regain);
	au_pagemap_forked();
	au_interrupt_forked();
	au_handler_forked();
	au_slots_reset();
	au_regions_forked();
	au_error_forked();
}
