/* The yield signal: its number, its handler, and its sending. */
#ifndef AU_HANDLER_H
#define AU_HANDLER_H

#include <stdbool.h>
#include <stdint.h>

/* Choose a free real-time signal and install the handler; again after somebody
 * replaced it.  0 or -errno. */
int au_handler_start(void);
/* The signal's number, 0 before the start. */
int au_handler_signal(void);
/* Is our handler still the one installed? */
bool au_handler_installed(void);
/* Send it to one thread of this process.  0 or -errno. */
int au_handler_send(uint32_t tid);

/* Threads that gave the GIL away and have not got it back; of them those whose page is
 * there, which want it back; and how often one got it. */
uint32_t au_handler_away(void);
uint32_t au_handler_wanting(void);
uint64_t au_handler_regained(void);
/* Is this thread in the handler now, where every signal is blocked?  And how often one entered. */
bool au_handler_inside(uint32_t tid);
uint64_t au_handler_entries(void);
/* In a forked child. */
void au_handler_forked(void);

#endif
