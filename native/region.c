#include "region.h"

#include "abi.h"
#include "counters.h"
#include "engine.h"
#include "slots.h"
#include "sys.h"

#include <errno.h>
#include <sys/mman.h>

_Atomic uint64_t au_renewed;
_Atomic uint32_t au_inherits;

/* ---------------------------------------------------------------- blocks */

bool au_region_enter(struct au_region *region)
{
	atomic_fetch_add(&region->users, 1);
	if (atomic_load(&region->closing) || atomic_load(&region->inherited)) {
		atomic_fetch_sub(&region->users, 1);
		return false;
	}
	return true;
}

void au_region_leave(struct au_region *region)
{
	atomic_fetch_sub(&region->users, 1);
}

static bool block_settled(struct au_region *region, uint64_t block, int heal)
{
	uint32_t shift = region->block_shift - region->page_shift;
	uint64_t page = block << shift, end = (block + 1) << shift;

	if (end > region->pages)
		end = region->pages;
	for (; page < end; page++) {
		uint8_t state = atomic_load(&region->states[page]) & AU_PAGE_STATE;

		if (state != AU_PAGE_PRESENT && (heal || state != AU_PAGE_POISONED))
			return false;
	}
	return true;
}

int64_t au_region_begin(struct au_region *region, uint64_t first, uint64_t count, int heal,
			uint8_t *taken)
{
	uint64_t index;
	int64_t owned = 0;

	if (first > region->blocks || count > region->blocks - first)
		return -EINVAL;
	for (index = 0; index < count; index++) {
		uint8_t before;

		taken[index] = 0;
		if (block_settled(region, first + index, heal))
			continue;
		before = atomic_fetch_or(&region->flags[first + index], AU_BLOCK_IN_FLIGHT);
		if (before & AU_BLOCK_IN_FLIGHT)
			continue;
		taken[index] = 1;
		owned++;
	}
	return owned;
}

int64_t au_region_end(struct au_region *region, uint64_t first, uint64_t count, int keep_wanted,
		      uint8_t *wanted)
{
	uint64_t index;
	int64_t total = 0;

	if (first > region->blocks || count > region->blocks - first)
		return -EINVAL;
	for (index = 0; index < count; index++) {
		uint64_t block = first + index, start;
		uint8_t flags = atomic_load(&region->flags[block]), next;

		do
			next = keep_wanted && (flags & AU_BLOCK_WANTED) ?
				       (uint8_t)(flags & ~AU_BLOCK_REPORTED) :
				       0;
		while (!atomic_compare_exchange_strong(&region->flags[block], &flags, next));
		wanted[index] = (flags & AU_BLOCK_WANTED) != 0;
		total += wanted[index];
		if (wanted[index] && !next && au_region_enter(region)) {
			uint64_t length;

			start = block << region->block_shift;
			length = region->length - start < region->block_size ? region->length - start :
									       region->block_size;
			/* Those who wait in the kernel, and those who gave the GIL away. */
			au_slots_end(region->engine, region->start + start,
				     region->start + start + length);
			au_abi_wake(region->engine->fd, region->start + start, length);
			au_region_leave(region);
		}
	}
	return total;
}

int au_region_check(struct au_region *region, uint64_t offset, uint64_t length, uint64_t *where)
{
	uint64_t page = offset >> region->page_shift, end;

	if (offset > region->length || length > region->length - offset)
		return -EINVAL;
	end = au_round_up(offset + length, region->page_size) >> region->page_shift;
	for (; page < end; page++) {
		uint8_t state = atomic_load(&region->states[page]) & AU_PAGE_STATE;

		if (state == AU_PAGE_PRESENT)
			continue;
		*where = page << region->page_shift;
		return state == AU_PAGE_POISONED ? -EIO : 0;
	}
	return 1;
}

int64_t au_region_runs(struct au_region *region, uint64_t offset, uint64_t length, uint64_t *starts,
		       uint64_t *lengths, uint8_t *states, int64_t max, uint64_t *next)
{
	uint64_t page = offset >> region->page_shift, end;
	int64_t count = 0;

	if (offset > region->length || length > region->length - offset)
		return -EINVAL;
	end = au_round_up(offset + length, region->page_size) >> region->page_shift;
	while (page < end) {
		uint8_t state = atomic_load(&region->states[page]) & AU_PAGE_STATE;

		if (state == AU_PAGE_INSTALLING)
			state = AU_PAGE_MISSING;
		if (count && states[count - 1] == state) {
			lengths[count - 1] += region->page_size;
		} else {
			if (count == max)
				break;
			starts[count] = page << region->page_shift;
			lengths[count] = region->page_size;
			states[count++] = state;
		}
		page++;
	}
	*next = page << region->page_shift;
	return count;
}

