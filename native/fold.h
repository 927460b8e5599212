/* From messages to what is to be done about them: duplicates are folded, the slots of waiting threads
 * made, and what needs Python queued, or handed to who asks.
 */
#ifndef AU_FOLD_H
#define AU_FOLD_H

#include "engine.h"
#include "region.h"
#include "uapi.h"

#include <stdbool.h>
#include <stdint.h>

#define AU_BATCH 64

/* Bytes at hand: what the fold found that needs no Python. */
struct au_at_hand {
	struct au_region *region;
	int op;
	uint64_t offset, length;
};

/* Where folded messages go: the caller's array, or the queue. */
struct au_sink {
	struct au_entry *out;
	int64_t count, max;
	struct au_at_hand hands[AU_BATCH];
	int hand_count;
	bool queued;
	bool slots_made;
	bool news;
};

/* Read one batch.  With the engine's lock held.  Returns messages read, or -errno. */
int64_t au_fold_batch(struct au_engine *engine, struct au_sink *sink, int64_t room);
/* Fold a fault on `page`, which was missing a moment ago.  False when it was settled meanwhile: look
 * at its state again.  With the engine's lock held. */
bool au_fold_missing(struct au_engine *engine, struct au_sink *sink, struct au_region *region,
		     uint64_t page, const struct au_uffd_msg *message);
/* Have room in the queue for a batch.  With the engine's lock held. */
bool au_fold_room(struct au_engine *engine);
/* Note whether a batch held more than duplicates.  With the engine's lock held; read without it. */
void au_fold_flood(struct au_engine *engine, bool news);

/* What becomes of the bytes at hand.  Without the lock. */
typedef void au_settle(struct au_engine *engine, struct au_sink *sink);
/* Read all messages, queue what is for Python, and settle the rest.  Messages read, or -errno. */
int64_t au_fold_all(struct au_engine *engine, au_settle *settle);
/* That for a thread that has pages under way itself: it installs nothing, for it could
 * wait for its own pages, or for those of a thread that waits for them. */
int64_t au_engine_pump_only(struct au_engine *engine);

/* Have everybody who waits for the range fault afresh: in the kernel, or having yielded. */
void au_engine_let_go(struct au_engine *engine, uint64_t start, uint64_t length);

#endif
