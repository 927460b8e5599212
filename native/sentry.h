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

#include <stdbool.h>
#include <stdint.h>

struct au_engine;

/* What the sentry wants logged, by somebody who can. */
enum au_note_kind {
	AU_NOTE_STALL_POISON = 1, /* a toucher got an error because nothing moved */
	AU_NOTE_MASKED = 2,       /* our signal is blocked in a waiting thread */
	AU_NOTE_LOOP_STUCK = 3,   /* a loop did not answer; the rescue loop serves */
	AU_NOTE_SELF_TOUCH = 4,   /* the loop's own thread touched */
	AU_NOTE_RENEWED = 5,      /* memory that the hardware had lost is fetched again */
};
struct au_note {
	uint32_t kind;
	uint32_t tid;
	uint64_t address;
	uint64_t waited_ns;
};

/* Start the sentry thread and the signal handlers; once per process.  0 or -errno. */
int au_sentry_start(void);
int au_sentry_add(struct au_engine *engine);
void au_sentry_remove(struct au_engine *engine);
/* 1 if the sentry can see where threads of this process wait.  It cannot in a process that is
 * not dumpable because it has changed its user. */
int au_sentry_sees(void);
/* Take one note; 0 when there is none. */
int au_sentry_take_note(struct au_note *note);

void au_sentry_forked(void);

#endif
