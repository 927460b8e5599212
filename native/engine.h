/* The engine: one userfaultfd, and what is known of it.
 *
 * Locks: `lock` serialises read-and-apply, the queue and the list of regions.  It
 * is never held across an ioctl that installs, nor across malloc: a thread that
 * waits in fork() for its event to be read may hold malloc's locks.
 */
#ifndef AU_ENGINE_H
#define AU_ENGINE_H

#include "uapi.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum au_entry_kind {
	AU_ENTRY_MISS = 1,  /* a block nobody fetches: now owned by whoever drained it */
	AU_ENTRY_HIT = 2,   /* first touch of a block in flight */
	AU_ENTRY_EVENT = 3, /* any other message of an engine with regions */
	AU_ENTRY_RAW = 4,   /* a message of an engine without regions */
};

struct au_entry {
	uint32_t kind;
	uint32_t region;
	uint64_t block;
	uint32_t generation;
	uint32_t thread;
	struct au_uffd_msg message;
};

enum au_engine_option {
	AU_ENGINE_RAW = 1,   /* no page table: messages are handed on as they come */
	AU_ENGINE_OWN = 2,   /* the descriptor watches this process's own memory */
	AU_ENGINE_YIELD = 4, /* threads that wait with the GIL give it away */
	AU_ENGINE_REMAPS = 8, /* the descriptor tells of moved mappings: errors can heal */
};

struct au_region;

struct au_engine {
	int fd;
	int notify_fd;    /* eventfd: the sentry has queued something, or asks for a sign of life */
	uint32_t options;
	uint64_t grace_ns;    /* before the sentry acts */
	uint64_t patience_ns; /* before a loop counts as stuck */
	uint64_t stall_ns;    /* before a toucher that nothing can serve gets an error */

	/* Shared with Python, which reads and writes them while it holds the GIL. */
	uint32_t flood;       /* batches in a row that held duplicates only */
	uint32_t stuck;       /* the loop does not answer; the rescue loop serves */
	uint32_t urgent;      /* regions served from bytes at hand: the sentry does not wait */

	_Atomic uint32_t loop_tid; /* thread that runs the loop, 0 if none */
	_Atomic uint64_t epoch;    /* counts installs and removals */
	_Atomic uint64_t drains;   /* by the loop */
	_Atomic uint64_t rescues;  /* drains by the rescue loop */
	_Atomic uint32_t notified;
	_Atomic uint32_t users;
	_Atomic uint32_t closing;
	_Atomic uint32_t rescue_wanted;

	pthread_mutex_t lock;
	struct au_region **regions; /* by address */
	uint32_t region_count;
	uint32_t region_capacity;
	uint32_t next_region;
	struct au_entry *queue;
	uint64_t queue_capacity, queue_head, queue_tail;
	uint32_t page_size;

	/* The sentry's own notes. */
	uint64_t seen_drains;
	uint64_t ping_at, ping_drains;
	uint64_t rescue_at, rescue_seen, wanted_at;
	uint64_t ping_wait;
	uint32_t stall_stage;
	uint64_t stall_cpu;
	struct au_engine *next;
};

/* The thread that runs the loop (0: none just now). */
void au_engine_set_loop(struct au_engine *engine, uint32_t tid);
void au_engine_set_times(struct au_engine *engine, uint64_t grace_ns, uint64_t patience_ns,
			 uint64_t stall_ns);

/* Pages of this engine that threads wait for now: at most max.  Returns the count. */
int64_t au_engine_blocked(struct au_engine *engine, uint64_t *pages, uint32_t *tids, int64_t max);

/* Operations on an engine without regions: `op` of enum au_op over [start, start+length),
 * with the slots kept in step.  *done as in abi.h. */
int au_engine_resolve(struct au_engine *engine, int op, uint64_t start, uint64_t source,
		      uint64_t length, uint64_t mode, int64_t *done);

/* A reference while something is under way; false: it closes. */
bool au_engine_enter(struct au_engine *engine);
void au_engine_leave(struct au_engine *engine);
/* Wake the loop. */
void au_engine_notify(struct au_engine *engine);

#endif
