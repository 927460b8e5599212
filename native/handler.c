/* What a thread does when the sentry asks whether it may wait without the GIL.
 *
 * A user-mode fault sleeps interruptibly: the signal's handler runs on the waiting
 * thread at the very instruction that faulted, and the instruction is repeated
 * afterwards.  For the interrupted C code it is as if it had released the GIL
 * around its memory access.
 *
 * The handler takes no lock, allocates nothing and keeps errno.  It gives the GIL
 * away only if program counter and stack pointer are those that the sentry saw on
 * the waiting thread: a late signal meets other values and does nothing.
 *
 * While it waits every signal is blocked (one that ran here would run without the
 * GIL at a place that does not expect it), so it waits in slices and gives way
 * when one is due: the GIL is taken back, the handler returns, the other signal is
 * delivered, the instruction faults again and the sentry starts over.
 */
#include "handler.h"

#include "counters.h"
#include "gil.h"
#include "slots.h"
#include "sys.h"
#include "task.h"

#include <signal.h>
#include <string.h>
#include <ucontext.h>

#define SLICE_NS (50 * AU_NS_PER_MS)

static _Atomic int chosen;
static struct sigaction previous;
static _Atomic pid_t owner;
static _Atomic uint32_t away, wanting;
static _Atomic uint64_t regained;
/* The threads that are in the handler; those for which there was no place are only counted. */
#define PLACES 1024U
static _Atomic uint32_t inside[PLACES], unlisted;
static _Atomic uint64_t entries;

static void where(const ucontext_t *context, uint64_t *sp, uint64_t *pc)
{
#if defined(__x86_64__)
	*sp = (uint64_t)context->uc_mcontext.gregs[REG_RSP];
	*pc = (uint64_t)context->uc_mcontext.gregs[REG_RIP];
#elif defined(__aarch64__)
	*sp = context->uc_mcontext.sp;
	*pc = context->uc_mcontext.pc;
#else
#error "the GIL yield needs the stack pointer and program counter of this architecture"
#endif
}

/* Is there a signal for this thread to take, which it had not blocked?
 *
 * One that was sent to the process is for whichever thread comes first.  The kernel wakes the main
 * thread for it, where that thread does not block it, and programs count on that: with pause(), which
 * goes on sleeping if another thread was quicker.  So others leave it to the main thread. */
static bool other_signal_due(const sigset_t *unblocked_before)
{
	uint32_t tid = au_gettid(), main = (uint32_t)getpid();
	struct au_task_signals signals;
	uint64_t wanted = 0;
	sigset_t pending;
	int number;

	if (sigpending(&pending))
		return false;
	for (number = 1; number < 65; number++)
		if (number != atomic_load(&chosen) && sigismember(&pending, number) == 1 &&
		    sigismember(unblocked_before, number) == 0)
			wanted |= au_signal_bit(number);
	if (!wanted)
		return false;
	if (tid == main || au_task_signals(tid, &signals) || (wanted & signals.pending))
		return true;
	/* Both sets as of one moment: while it runs a handler the main thread blocks its signal. */
	return au_task_signals(main, &signals) || (wanted & signals.shared & signals.blocked);
}

static void wait_without_gil(struct au_slot *slot, uint32_t yielded, const sigset_t *mask)
{
	while (atomic_load(&slot->word) == yielded) {
		au_futex_wait(&slot->word, yielded, SLICE_NS);
		if (atomic_load(&slot->word) != yielded)
			return;
		if (!other_signal_due(mask))
			continue;
		/* The thread will hold the GIL when it faults again, which the order of
		 * its slot's creation says nothing about. */
		au_slot_rearm(slot, yielded);
		if (atomic_load(&slot->word) != yielded) {
			au_count(AU_COUNT_yields_given_way, 1);
			return;
		}
	}
}

static void consider(struct au_slot *slot, const ucontext_t *context)
{
	uint32_t word = atomic_load(&slot->word), yielded;
	uint64_t sp, pc;
	void *token;

	if (au_slot_state(word) != AU_SLOT_PENDING)
		return;
	where(context, &sp, &pc);
	if (sp != atomic_load(&slot->sp) || pc != atomic_load(&slot->pc)) {
		au_count(AU_COUNT_signals_stale, 1);
		atomic_store(&slot->signalled_at, 0);
		return;
	}
	if (!au_gil_mine()) {
		if (au_slot_move(slot, word, AU_SLOT_NOGIL)) {
			/* The repetition that this signal causes tells nothing new. */
			atomic_store(&slot->repeated, UINT32_MAX);
			au_count(AU_COUNT_verdict_nogil, 1);
		}
		return;
	}
	if (!au_slot_move(slot, word, AU_SLOT_YIELDED)) {
		/* The page is on its way; should it fail, ask again. */
		atomic_store(&slot->signalled_at, 0);
		return;
	}
	yielded = (word & ~AU_SLOT_STATE_MASK) | AU_SLOT_YIELDED;
	au_count(AU_COUNT_yields, 1);
	atomic_fetch_add(&away, 1);
	token = au_gil_release();
	wait_without_gil(slot, yielded, &context->uc_sigmask);
	atomic_fetch_add(&wanting, 1);
	au_gil_take(token);
	atomic_fetch_add(&regained, 1);
	atomic_fetch_sub(&wanting, 1);
	atomic_fetch_sub(&away, 1);
}

