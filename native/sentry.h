/* The sentry: one native thread that looks after threads which wait too long.
 *
 * It needs no GIL, has every signal blocked, and uses neither malloc nor stdio, so
 * whatever a waiting thread holds, the sentry can move.  It blocks in epoll on all
 * engines; after a wake-up it sleeps for a grace and then acts on what is still
 * undecided:
 *
 *  - messages that no loop has read are read, their slots made, the loop notified;
 *  - a thread that waits in user mode and may hold the GIL gets the yield signal;
 *  - a loop that does not answer is given up for the rescue loop;
 *  - when even that does not move, the page is poisoned: an error, not a hang.
 *
 * While loops keep up it only counts their drains and stretches its grace.
 */
#ifndef AU_SENTRY_H
#define AU_SENTRY_H

/* Start the sentry thread and the signal handlers; once per process.  0 or -errno. */
int au_sentry_start(void);
/* In a forked child, where it does not run; for the whole core. */
void au_sentry_forked(void);

#endif
