/* Installing: how bytes become pages.
 *
 * One call marks the pages, issues the ioctl, settles the pages, frees the slots
 * and wakes, without the GIL, so that no toucher ever sees half of it.  What the
 * kernel answers decides per run of pages:
 *
 *  - done in part, or EAGAIN: mappings are changing; unread events are taken off the
 *    descriptor (until then every ioctl answers EAGAIN) and the rest is tried again,
 *    on a timer and not on the next event, for a bounded time;
 *  - EEXIST: the page is there.  The kernel has woken nobody, so we do.  On hugetlb it
 *    may also mean that the pool is empty, so presence is checked;
 *  - anything else: the pages are missing as before and the caller gets the errno.
 */
#include "install.h"

#include "abi.h"
#include "counters.h"
#include "error_page.h"
#include "fold.h"
#include "kick.h"
#include "pagemap.h"
#include "refuse.h"
#include "regions.h"
#include "registry.h"
#include "slots.h"
#include "sys.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* Tries of one ioctl that makes no progress, with growing pauses: about 50 ms. */
#define TRIES 60

struct run {
	struct au_region *region;
	int op;
	const uint8_t *src; /* bytes for `page` on */
	uint64_t src_length;
	uint64_t page, end;
	uint8_t before; /* the state of all of them: missing, or which kind of error */
};

static uint64_t address_of(const struct au_region *region, uint64_t page)
{
	return region->start + (page << region->page_shift);
}

static bool present_in_pagemap(const struct au_region *region, uint64_t page)
{
	uint64_t item;

	return !au_pagemap_read(address_of(region, page), &item, 1) ||
	       (item & (AU_PAGEMAP_PRESENT | AU_PAGEMAP_SWAPPED));
}

static bool was_poisoned(const struct run *run)
{
	return (run->before & AU_PAGE_STATE) == AU_PAGE_POISONED;
}

/* The pages [from, to) are there (or poisoned): publish it.  Returns true when one of
 * them was touched in between and needs another wake. */
static bool settle(struct run *run, uint64_t from, uint64_t to, uint8_t state)
{
	struct au_region *region = run->region;
	uint32_t shift = region->block_shift - region->page_shift;
	uint64_t epoch = atomic_fetch_add(&region->engine->epoch, 1) + 1;
	uint64_t page, count = to - from;
	bool touched = false;

	/* Generations first: once a page is PRESENT somebody may drop it, which is newer. */
	for (page = from >> shift; page <= (to - 1) >> shift; page++)
		atomic_store(&region->generations[page], epoch);
	for (page = from; page < to; page++)
		touched |= (atomic_exchange(&region->states[page], state) & AU_PAGE_TOUCHED) != 0;
	if (state == AU_PAGE_PRESENT) {
		atomic_fetch_add(&region->present_pages, count);
		au_count(AU_COUNT_installed_bytes, count << region->page_shift);
	} else {
		atomic_fetch_add(&region->poisoned_pages, count);
		au_count(AU_COUNT_poisoned_bytes, count << region->page_shift);
	}
	if (was_poisoned(run))
		atomic_fetch_sub(&region->poisoned_pages, count);
	return touched;
}

static void put_back(struct run *run, uint64_t from, uint64_t to)
{
	struct au_region *region = run->region;
	uint64_t page;

	for (page = from; page < to; page++)
		if (atomic_exchange(&region->states[page], run->before) & AU_PAGE_TOUCHED)
			au_abi_wake(region->engine->fd, address_of(region, page), region->page_size);
}

static int copy_once(struct run *run, uint64_t from, uint64_t to, int64_t *done)
{
	struct au_region *region = run->region;
	uint64_t offset = (from - run->page) << region->page_shift;
	uint64_t whole = run->src_length > offset ?
				 (run->src_length - offset) >> region->page_shift :
				 0;
	int result;

	if (whole) {
		if (whole > to - from)
			whole = to - from;
		return au_abi_copy(region->engine->fd, address_of(region, from),
				   (uint64_t)(uintptr_t)(run->src + offset),
				   whole << region->page_shift, 0, done);
	}
	/* The unaligned end of the object: the rest of its page reads zero. */
	pthread_mutex_lock(&region->tail_lock);
	memset(region->tail, 0, region->page_size);
	if (run->src_length > offset)
		memcpy(region->tail, run->src + offset, run->src_length - offset);
	result = au_abi_copy(region->engine->fd, address_of(region, from),
			     (uint64_t)(uintptr_t)region->tail, region->page_size, 0, done);
	pthread_mutex_unlock(&region->tail_lock);
	return result;
}

