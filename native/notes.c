#include "notes.h"

#include <stdatomic.h>

#define NOTES 64

static struct au_note notes[NOTES];
static _Atomic uint32_t note_head, note_tail;

/* ---------------------------------------------------------- small things */

void au_note_down(enum au_note_kind kind, uint32_t tid, uint64_t address, uint64_t waited_ns)
{
	uint32_t tail = atomic_load(&note_tail);

	if (tail - atomic_load(&note_head) == NOTES)
		return;
	notes[tail % NOTES] = (struct au_note){
		.kind = kind, .tid = tid, .address = address, .waited_ns = waited_ns
	};
	atomic_store(&note_tail, tail + 1);
}

int au_sentry_take_note(struct au_note *out)
{
	uint32_t head = atomic_load(&note_head);

	if (head == atomic_load(&note_tail))
		return 0;
	*out = notes[head % NOTES];
	atomic_store(&note_head, head + 1);
	return 1;
}

void au_notes_forked(void)
{
	atomic_store(&note_head, atomic_load(&note_tail));
}
