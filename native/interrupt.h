/* Ctrl-C while the main thread waits for a page that it has touched. */
#ifndef AU_INTERRUPT_H
#define AU_INTERRUPT_H

#include <stdbool.h>
#include <stdint.h>

/* Python's own handler of SIGINT: the only one that this is about. */
void au_interrupt_know(void (*handler)(int));
/* From the sentry, each round: does the main thread wait now?  True when au_interrupt_say should
 * be called, after the first interrupt.  The second ends the process. */
bool au_interrupt_watch(bool main_waits, uint64_t now);
/* Tell on stderr what is waited for: byte `offset` of `name`, or if that is NULL the address. */
void au_interrupt_say(const char *name, uint64_t offset, uint64_t waited_ns);
/* In a forked child. */
void au_interrupt_forked(void);

#endif
