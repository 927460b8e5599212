/* Reading messages and serving them as far as that needs no Python.
 *
 * au_engine_drain is the one native call that an event loop makes per wake-up: it
 * reads every message, folds duplicates, makes the slots of waiting threads, and
 * returns only what needs Python: blocks that nobody fetches yet.  The sentry
 * (sentry.h) calls the same code without the GIL when no loop comes.
 */
#ifndef AU_PUMP_H
#define AU_PUMP_H

#include "engine.h"
#include "region.h"

#include <stdint.h>

enum au_drain_role {
	AU_DRAIN_LOOP = 0,
	AU_DRAIN_RESCUE = 1,
};

/* Read all messages; store at most `max` entries.  Returns the count (call again
 * when it equals max) or -errno. */
int64_t au_engine_drain(struct au_engine *engine, struct au_entry *out, int64_t max, int role);

/* As if a message about `page` of an open region had been read, from a thread that has not
 * touched it: whoever serves is told.  Bytes at hand are there afterwards.  0 or -errno. */
int au_engine_ask(struct au_region *region, uint64_t page);

/* The same when no loop comes: what is for Python is queued.  Messages taken off the descriptor, or
 * -errno. */
int64_t au_engine_pump(struct au_engine *engine);

#endif