/* Zero pages by copying: for huge pages, and over poison, where ZEROPAGE cannot. */
static int zero_by_copy(struct run *run, uint64_t from, int64_t *done)
{
	struct run zeros = *run;

	zeros.src_length = 0;
	zeros.page = from;
	return copy_once(&zeros, from, from + 1, done);
}

static int issue_once(struct run *run, uint64_t from, uint64_t to, int64_t *done, uint8_t *settled_as)
{
	struct au_region *region = run->region;
	bool huge = region->page_size != region->engine->page_size;
	uint64_t source = 0;

	*done = 0;
	if (run->op == AU_OP_COPY)
		return copy_once(run, from, to, done);
	if (run->op == AU_OP_ZERO && (huge || was_poisoned(run)))
		return zero_by_copy(run, from, done);
	if (run->op == AU_OP_POISON)
		return au_error_make(region, from, to, false, done, settled_as);
	if (run->op == AU_OP_MOVE)
		source = (uint64_t)(uintptr_t)run->src + ((from - run->page) << region->page_shift);
	else if (run->op != AU_OP_ZERO && run->op != AU_OP_CONTINUE)
		return -EINVAL;
	return au_abi_apply(region->engine->fd, run->op, address_of(region, from), source,
			    (to - from) << region->page_shift, 0, done);
}

/* Shared memory whose page cache somebody filled behind us (a hole that was written
 * or read through another mapping): put our bytes there and map the page. */
static int through_the_cache(struct run *run, uint64_t page)
{
	struct au_region *region = run->region;
	uint64_t skip = (page - run->page) << region->page_shift, wanted = 0, put = 0;
	int64_t done;
	int result;

	if (run->op == AU_OP_COPY && run->src_length > skip)
		wanted = run->src_length - skip < region->page_size ? run->src_length - skip :
								      region->page_size;
	pthread_mutex_lock(&region->tail_lock);
	memset(region->tail, 0, region->page_size);
	if (wanted)
		memcpy(region->tail, run->src + skip, wanted);
	while (put < region->page_size) {
		ssize_t part = pwrite(region->memfd, region->tail + put, region->page_size - put,
				      (off_t)((page << region->page_shift) + put));
		if (part <= 0)
			break;
		put += (uint64_t)part;
	}
	pthread_mutex_unlock(&region->tail_lock);
	if (put < region->page_size)
		return -EIO;
	result = au_abi_continue(region->engine->fd, address_of(region, page), region->page_size, 0,
				 &done);
	return result == -EEXIST ? 0 : result;
}

static int on_exists(struct run *run, uint64_t page)
{
	struct au_region *region = run->region;
	bool huge = region->page_size != region->engine->page_size;

	au_count(AU_COUNT_already_present, 1);
	if (run->op == AU_OP_POISON || run->op == AU_OP_CONTINUE)
		return 0;
	if (region->memfd >= 0)
		return through_the_cache(run, page);
	if (huge && !present_in_pagemap(region, page))
		return -ENOMEM;
	return 0;
}

static bool is_error_mapping(const struct au_region *region, uint64_t page)
{
	return page < region->pages &&
	       atomic_load(&region->states[page]) == (AU_PAGE_POISONED | AU_PAGE_ERROR_MAPPED);
}

static bool take_error(struct au_region *region, uint64_t page)
{
	uint8_t state = AU_PAGE_POISONED | AU_PAGE_ERROR_MAPPED;

	return page < region->pages &&
	       atomic_compare_exchange_strong(&region->states[page], &state,
					      AU_PAGE_INSTALLING | AU_PAGE_ERROR_MAPPED);
}

/* Private memory that becomes good amid errors is a mapping of its own for ever.  If there are too
 * many of these, errors as far as the nearest memory that is good are put right with it, or all if
 * there is none. */
static void reach_out(struct run *run, uint64_t *from, uint64_t *to)
{
	struct au_region *region = run->region;
	uint64_t left = run->page, right = run->end;
	bool good_left = false, good_right = false;

	*from = left;
	*to = right;
	if (region->kind != AU_KIND_ANONYMOUS ||
	    (left && !is_error_mapping(region, left - 1)) ||
	    (right < region->pages && !is_error_mapping(region, right)) ||
	    au_error_piece(region))
		return;
	for (;;) {
		good_left = left && !is_error_mapping(region, left - 1);
		good_right = right < region->pages && !is_error_mapping(region, right);
		if (good_left || good_right || (!left && right == region->pages))
			break;
		left -= left > 0;
		right += right < region->pages;
	}
	if (!good_left)
		while (take_error(region, *to))
			++*to;
	if (good_left || !good_right)
		while (*from && take_error(region, *from - 1))
			--*from;
}

