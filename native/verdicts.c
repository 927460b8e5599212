#include "verdicts.h"

#include "abi.h"
#include "counters.h"
#include "engine.h"
#include "gil.h"
#include "handler.h"
#include "kick.h"
#include "notes.h"
#include "slots.h"
#include "sys.h"
#include "task.h"
#include "watched.h"
#include "where.h"

#include <errno.h>
#include <sys/types.h>
#include <unistd.h>

/* A signal that has not been answered for so long is looked into. */
#define UNANSWERED_NS (20 * AU_NS_PER_MS)
/* How soon a verdict is taken back after the same fault was read again. */
#define RECHECK_KERNEL_NS (2 * AU_NS_PER_MS)
#define RECHECK_NOGIL_NS (100 * AU_NS_PER_MS)
#define LIVENESS_NS AU_NS_PER_S
#define MAX_SIGNALS 2

static void judge_signalled(struct au_slot *slot, uint32_t word, struct au_round *round)
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
	if (au_where_blocked(tid)) {
		if (au_slot_move(slot, word, AU_SLOT_MASKED))
			au_note_down(AU_NOTE_MASKED, tid, atomic_load(&slot->page),
				     round->now - atomic_load(&slot->born));
		return;
	}
	/* Stopped, traced, or the signal met the slot in another state: ask again. */
	atomic_store(&slot->signalled_at, 0);
}

static void judge_pending(struct au_engine *engine, struct au_slot *slot, uint32_t word,
			  struct au_round *round)
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
	switch (au_where(tid, &sp, &pc)) {
	case AU_WHERE_GONE:
		/* Not a thread of ours: another process that reads our memory, a
		 * kernel worker, or a thread that has ended. */
		if (au_slot_move(slot, word, AU_SLOT_FOREIGN))
			au_count(AU_COUNT_verdict_foreign, 1);
		return;
	case AU_WHERE_IN_KERNEL:
		if (au_slot_move(slot, word, AU_SLOT_KERNEL))
			au_count(AU_COUNT_verdict_kernel, 1);
		return;
	case AU_WHERE_RUNNING:
		/* Or it cannot be seen: then look_after brings it to an end. */
		round->undecided |= round->now - born < UNANSWERED_NS;
		return;
	case AU_WHERE_IN_USER:
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

/* Verdicts are taken back when the fault was read once more: the thread may have left
 * the kernel, or have taken the GIL, and have come to the same page again. */
static bool reconsider(struct au_slot *slot, uint32_t word, enum au_slot_state state,
		       struct au_round *round)
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

void au_judge_slots(struct au_round *round)
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
		if (!au_watched_hold(engine))
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
			au_look_after(engine, slot, round);
		if ((state == AU_SLOT_FOREIGN || state == AU_SLOT_NOGIL || state == AU_SLOT_ASKED) &&
		    round->now - atomic_load(&slot->born) > LIVENESS_NS &&
		    !au_task_exists(atomic_load(&slot->tid)))
			au_slot_free(slot, word);
		au_engine_leave(engine);
	}
}