uint32_t au_region_generation(struct au_region *region, uint64_t block)
{
	return block < region->blocks ? (uint32_t)atomic_load(&region->generations[block]) : 0;
}

int au_region_inherited(struct au_region *region)
{
	return atomic_load(&region->closing) ? -EBADF : (int)atomic_load(&region->inherited);
}

uint64_t au_region_present(struct au_region *region)
{
	return atomic_load(&region->present_pages);
}

uint64_t au_region_poisoned(struct au_region *region)
{
	return atomic_load(&region->poisoned_pages);
}

uint64_t au_region_touched(struct au_region *region)
{
	return atomic_load(&region->touched_blocks);
}

/* --------------------------------------------------------------- removal */

void au_region_removed(struct au_region *region, uint64_t start, uint64_t end)
{
	uint64_t page, last, epoch;

	if (end <= region->start || start >= region->start + region->length)
		return;
	start = start > region->start ? start - region->start : 0;
	end = end < region->start + region->length ? end - region->start : region->length;
	epoch = atomic_fetch_add(&region->engine->epoch, 1) + 1;
	last = end >> region->page_shift;
	for (page = start >> region->page_shift; page < last; page++) {
		uint8_t state = atomic_load(&region->states[page]);

		atomic_store(&region->generations[page >> (region->block_shift - region->page_shift)],
			     epoch);
		/* An install under way sees the new generation; its page is settled by it.  An error
		 * mapping stays. */
		if ((state & AU_PAGE_ERROR_MAPPED) ||
		    ((state & AU_PAGE_STATE) != AU_PAGE_PRESENT &&
		     (state & AU_PAGE_STATE) != AU_PAGE_POISONED) ||
		    !atomic_compare_exchange_strong(&region->states[page], &state,
						    AU_PAGE_MISSING))
			continue;
		if ((state & AU_PAGE_STATE) == AU_PAGE_PRESENT)
			atomic_fetch_sub(&region->present_pages, 1);
		else
			atomic_fetch_sub(&region->poisoned_pages, 1);
	}
}

int au_region_drop(struct au_region *region, uint64_t offset, uint64_t length)
{
	uint64_t page, first, last;
	int result = 0;

	if ((offset | length) & (region->page_size - 1) || offset > region->length ||
	    length > region->length - offset)
		return -EINVAL;
	if (!au_region_enter(region))
		return -EBADF;
	first = offset >> region->page_shift;
	last = (offset + length) >> region->page_shift;
	for (page = first; page < last && !result; page++) {
		uint64_t address = region->start + (page << region->page_shift);
		uint8_t state = atomic_load(&region->states[page]), before;

		if ((state & AU_PAGE_STATE) != AU_PAGE_PRESENT)
			continue;
		/* INSTALLING keeps everybody else off while the page goes. */
		if (!atomic_compare_exchange_strong(&region->states[page], &state,
						    AU_PAGE_INSTALLING))
			continue;
		if (madvise((void *)(uintptr_t)address, region->page_size,
			    region->memfd >= 0 ? MADV_REMOVE : MADV_DONTNEED))
			result = -errno;
		atomic_store(&region->generations[page >> (region->block_shift - region->page_shift)],
			     atomic_fetch_add(&region->engine->epoch, 1) + 1);
		before = atomic_exchange(&region->states[page],
					 result ? AU_PAGE_PRESENT : AU_PAGE_MISSING);
		if (!result)
			atomic_fetch_sub(&region->present_pages, 1);
		if (before & AU_PAGE_TOUCHED)
			au_abi_wake(region->engine->fd, address, region->page_size);
	}
	au_region_leave(region);
	return result;
}

bool au_region_broken(struct au_region *region, uint64_t offset)
{
	return !atomic_load(&region->inherited) && !atomic_load(&region->closing) &&
	       (atomic_load(&region->states[offset >> region->page_shift]) & AU_PAGE_STATE) ==
		       AU_PAGE_PRESENT;
}

bool au_region_renew(struct au_region *region, uint64_t offset)
{
	offset &= ~(region->page_size - 1);
	if ((region->options & AU_REGION_WRITABLE) || !au_region_broken(region, offset) ||
	    au_region_drop(region, offset, region->page_size))
		return false;
	au_count(AU_COUNT_renewed_bytes, region->page_size);
	atomic_store(&au_renewed, region->start + offset);
	return true;
}

void au_region_forked(struct au_region *region)
{
	atomic_store(&region->closing, 1);
	atomic_store(&region->users, 0);
	atomic_store(&region->readers, 0);
	if (!(region->options & (AU_REGION_FORK | AU_REGION_SERVE)))
		region->mapped = false;
}
