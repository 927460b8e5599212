/* Ctrl-C while the main thread waits for a page. */
#ifndef AU_INTERRUPT_H
#define AU_INTERRUPT_H

#include <stdbool.h>
#include <stdint.h>

/* From the sentry, each round: does the main thread wait now? */
void au_interrupt_watch(bool main_waits, uint64_t now);

#endif