/* Errors that were taken along: missing, or what they were. */
static void let_be(struct run *run, uint64_t from, uint64_t to, uint8_t state)
{
	struct au_region *region = run->region;
	uint64_t page;

	if (state == AU_PAGE_MISSING)
		atomic_fetch_sub(&region->poisoned_pages, to - from);
	for (page = from; page < to; page++)
		if (atomic_exchange(&region->states[page], state) & AU_PAGE_TOUCHED)
			au_abi_wake(region->engine->fd, address_of(region, page), region->page_size);
}

/* Where there is an error mapping: memory whose bytes are missing. */
static int heal(struct run *run)
{
	uint64_t from, to;
	uint8_t state;
	int result;

	if (!(run->before & AU_PAGE_ERROR_MAPPED))
		return 0;
	reach_out(run, &from, &to);
	result = au_error_undo(run->region, from, to);
	state = result ? run->before : AU_PAGE_MISSING;
	let_be(run, from, run->page, state);
	let_be(run, run->end, to, state);
	return result;
}

/* The bytes could not be put there: the error again. */
static void be_ill_again(struct run *run, uint64_t from)
{
	uint64_t left = run->end - from;
	uint8_t state;
	int64_t done;

	if (!(run->before & AU_PAGE_ERROR_MAPPED))
		return;
	au_error_make(run->region, from, run->end, false, &done, &state);
	run->before = state;
	if ((uint64_t)done != left << run->region->page_shift) {
		/* Then they are missing. */
		run->before = AU_PAGE_MISSING;
		atomic_fetch_sub(&run->region->poisoned_pages, left);
	}
	au_abi_wake(run->region->engine->fd, address_of(run->region, from),
		    left << run->region->page_shift);
}

/* Work through pages [run->page, run->end), all INSTALLING and ours.
 * Returns the first page that could not be done; *error says why. */
static uint64_t perform(struct run *run, int *error)
{
	struct au_region *region = run->region;
	struct au_engine *engine = region->engine;
	uint8_t settled_as = run->op == AU_OP_POISON ? AU_PAGE_POISONED : AU_PAGE_PRESENT;
	uint64_t page = run->page, first = address_of(region, run->page), upto = run->end;
	bool wake = run->op == AU_OP_POISON; /* a mapping wakes nobody */
	int tries = 0;

	*error = -heal(run);
	if (*error) {
		put_back(run, page, run->end);
		return page;
	}
	AU_GAP(TAKE_MARK);
	au_slots_begin(engine, first, address_of(region, run->end));
	AU_GAP(MARK_IOCTL);
	*error = 0;
	while (page < run->end) {
		int64_t done = 0;
		int result = issue_once(run, page, upto, &done, &settled_as);

		AU_GAP(IOCTL_SETTLE);
		if (done > 0) {
			uint64_t next = page + ((uint64_t)done >> region->page_shift);

			wake |= settle(run, page, next, settled_as);
			page = next;
			upto = run->end;
			tries = 0;
			continue;
		}
		if (result == -ENOENT && upto - page > 1) {
			/* It may be more than one mapping: as far as the first one goes. */
			upto = page + 1;
			continue;
		}
		if (result == -EEXIST && run->op != AU_OP_MOVE) {
			result = on_exists(run, page);
			if (result == 0) {
				settle(run, page, page + 1, settled_as);
				au_abi_wake(engine->fd, address_of(region, page), region->page_size);
				page++;
				continue;
			}
		}
		if (result == 0)
			result = -EIO; /* success with no byte done: should not happen */
		if (result == -EAGAIN && ++tries < TRIES) {
			au_count(AU_COUNT_retries_eagain, 1);
			au_engine_pump_only(engine);
			if (tries < 4)
				sched_yield();
			else
				au_sleep_ns(20000ULL * (uint64_t)tries);
			continue;
		}
		*error = -result;
		break;
	}
	if (page > run->page) {
		au_count(AU_COUNT_installs, 1);
		AU_GAP(SETTLE_FREE);
		wake |= au_slots_end(engine, first, address_of(region, page));
		AU_GAP(FREE_WAKE);
		if (wake)
			au_abi_wake(engine->fd, first, (page - run->page) << region->page_shift);
	}
	if (page < run->end) {
		be_ill_again(run, page);
		put_back(run, page, run->end);
		au_slots_abort(engine, address_of(region, page), address_of(region, run->end));
		au_sentry_kick();
	}
	return page;
}

