/* The engine: one userfaultfd, its regions, and the path of a message.
 *
 * au_engine_drain is the one native call that an event loop makes per wake-up: it
 * reads every message, folds duplicates, makes the slots of waiting threads, and
 * returns only what needs Python: blocks that nobody fetches yet.  The sentry
 * (sentry.h) calls the same code without the GIL when no loop comes.
 *
 * Locks: `lock` serialises read-and-apply, the queue and the list of regions.  It
 * is never held across an ioctl that installs, nor across malloc: a thread that
 * waits in fork() for its event to be read may hold malloc's locks.
 */
#ifndef AU_ENGINE_H
#define AU_ENGINE_H

#include "region.h"
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

enum au_drain_role {
	AU_DRAIN_LOOP = 0,
	AU_DRAIN_RESCUE = 1,
};

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

/* Engine for descriptor `fd`, which stays the caller's to close after au_engine_close. */
struct au_engine *au_engine_create(int fd, int options, int *error);
void au_engine_close(struct au_engine *engine);
void au_engine_free(struct au_engine *engine);
/* The thread that runs the loop (0: none just now). */
void au_engine_set_loop(struct au_engine *engine, uint32_t tid);
void au_engine_set_times(struct au_engine *engine, uint64_t grace_ns, uint64_t patience_ns,
			 uint64_t stall_ns);

/* Read all messages; store at most `max` entries.  Returns the count (call again
 * when it equals max) or -errno. */
int64_t au_engine_drain(struct au_engine *engine, struct au_entry *out, int64_t max, int role);

/* Pages of this engine that threads wait for now: at most max.  Returns the count. */
int64_t au_engine_blocked(struct au_engine *engine, uint64_t *pages, uint32_t *tids, int64_t max);

/* As if a message about `page` of an open region had been read, from a thread that has not
 * touched it: whoever serves is told.  Bytes at hand are there afterwards.  0 or -errno. */
int au_engine_ask(struct au_region *region, uint64_t page);

/* Call the contents of a region by a name, which is cut where it is too long; and find the name,
 * of AU_REGION_NAME bytes at most, and the offset for the address of a page: false if there is none. */
void au_engine_name(struct au_region *region, const char *name);
bool au_engine_describe(struct au_engine *engine, uint64_t page, char *name, uint64_t *offset);

/* Operations on an engine without regions: `op` of enum au_op over [start, start+length),
 * with the slots kept in step.  *done as in abi.h. */
enum au_op {
	AU_OP_COPY,
	AU_OP_ZERO,
	AU_OP_POISON,
	AU_OP_CONTINUE,
	AU_OP_MOVE,
	AU_OP_WRITEPROTECT,
	AU_OP_RWPROTECT,
	AU_OP_WAKE,
};
int au_engine_resolve(struct au_engine *engine, int op, uint64_t start, uint64_t source,
		      uint64_t length, uint64_t mode, int64_t *done);

/* Install into a region: [offset, offset+length), whole pages, or up to object_length.
 * `src` is read for AU_OP_COPY only.  Pages already there are skipped; with
 * `over_poison` poisoned ones are healed.  `generation` is compared with that of the
 * first block unless it is UINT64_MAX.  Returns the bytes that are settled from
 * `offset` on; *error is 0 or a positive errno telling why it is not all:
 * EAGAIN (try again later), ESTALE (the generation moved), or what the kernel said. */
int64_t au_region_install(struct au_region *region, int op, uint64_t offset, const void *src,
			  uint64_t length, int over_poison, uint64_t generation, int *error);

/* The same in one value, for callers that pay for each argument: the bytes settled, or
 * when that is not all, -1 - (settled << 8 | errno). */
int64_t au_region_put(struct au_region *region, int op, uint64_t offset, const uint8_t *src,
		      uint64_t length, int over_poison, uint64_t generation);

/* The bytes of `page` are in the page cache and its mapping went: map it, and what else went of its
 * block, and wake.  The region is entered.  Whoever waits for what cannot be had faults again. */
void au_region_map_again(struct au_region *region, uint64_t page);

/* For the sentry. */
bool au_engine_enter(struct au_engine *engine);
void au_engine_leave(struct au_engine *engine);
int64_t au_engine_pump(struct au_engine *engine); /* messages taken off the descriptor */
/* The same for a thread that has pages under way itself: it installs nothing, for it could
 * wait for its own pages, or for those of a thread that waits for them. */
int64_t au_engine_pump_only(struct au_engine *engine);
void au_engine_notify(struct au_engine *engine);
void au_engine_poison_page(struct au_engine *engine, uint64_t page, uint64_t page_size);
void au_engine_forked(struct au_engine *engine);
/* For region.c. */
int au_engine_add_region(struct au_engine *engine, struct au_region *region);
void au_engine_remove_region(struct au_engine *engine, struct au_region *region);

#endif