static _Atomic uint32_t *enter(uint32_t tid)
{
	uint32_t index, nobody;

	atomic_fetch_add(&entries, 1);
	for (index = 0; index < PLACES; index++) {
		_Atomic uint32_t *place = &inside[(tid + index) % PLACES];

		nobody = 0;
		if (atomic_compare_exchange_strong(place, &nobody, tid))
			return place;
	}
	atomic_fetch_add(&unlisted, 1);
	return NULL;
}

static void leave(_Atomic uint32_t *place)
{
	if (place)
		atomic_store(place, 0);
	else
		atomic_fetch_sub(&unlisted, 1);
}

bool au_handler_inside(uint32_t tid)
{
	uint32_t index;

	if (atomic_load(&unlisted))
		return true; /* it may be */
	for (index = 0; index < PLACES; index++)
		if (atomic_load(&inside[index]) == tid)
			return true;
	return false;
}

uint64_t au_handler_entries(void)
{
	return atomic_load(&entries);
}

static void on_signal(int number, siginfo_t *info, void *context)
{
	int saved = errno;
	_Atomic uint32_t *place;
	struct au_slot *slot;
	uint32_t tid;

	if (info->si_code != SI_QUEUE || info->si_pid != getpid() ||
	    info->si_value.sival_ptr != &chosen || atomic_load(&owner) != getpid()) {
		/* Not ours: whoever had the signal before gets it. */
		if (previous.sa_flags & SA_SIGINFO)
			previous.sa_sigaction(number, info, context);
		else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN)
			previous.sa_handler(number);
	} else {
		tid = au_gettid();
		place = enter(tid);
		slot = au_slot_pending_of(tid);
		if (slot)
			consider(slot, context);
		else
			au_count(AU_COUNT_signals_stale, 1);
		leave(place);
	}
	errno = saved;
}

static int install(int number)
{
	struct sigaction action;

	memset(&action, 0, sizeof action);
	action.sa_sigaction = on_signal;
	/* No SA_ONSTACK: the GIL may stay away for long, and the alternate stack is one. */
	action.sa_flags = SA_SIGINFO | SA_RESTART;
	sigfillset(&action.sa_mask);
	if (sigaction(number, &action, &previous))
		return -errno;
	if ((previous.sa_flags & SA_SIGINFO) && previous.sa_sigaction == on_signal)
		memset(&previous, 0, sizeof previous);
	atomic_store(&owner, getpid());
	atomic_store(&chosen, number);
	return 0;
}

int au_handler_start(void)
{
	struct sigaction present;
	int number;

	/* From the middle: glibc keeps the first ones, debuggers and profilers take
	 * SIGRTMIN and SIGRTMAX. */
	for (number = SIGRTMIN + 5; number < SIGRTMAX; number++) {
		if (sigaction(number, NULL, &present))
			continue;
		if (!(present.sa_flags & SA_SIGINFO) && present.sa_handler == SIG_DFL)
			return install(number);
		if ((present.sa_flags & SA_SIGINFO) && present.sa_sigaction == on_signal)
			return install(number);
	}
	return install(SIGRTMIN + 5);
}

uint32_t au_handler_away(void)
{
	return atomic_load(&away);
}

uint32_t au_handler_wanting(void)
{
	return atomic_load(&wanting);
}

uint64_t au_handler_regained(void)
{
	return atomic_load(&regained);
}

void au_handler_forked(void)
{
	uint32_t index;

	atomic_store(&away, 0);
	atomic_store(&wanting, 0);
	atomic_store(&unlisted, 0);
	for (index = 0; index < PLACES; index++)
		atomic_store(&inside[index], 0);
}

int au_handler_signal(void)
{
	return atomic_load(&chosen);
}

bool au_handler_installed(void)
{
	struct sigaction present;

	return sigaction(atomic_load(&chosen), NULL, &present) == 0 &&
	       (present.sa_flags & SA_SIGINFO) && present.sa_sigaction == on_signal;
}

int au_handler_send(uint32_t tid)
{
	siginfo_t info;

	/* Somebody may have reset the signal, whose default is death, or taken it over. */
	if (!au_handler_installed())
		au_handler_start();
	memset(&info, 0, sizeof info);
	info.si_signo = atomic_load(&chosen);
	info.si_code = SI_QUEUE;
	info.si_pid = getpid();
	info.si_uid = getuid();
	info.si_value.sival_ptr = &chosen; /* tells ours from those of a neighbour */
	au_count(AU_COUNT_signals, 1);
	return syscall(SYS_rt_tgsigqueueinfo, getpid(), tid, info.si_signo, &info) ? -errno : 0;
}
