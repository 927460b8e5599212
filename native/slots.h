/* Slots: one per thread that waits for a page, the meeting point of the
 * reader, the sentry, the installer and the signal handler.
 *
 * The state is one 32-bit word (generation and state) so that it is a futex and
 * every transition is one compare-and-swap of everything that matters:
 *
 *	FREE -> CLAIM -> PENDING      the reader, in the call that read the message
 *	PENDING -> YIELDED            the handler, on the thread itself: GIL given away
 *	PENDING -> NOGIL | KERNEL | FOREIGN | MASKED   the sentry or handler: no signal (any more)
 *	PENDING -> RESOLVING          the installer, before its ioctl: too late to yield
 *	RESOLVING -> PENDING          the installer, when its ioctl failed
 *	NOGIL | KERNEL | MASKED -> PENDING   the sentry, when the fault was read again
 *	YIELDED -> PENDING            the handler, which gives way to another signal
 *	anything but CLAIM -> FREE    the installer, when the page is there
 *	CLAIM -> ASKED                a thread that asks for a page instead of touching it (demand.h)
 *
 * A thread can wait for one page at a time, so a slot is found by thread id.
 * Taking a slot is under a lock that no signal handler takes; everything else is
 * lock-free.  The table grows by mmap, never by malloc: a thread in fork() may
 * hold malloc's locks while it waits for us.
 */
#ifndef AU_SLOTS_H
#define AU_SLOTS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum au_slot_state {
	AU_SLOT_FREE,
	AU_SLOT_CLAIM,
	AU_SLOT_PENDING,
	AU_SLOT_YIELDED,
	AU_SLOT_NOGIL,
	AU_SLOT_KERNEL,
	AU_SLOT_RESOLVING,
	AU_SLOT_FOREIGN,
	AU_SLOT_MASKED,
	AU_SLOT_ASKED, /* its thread waits on the word, has not touched and needs no signal */
	AU_SLOT_STATES
};

#define AU_SLOT_STATE_BITS 4
#define AU_SLOT_STATE_MASK ((1U << AU_SLOT_STATE_BITS) - 1)

struct au_engine;

struct au_slot {
	_Atomic uint32_t word;
	_Atomic uint32_t tid;
	_Atomic(struct au_engine *) engine;
	_Atomic uint64_t page;  /* address of the page, aligned to the region's page size */
	_Atomic uint64_t page_size;
	_Atomic uint64_t epoch; /* the engine's install epoch before the message was read */
	/* Order of creation, for the proof by GIL ownership; AU_SLOT_UNPROVABLE once its
	 * thread has given the GIL away and taken it back. */
	_Atomic uint64_t sequence;
	_Atomic uint64_t told_at;  /* when the fault was last handed on, ns */
	_Atomic uint64_t born;     /* when it was published or last re-armed, ns */
	_Atomic uint64_t signalled_at; /* ns; 0: no signal outstanding */
	_Atomic uint64_t sp, pc;       /* where the thread was when the signal was sent */
	_Atomic uint32_t signals;      /* sent for this fault */
	_Atomic uint32_t reported;     /* rescue asked for */
	/* How often the same fault was read again, but for the repetition that our own
	 * signal causes. */
	_Atomic uint32_t repeated;
};

#define AU_SLOT_UNPROVABLE UINT64_MAX

static inline enum au_slot_state au_slot_state(uint32_t word)
{
	return (enum au_slot_state)(word & AU_SLOT_STATE_MASK);
}

/* Whether the protocol has such a step: slots.c has the table. */
bool au_slot_may(enum au_slot_state from, enum au_slot_state to);
/* Move `slot` from exactly `word` to `state`, keeping the generation. */
bool au_slot_move(struct au_slot *slot, uint32_t word, enum au_slot_state state);

/* Get a slot for a fault just read, in state CLAIM, or NULL: the thread has one for this very
 * fault already, or the table is full.  *duplicate tells that the fault was handed on a
 * moment ago; after a longer time it may be a new one on the same page.  Fields are filled;
 * au_slot_publish makes it PENDING, with a full fence behind it,
 * and returns the word, whose generation tells this use of the slot from later ones. */
struct au_slot *au_slot_claim(struct au_engine *engine, uint32_t tid, uint64_t page,
			      uint64_t page_size, uint64_t epoch, bool *duplicate);
uint32_t au_slot_publish(struct au_slot *slot);
/* The same for a thread that has not touched: ASKED instead of PENDING. */
uint32_t au_slot_publish_asked(struct au_slot *slot);

/* Free `slot` if its word is still `word`; wakes a thread that sleeps on it. */
bool au_slot_free(struct au_slot *slot, uint32_t word);

/* Free the use of `slot` that `published` is from, whatever its state by now. */
void au_slot_withdraw(struct au_slot *slot, uint32_t published);
/* Ask again about a slot that had its verdict. */
void au_slot_rearm(struct au_slot *slot, uint32_t word);

/* Installer: around the ioctl that resolves [start, end). */
void au_slots_begin(struct au_engine *engine, uint64_t start, uint64_t end);
void au_slots_abort(struct au_engine *engine, uint64_t start, uint64_t end);
/* Returns true when a slot was found that may stand for a fault younger than the ioctl
 * (made, or met by a repeated message, meanwhile): the range has to be woken once more. */
bool au_slots_end(struct au_engine *engine, uint64_t start, uint64_t end);

/* Free the slots of threads that asked for a page of [start, end), which then look again. */
void au_slots_dismiss(struct au_engine *engine, uint64_t start, uint64_t end);

/* Free all slots of an engine (close). */
void au_slots_drop_engine(struct au_engine *engine);
/* True while a slot other than FREE refers to [start, end). */
bool au_slots_refer(struct au_engine *engine, uint64_t start, uint64_t end);

/* Iteration: slots 0 .. au_slots_high()-1 exist; any of them may be FREE. */
uint32_t au_slots_high(void);
struct au_slot *au_slot_at(uint32_t index);
/* Slots that are not FREE. */
uint32_t au_slots_live(void);
/* Number of slots made so far; a slot with a sequence at or below it exists. */
uint64_t au_slots_sequence(void);

/* The waiting slot of this thread in state PENDING, or NULL.  Async-signal-safe. */
struct au_slot *au_slot_pending_of(uint32_t tid);

/* In a forked child: no slots. */
void au_slots_reset(void);

#endif