/* Take the right to install for as many pages from `page` on as are in state `want`. */
static uint64_t take_run(struct au_region *region, uint64_t page, uint64_t end, uint8_t want)
{
	while (page < end) {
		uint8_t state = want;

		if (!atomic_compare_exchange_strong(
			    &region->states[page], &state,
			    (uint8_t)(AU_PAGE_INSTALLING | (want & AU_PAGE_ERROR_MAPPED))))
			break;
		page++;
	}
	return page;
}

/* A page that another thread installs just now: wait for its verdict. */
static uint8_t settled_state(struct au_region *region, uint64_t page)
{
	uint8_t state;
	int tries = 0;

	while (((state = atomic_load(&region->states[page])) & AU_PAGE_STATE) == AU_PAGE_INSTALLING) {
		if (++tries < 16) {
			sched_yield();
		} else {
			/* It may wait itself, for an event to be read. */
			au_engine_pump_only(region->engine);
			au_sleep_ns(20000);
		}
	}
	return state & AU_PAGE_STATE;
}

static bool block_complete(struct au_region *region, uint64_t page, uint64_t end)
{
	for (; page < end; page++) {
		uint8_t state = atomic_load(&region->states[page]) & AU_PAGE_STATE;

		if (state != AU_PAGE_PRESENT && state != AU_PAGE_POISONED)
			return false;
	}
	return true;
}

/* Blocks of [first, last) that are complete are no longer in flight.  Nor are those that
 * this install brought whole: if a page is missing again it was dropped meanwhile, and who
 * faulted on it since found the block in flight and waits for nobody.  A wake makes him ask. */
static void close_blocks(struct au_region *region, uint64_t first, uint64_t last)
{
	uint32_t shift = region->block_shift - region->page_shift;
	uint64_t block, page, end;

	for (block = first >> shift; block <= (last - 1) >> shift; block++) {
		page = block << shift;
		end = page + (1ULL << shift);
		if (end > region->pages)
			end = region->pages;
		if (!atomic_load(&region->flags[block]) ||
		    !((first <= page && end <= last) || block_complete(region, page, end)))
			continue;
		atomic_store(&region->flags[block], 0);
		atomic_thread_fence(memory_order_seq_cst);
		if (!block_complete(region, page, end)) {
			/* Whoever waits for what went missing again asks anew. */
			au_slots_end(region->engine, address_of(region, page),
				     address_of(region, end));
			au_abi_wake(region->engine->fd, address_of(region, page),
				    (end - page) << region->page_shift);
		}
	}
}

static bool stale(struct au_region *region, uint64_t page, uint64_t generation)
{
	uint64_t block = page >> (region->block_shift - region->page_shift);

	return generation != UINT64_MAX &&
	       (uint32_t)atomic_load(&region->generations[block]) != (uint32_t)generation;
}

static uint8_t state_of(const struct au_region *region, uint64_t page)
{
	return atomic_load(&region->states[page]) & AU_PAGE_STATE;
}

/* Map pages [from, to), whose bytes are in the page cache, where they are not mapped, and wake
 * nobody.  Returns the first page that could not be; *error says why. */
static uint64_t map_cached(struct au_region *region, uint64_t from, uint64_t to, int *error)
{
	int tries = 0;

	*error = 0;
	while (from < to) {
		int64_t done = 0;
		int result = au_abi_continue(region->engine->fd, address_of(region, from),
					     (to - from) << region->page_shift,
					     AU_CONTINUE_MODE_DONTWAKE, &done);

		au_count(AU_COUNT_continues, 1);
		if (done > 0) {
			au_count(AU_COUNT_continued_bytes, (uint64_t)done);
			from += (uint64_t)done >> region->page_shift;
			tries = 0;
		} else if (result == -EEXIST) {
			from++;
			tries = 0;
		} else if (result == -EAGAIN && ++tries < TRIES) {
			au_engine_pump_only(region->engine);
			au_sleep_ns(20000ULL * (uint64_t)tries);
		} else {
			*error = result ? -result : EIO;
			break;
		}
	}
	return from;
}

