/* Calling the rescue loop: a second event loop, in Python, that serves when a loop does not answer. */
#ifndef AU_RESCUE_H
#define AU_RESCUE_H

#include <stdbool.h>

struct au_engine;

/* Wait, without the GIL, until the rescue loop is wanted; 1 wanted, 0 timeout. */
int au_rescue_wait(int timeout_ms);
int au_rescue_fd(void);
/* Engines wanting rescue: returns 1 and clears the wish if this one does. */
int au_rescue_take(struct au_engine *engine);
void au_rescue_wake(void);

/* For the sentry: the eventfd behind it, or -1 with errno. */
int au_rescue_open(void);
/* Also in a forked child. */
void au_rescue_close(void);
/* Has anybody ever listened? */
bool au_rescue_watched(void);

#endif
