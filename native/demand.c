#include "demand.h"

#include "guard.h"
#include "pagemap.h"
#include "pump.h"
#include "slots.h"
#include "sys.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

/* Longest sleep: a signal may have come before it began, or to another thread. */
#define SLICE_NS (25 * AU_NS_PER_MS)
/* Where no slot is to be had there is nothing to sleep on. */
#define POLL_NS AU_NS_PER_MS
/* What is copied or searched between two looks for signals, and searched at a time. */
#define COPY_STEP (32ULL << 20)
#define FIND_STEP (1ULL << 20)

static bool holds(const struct au_wait *wait)
{
	return wait->slot && atomic_load(&wait->slot->word) == wait->word;
}

void au_wait_end(struct au_wait *wait)
{
	if (wait->slot)
		au_slot_free(wait->slot, wait->word);
	wait->slot = NULL;
}

/* Be one of those that wait for the page.  The region is entered. */
static void stand_in_line(struct au_region *region, uint64_t page, struct au_wait *wait)
{
	uint64_t address = region->start + (page << region->page_shift);
	bool duplicate;

	if (holds(wait) && atomic_load(&wait->slot->page) == address)
		return;
	au_wait_end(wait);
	wait->slot = au_slot_claim(region->engine, au_gettid(), address, region->page_size,
				   atomic_load(&region->engine->epoch), &duplicate);
	if (wait->slot)
		wait->word = au_slot_publish_asked(wait->slot);
}

static enum au_page_state state_of(const struct au_region *region, uint64_t page)
{
	return (enum au_page_state)(atomic_load(&region->states[page]) & AU_PAGE_STATE);
}

/* 0 when the page is there, else as au_wait_read. */
static int await_page(struct au_region *region, uint64_t page, struct au_wait *wait)
{
	enum au_page_state state;
	int result;

	while ((state = state_of(region, page)) != AU_PAGE_PRESENT && state != AU_PAGE_POISONED) {
		if (!au_region_enter(region))
			return -EBADF;
		stand_in_line(region, page, wait);
		result = 0;
		if (state_of(region, page) == AU_PAGE_MISSING)
			result = au_engine_ask(region, page);
		au_region_leave(region);
		if (result == -EBADF)
			return result;
		if (!wait->slot || result) {
			au_sleep_ns(POLL_NS);
			return -EINTR;
		}
		if (au_futex_wait(&wait->slot->word, wait->word, SLICE_NS))
			return -EINTR;
	}
	return state == AU_PAGE_POISONED ? -EIO : 0;
}

/* Wait for the first page of the range, and see how many bytes of it are there then. */
static int await_some(struct au_region *region, uint64_t from, uint64_t to, uint64_t *end,
		      struct au_wait *wait)
{
	uint64_t page = from >> region->page_shift, last = (to - 1) >> region->page_shift;
	int result = await_page(region, page, wait);

	if (result)
		return result;
	while (page < last && state_of(region, page + 1) == AU_PAGE_PRESENT)
		page++;
	*end = page == last ? to : (page + 1) << region->page_shift;
	return 0;
}

static int begin(struct au_region *region, uint64_t offset, uint64_t length)
{
	if (offset > region->length || length > region->length - offset)
		return -EINVAL;
	if (atomic_load(&region->inherited))
		return -EOPNOTSUPP;
	atomic_fetch_add(&region->readers, 1);
	return 0;
}

static int end(struct au_region *region, int result, struct au_wait *wait)
{
	if (result != -EINTR)
		au_wait_end(wait);
	/* Poison that a close put there is the close's word, not the source's. */
	if (result && result != -EINVAL && atomic_load(&region->closing))
		result = -EBADF;
	atomic_fetch_sub(&region->readers, 1);
	return result;
}

int au_wait_read(struct au_region *region, uint64_t offset, void *destination, uint64_t length,
		 struct au_wait *wait)
{
	uint64_t stop = offset + length, upto, where;
	int result = begin(region, offset, length);

	if (result)
		return result;
	wait->at = offset;
	while (!result && wait->at < stop) {
		if (atomic_load(&region->closing))
			result = -EBADF;
		else if (wait->at - offset >= COPY_STEP)
			result = -EINTR;
		else
			result = await_some(region, wait->at, stop, &upto, wait);
		if (result)
			break;
		if (upto - wait->at > COPY_STEP)
			upto = wait->at + COPY_STEP;
		result = au_guard_copy((uint8_t *)destination + (wait->at - offset),
				       (const void *)(uintptr_t)(region->start + wait->at),
				       upto - wait->at, &where);
		wait->at = result ? where - region->start : upto;
		if (result && wait->at < region->length && au_region_broken(region, wait->at))
			result = -EHWPOISON;
	}
	return end(region, result, wait);
}

int au_wait_find(struct au_region *region, uint64_t offset, uint64_t length, const void *needle,
		 uint64_t needle_length, struct au_wait *wait)
{
	uint64_t stop = offset + length, upto, at, where;
	int result = begin(region, offset, length);

	if (result)
		return result;
	wait->at = offset;
	wait->found = -1;
	while (wait->at < stop && stop - wait->at >= needle_length) {
		/* Windows overlap by what could be the start of a match. */
		upto = stop - wait->at - needle_length > FIND_STEP ?
			       wait->at + FIND_STEP + needle_length - 1 :
			       stop;
		for (at = wait->at; !result && at < upto;)
			result = atomic_load(&region->closing) ?
					 -EBADF :
					 await_some(region, at, upto, &at, wait);
		if (result == -EIO)
			wait->at = at;
		if (result)
			break;
		wait->found = au_guard_find((const void *)(uintptr_t)(region->start + wait->at),
					    upto - wait->at, needle, needle_length, &where);
		if (wait->found == -EIO) {
			wait->at = where - region->start;
			result = wait->at < region->length && au_region_broken(region, wait->at) ?
					 -EHWPOISON :
					 -EIO;
			break;
		}
		if (wait->found >= 0) {
			wait->found += (int64_t)wait->at;
			break;
		}
		if (upto == stop)
			break;
		wait->at = upto - (needle_length - 1);
		if (wait->at - offset >= COPY_STEP) {
			result = -EINTR;
			break;
		}
	}
	return end(region, result, wait);
}

int au_mapped(uint64_t address, uint64_t length)
{
	uint64_t base = au_page_size(), items[512];
	uint64_t page = address / base, last = (address + length - 1) / base, count, index;

	for (; page <= last; page += count) {
		count = last - page + 1 < 512 ? last - page + 1 : 512;
		if (!au_pagemap_read(page * base, items, count))
			return 0;
		for (index = 0; index < count; index++)
			if (!(items[index] & AU_PAGEMAP_PRESENT))
				return 0; /* what is in swap may be a marker */
	}
	return 1;
}