static void wake_all(struct au_region *region, uint64_t from, uint64_t to)
{
	uint64_t start = address_of(region, from), end = address_of(region, to);

	if (from == to)
		return;
	au_slots_end(region->engine, start, end);
	au_abi_wake(region->engine->fd, start, end - start);
}

/* Most entries of the page map that are looked at for one fault. */
#define LOOK_AROUND 512

/* The part of the block of `page` that can be seen at once, and what is mapped of it. */
static void look_around(const struct au_region *region, uint64_t page, uint64_t *first,
			uint64_t *last, uint64_t *items)
{
	uint32_t shift = region->block_shift - region->page_shift;

	*first = page >> shift << shift;
	*last = *first + (1ULL << shift);
	if (*last > region->pages)
		*last = region->pages;
	if (*last - *first > LOOK_AROUND) {
		*first = page & ~(uint64_t)(LOOK_AROUND - 1);
		if (*last - *first > LOOK_AROUND)
			*last = *first + LOOK_AROUND;
	}
	/* A huge page has many entries. */
	if (region->page_size == region->engine->page_size &&
	    au_pagemap_read(address_of(region, *first), items, *last - *first))
		return;
	*first = page;
	*last = page + 1;
	items[0] = 0;
}

void au_region_map_again(struct au_region *region, uint64_t page)
{
	uint64_t items[LOOK_AROUND], first, last, at, from, low = page, high = page + 1;
	uint8_t state = AU_PAGE_PRESENT;
	int error, failed = 0;

	look_around(region, page, &first, &last, items);
	for (at = first; at < last;) {
		from = at;
		while (at < last && !(items[at - first] & (AU_PAGEMAP_PRESENT | AU_PAGEMAP_SWAPPED)) &&
		       state_of(region, at) == AU_PAGE_PRESENT)
			at++;
		if (at == from) {
			at++;
			continue;
		}
		low = from < low ? from : low;
		high = at > high ? at : high;
		while ((from = map_cached(region, from, at, &error)) < at && error != EAGAIN) {
			/* A hole in the page cache, or a page that is broken: the others are not. */
			if (from == page)
				failed = error;
			from++;
		}
	}
	if (failed == EFAULT && atomic_compare_exchange_strong(&region->states[page], &state,
							       AU_PAGE_MISSING))
		/* Removed by somebody, since the message, without an event. */
		atomic_fetch_sub(&region->present_pages, 1);
	if (failed == EIO && !au_region_renew(region, page << region->page_shift))
		/* Broken, and its bytes are lost: an error, for it cannot be mapped. */
		if (atomic_compare_exchange_strong(&region->states[page], &state, AU_PAGE_MISSING)) {
			atomic_fetch_sub(&region->present_pages, 1);
			au_engine_poison_page(region->engine, address_of(region, page),
					      region->page_size);
		}
	/* At the end, or who waits would come to pages that are next before us.  Also who came for
	 * what was mapped already. */
	wake_all(region, low, high);
}

