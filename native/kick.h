/* Waking the sentry, and what Python and the sentry tell each other. */
#ifndef AU_KICK_H
#define AU_KICK_H

#include <stdbool.h>
#include <stdint.h>

/* What Python and the sentry tell each other.  Python writes `proof` while it holds
 * the GIL: any thread whose slot is not newer waits without the GIL, for the writer has it.
 * (FREE-THREADING: that proves nothing.) */
struct au_shared {
	uint64_t proof;
	uint64_t sequence; /* of the newest slot, refreshed by each drain */
	uint32_t exiting;  /* the interpreter ends */
	uint32_t stalled;  /* stalls so far */
};
extern struct au_shared au_shared;

/* A slot was made: make sure the sentry looks. */
void au_sentry_kick(void);

/* For the sentry: the descriptor of an eventfd that becomes readable by a kick, or -1 with errno. */
int au_kick_open(void);
/* Also in a forked child. */
void au_kick_close(void);
void au_kick_drain(void);
/* The sentry is about to sleep, or sleeps no more.  A full fence is behind it. */
void au_kick_wanted(bool wanted);

#endif
