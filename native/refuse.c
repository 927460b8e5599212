#include "refuse.h"

#include "abi.h"
#include "counters.h"
#include "engine.h"
#include "error_page.h"
#include "slots.h"

/* ----------------------------------------------------------------- close */

void au_region_publish_error(struct au_region *region, uint64_t from, uint64_t to, uint8_t state)
{
	uint64_t page, start = region->start + (from << region->page_shift);
	uint64_t length = (to - from) << region->page_shift;

	for (page = from; page < to; page++)
		atomic_store(&region->states[page], state);
	atomic_fetch_add(&region->poisoned_pages, to - from);
	au_count(AU_COUNT_poisoned_bytes, length);
	au_slots_end(region->engine, start, start + length);
	au_abi_wake(region->engine->fd, start, length);
}

bool au_region_take_page(struct au_region *region, uint64_t page)
{
	uint8_t state = AU_PAGE_MISSING;

	return page < region->pages &&
	       atomic_compare_exchange_strong(&region->states[page], &state, AU_PAGE_INSTALLING);
}

void au_region_refuse(struct au_region *region, uint64_t page)
{
	struct au_engine *engine = region->engine;
	uint64_t address = region->start + (page << region->page_shift);
	uint8_t state, made;
	int64_t done = 0;

again:
	state = atomic_load(&region->states[page]);
	switch (state & AU_PAGE_STATE) {
	case AU_PAGE_INSTALLING:
		/* Who does it wakes him. */
		if (!atomic_compare_exchange_strong(&region->states[page], &state,
						    (uint8_t)(state | AU_PAGE_TOUCHED)))
			goto again;
		return;
	case AU_PAGE_MISSING:
		if (!atomic_load(&region->closing))
			break; /* it may be had after all: who waits asks again */
		if (!au_region_take_page(region, page))
			goto again;
		au_error_make(region, page, page + 1, true, &done, &made);
		if (done > 0)
			au_region_publish_error(region, page, page + 1, made);
		else
			atomic_store(&region->states[page], AU_PAGE_MISSING);
		break;
	case AU_PAGE_POISONED:
		/* The message is older than the error; or the marker was dropped. */
		if (!(state & AU_PAGE_ERROR_MAPPED))
			au_abi_poison(engine->fd, address, region->page_size, 0, NULL);
		break;
	default:
		break;
	}
	au_abi_wake(engine->fd, address, region->page_size);
}
