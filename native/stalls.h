/* Nobody comes: a loop that does not answer, a rescue that nobody takes, a GIL that nobody gives back.
 *
 * What helps is tried in turn: the rescue loop, asking all that wait once more, an error for those that
 * wait, and in the end the process says that it is stuck and ends.
 */
#ifndef AU_STALLS_H
#define AU_STALLS_H

#include "engine.h"
#include "slots.h"

#include <stdbool.h>
#include <stdint.h>

/* One round of the sentry. */
/* ---------------------------------------------------------------- a round */

struct au_round {
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

/* A thread waits and nothing is wrong with it: is somebody coming? */
void au_look_after(struct au_engine *engine, struct au_slot *slot, struct au_round *round);
/* After an error that was given because nothing moved: did it help? */
void au_stalls_watch(struct au_round *round);
/* Threads that want the GIL back: does any get it? */
void au_stalls_watch_gil(struct au_round *round);
/* In a forked child. */
void au_stalls_forked(void);

#endif
