/* What the sentry wants logged, by somebody who can. */
#ifndef AU_NOTES_H
#define AU_NOTES_H

#include <stdint.h>

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

/* Take one note; 0 when there is none. */
int au_sentry_take_note(struct au_note *note);

/* The sentry takes a note, which is lost when too many have not been taken. */
void au_note_down(enum au_note_kind kind, uint32_t tid, uint64_t address, uint64_t waited_ns);
/* In a forked child: no notes. */
void au_notes_forked(void);

#endif
