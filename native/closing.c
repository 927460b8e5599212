#include "closing.h"

#include "abi.h"
#include "children.h"
#include "counters.h"
#include "engine.h"
#include "error_page.h"
#include "pump.h"
#include "refuse.h"
#include "regions.h"
#include "registry.h"
#include "slots.h"
#include "sys.h"

#include <errno.h>
#include <stdbool.h>
#include <sys/mman.h>

/* What is made an error at a time when a region closes, should it have to be poison. */
#define SEAL_STEP (64ULL << 20)
#define SEAL_TRIES 2000

/* The kernel has no room for another mapping: one for all the rest.  If even that takes one too many,
 * there is no access any more to all of it, which takes none. */
static void seal_rest(struct au_region *region, uint64_t from)
{
	uint64_t page, start = region->start + (from << region->page_shift);

	if (au_error_map(start, (region->pages - from) << region->page_shift,
			 region->options & (AU_REGION_FORK | AU_REGION_SERVE)))
		mprotect((void *)(uintptr_t)region->start, region->length, PROT_NONE);
	for (page = from; page < region->pages; page++)
		atomic_store(&region->states[page], AU_PAGE_POISONED | AU_PAGE_ERROR_MAPPED);
	au_abi_wake(region->engine->fd, start, (region->pages - from) << region->page_shift);
}

/* Pages [from, to), taken. */
static void seal_run(struct au_region *region, uint64_t from, uint64_t to)
{
	uint64_t step, upto;
	int64_t done = 0;
	int tries = 0, result;
	uint8_t state;

	while (from < to) {
		/* The length does not matter to a mapping. */
		step = tries ? SEAL_STEP >> region->page_shift : to - from;
		upto = step && step < to - from ? from + step : to;
		result = au_error_make(region, from, upto, true, &done, &state);
		if (!done && result == -EAGAIN && ++tries < SEAL_TRIES) {
			au_engine_pump(region->engine);
			au_sleep_ns(20000 + 1000ULL * (uint64_t)tries);
			continue;
		}
		if (!done && result == -EEXIST) {
			/* Present after all. */
			atomic_store(&region->states[from], AU_PAGE_PRESENT);
			au_abi_wake(region->engine->fd, region->start + (from << region->page_shift),
				    region->page_size);
			from++;
			continue;
		}
		if (!done) {
			seal_rest(region, from);
			return;
		}
		upto = from + ((uint64_t)done >> region->page_shift);
		au_region_publish_error(region, from, upto, state);
		from = upto;
	}
}

/* So many pages are not noted one by one: that would make memory of their states. */
#define SEAL_AT_ONCE 65536

/* Where nobody installs any more: a long run that is missing, up to *end.  False: there is none. */
static bool seal_at_once(struct au_region *region, uint64_t from, uint64_t *end)
{
	uint64_t to = from, start = region->start + (from << region->page_shift), length;

	while (to < region->pages &&
	       (atomic_load(&region->states[to]) & AU_PAGE_STATE) == AU_PAGE_MISSING)
		to++;
	length = (to - from) << region->page_shift;
	if (to - from < SEAL_AT_ONCE ||
	    au_error_map(start, length, region->options & (AU_REGION_FORK | AU_REGION_SERVE)))
		return false;
	au_count(AU_COUNT_poisoned_bytes, length);
	au_slots_end(region->engine, start, start + length);
	au_abi_wake(region->engine->fd, start, length);
	*end = to;
	return true;
}

static void seal_missing(struct au_region *region, bool only_wanted)
{
	uint32_t shift = region->block_shift - region->page_shift;
	uint64_t page = 0, start;

	while (page < region->pages) {
		if (only_wanted && !(atomic_load(&region->flags[page >> shift]) & AU_BLOCK_WANTED)) {
			page = ((page >> shift) + 1) << shift;
			continue;
		}
		if (!only_wanted && seal_at_once(region, page, &page))
			continue;
		if (!au_region_take_page(region, page)) {
			page++;
			continue;
		}
		start = page++;
		while ((!only_wanted || page >= region->pages ||
			(atomic_load(&region->flags[page >> shift]) & AU_BLOCK_WANTED)) &&
		       au_region_take_page(region, page))
			page++;
		seal_run(region, start, page);
	}
}

int au_region_close(struct au_region *region, int unmap)
{
	struct au_engine *engine = region->engine;
	bool entered;

	if (atomic_exchange(&region->closing, 1))
		return -EALREADY;
	if (region->options & AU_REGION_SERVE)
		au_children_closed(region);
	au_slots_dismiss(engine, region->start, region->start + region->length);
	/* From here on a message for the region is answered with an error. */
	if (region->backing && !atomic_load(&engine->closing))
		__atomic_fetch_sub(&engine->urgent, 1, __ATOMIC_SEQ_CST);
	entered = au_engine_enter(engine);
	/* Messages that wait get their answer; and a reader of messages that saw the region
	 * open has done with it afterwards, for both hold the engine's lock. */
	if (entered)
		au_engine_pump(engine);
	while (atomic_load(&region->users))
		au_sleep_ns(20000);
	if (entered) {
		seal_missing(region, true);
		while (unmap && atomic_load(&region->readers)) {
			/* They fault on what was not wanted before; the answer is an error. */
			au_engine_pump(engine);
			au_sleep_ns(20000);
		}
		if (!unmap)
			seal_missing(region, false);
		au_engine_remove_region(engine, region);
		if (au_slots_end(engine, region->start, region->start + region->length))
			au_abi_wake(engine->fd, region->start, region->length);
		if (!unmap) {
			/* Nothing is missing any more, so this makes no zeros. */
			au_abi_unregister(engine->fd, region->start, region->length);
			au_abi_wake(engine->fd, region->start, region->length);
		}
		if (unmap && region->mapped) {
			if (region->options & AU_REGION_SERVE)
				au_children_remove(region);
			au_regions_remove(region->start);
			munmap((void *)(uintptr_t)region->start, region->length);
			au_error_forget(region);
			region->mapped = false;
			au_abi_wake(engine->fd, region->start, region->length);
		}
		au_engine_leave(engine);
	}
	return 0;
}
