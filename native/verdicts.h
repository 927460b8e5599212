/* What becomes of a thread that waits: whether it may hold the GIL, and so gets the yield signal, or why
 * not.  A verdict is taken back when the same fault is read again.
 */
#ifndef AU_VERDICTS_H
#define AU_VERDICTS_H

#include "stalls.h"

/* Judge all that wait, and look after them. */
void au_judge_slots(struct au_round *round);

#endif