static int64_t install(struct au_region *region, int op, uint64_t offset, const void *src,
		       uint64_t length, int over_poison, uint64_t generation, int *error)
{
	uint64_t first = offset >> region->page_shift, page = first, end;
	uint64_t stop = offset + length;

	end = (stop + region->page_size - 1) >> region->page_shift;
	if (stale(region, first, generation)) {
		*error = ESTALE;
		return 0;
	}
	*error = 0;
	while (page < end && !*error) {
		struct run run = {
			.region = region,
			.op = op,
			.src = src ? (const uint8_t *)src + ((page - first) << region->page_shift) : NULL,
			.page = page,
		};

		if (op == AU_OP_CONTINUE && settled_state(region, page) == AU_PAGE_PRESENT) {
			/* The bytes are in the page cache and only the mapping went. */
			uint64_t upto = page + 1;

			while (upto < end && state_of(region, upto) == AU_PAGE_PRESENT)
				upto++;
			upto = map_cached(region, page, upto, error);
			wake_all(region, page, upto);
			page = upto;
			continue;
		}
		run.end = take_run(region, page, end, AU_PAGE_MISSING);
		if (op == AU_OP_MOVE && run.end != page && (page != first || run.end != end)) {
			/* Part of it is there already: a huge page would have to be split,
			 * which costs more than copying. */
			run.op = op = AU_OP_COPY;
		}
		if (run.end == page && over_poison && op != AU_OP_POISON) {
			run.before = AU_PAGE_POISONED;
			run.end = take_run(region, page, end, run.before);
			if (run.end == page) {
				run.before |= AU_PAGE_ERROR_MAPPED;
				run.end = take_run(region, page, end, run.before);
			}
		}
		if (run.end == page) {
			uint8_t state = settled_state(region, page);

			if (state == AU_PAGE_PRESENT || (state == AU_PAGE_POISONED && !over_poison) ||
			    (state == AU_PAGE_POISONED && op == AU_OP_POISON))
				page++;
			continue;
		}
		if (page == first && stale(region, first, generation)) {
			/* Dropped between the look and the taking. */
			put_back(&run, page, run.end);
			*error = ESTALE;
			break;
		}
		if (op == AU_OP_COPY) {
			uint64_t have = length - ((page - first) << region->page_shift);
			uint64_t limit = region->object_length - (page << region->page_shift);

			/* Bytes past the object's end are zero, whatever the source has there. */
			run.src_length = have < limit ? have : limit;
		}
		page = perform(&run, error);
		if (run.op == AU_OP_MOVE && *error && *error != EBADF) {
			/* Not movable (an older kernel, a shared or locked page): the bytes
			 * are where they were. */
			region->move_refused |= *error == EINVAL;
			op = AU_OP_COPY;
			*error = 0;
		}
	}
	if (page > first)
		close_blocks(region, first, page);
	stop = page << region->page_shift;
	return (int64_t)((stop < offset + length ? stop : offset + length) - offset);
}

int64_t au_region_install(struct au_region *region, int op, uint64_t offset, const void *src,
			  uint64_t length, int over_poison, uint64_t generation, int *error)
{
	uint64_t stop = offset + length, readable;
	int64_t settled;

	*error = EINVAL;
	if (!length || stop < offset || stop > region->length || (offset & (region->page_size - 1)))
		return 0;
	if ((stop & (region->page_size - 1)) && stop < region->object_length)
		return 0;
	if (op == AU_OP_MOVE && (region->move_refused || (length & (region->page_size - 1))))
		op = AU_OP_COPY;
	/* Past the object's end nothing is read. */
	readable = stop > region->object_length ? region->object_length - offset : length;
	if ((op == AU_OP_COPY || op == AU_OP_MOVE) &&
	    (!src || au_regions_overlap((uint64_t)(uintptr_t)src, readable)))
		return 0;
	*error = EBADF;
	if (!au_engine_enter(region->engine))
		return 0;
	if (!au_region_enter(region)) {
		/* The sentry and the engine hold a reference of their own already. */
		au_engine_leave(region->engine);
		return 0;
	}
	settled = install(region, op, offset, src, length, over_poison, generation, error);
	au_region_leave(region);
	au_engine_leave(region->engine);
	return settled;
}

int64_t au_region_put(struct au_region *region, int op, uint64_t offset, const uint8_t *src,
		      uint64_t length, int over_poison, uint64_t generation)
{
	int error = 0;
	int64_t settled =
		au_region_install(region, op, offset, src, length, over_poison, generation, &error);

	return error ? -1 - (settled << 8 | (error & 0xff)) : settled;
}

void au_engine_poison_page(struct au_engine *engine, uint64_t page, uint64_t page_size)
{
	struct au_region *region;
	bool entered = false;
	int error, result;

	pthread_mutex_lock(&engine->lock);
	region = au_engine_region_at(engine, page);
	if (region)
		entered = au_region_enter(region);
	if (region && !entered)
		au_region_refuse(region, (page - region->start) >> region->page_shift);
	pthread_mutex_unlock(&engine->lock);
	if (entered) {
		au_region_install(region, AU_OP_POISON, page - region->start, NULL, page_size, 0,
				  UINT64_MAX, &error);
		/* A page that is there after all was skipped, and nobody woken. */
		au_abi_wake(engine->fd, page, page_size);
		au_region_leave(region);
	} else if (!region) {
		int64_t done;

		result = au_engine_resolve(engine, AU_OP_POISON, page, 0, page_size, 0, &done);
		/* Before Linux 6.6 nothing else keeps a thread from waiting for ever. */
		if ((result == -EINVAL || result == -ENOTTY) && (engine->options & AU_ENGINE_RAW) &&
		    (engine->options & AU_ENGINE_OWN))
			au_error_map(page, page_size, true);
		au_abi_wake(engine->fd, page, page_size);
	}
}
