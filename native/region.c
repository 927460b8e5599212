#include "region.h"

#include "abi.h"
#include "children.h"
#include "counters.h"
#include "engine.h"
#include "error_page.h"
#include "guard.h"
#include "registry.h"
#include "slots.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#ifndef MFD_CLOEXEC
#define MFD_CLOEXEC 1U
#endif
#ifndef MFD_HUGETLB
#define MFD_HUGETLB 4U
#endif
#define HUGE_SHIFT 21
#define MFD_HUGE_2MB (21U << 26)

/* What is made an error at a time when a region closes, should it have to be poison. */
#define SEAL_STEP (64ULL << 20)
#define SEAL_TRIES 2000

_Atomic uint64_t au_renewed;
_Atomic uint32_t au_inherits;

/* -------------------------------------------------------------- creation */

static void *map_sparse(uint64_t length)
{
	void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return memory == MAP_FAILED ? NULL : memory;
}

static uint64_t round_up(uint64_t value, uint64_t step)
{
	return (value + step - 1) & ~(step - 1);
}

/* Memory with nothing in it.  After mlockall(MCL_FUTURE) a new mapping comes filled, with zeros that would
 * pass for bytes: so nothing may be touched in it until it is not locked. */
static void *map_empty(void *address, uint64_t length, int protection, int flags, int fd,
		       uint64_t offset)
{
	void *memory = mmap(address, length, PROT_NONE, flags, fd, (off_t)offset);

	if (memory == MAP_FAILED)
		return memory;
	munlock(memory, length);
	if (mprotect(memory, length, protection)) {
		munmap(memory, length);
		return MAP_FAILED;
	}
	return memory;
}

/* Private memory of at least one huge page starts at a huge page and is open to them, so
 * that whole ones can be moved in; a touch then leaves no page table behind, into
 * which only small pages could be moved.  Moving needs writable memory on both sides,
 * so read-only is a matter of the views that are handed out. */
static void *map_for_huge(uint64_t length)
{
	uint64_t huge = 1ULL << HUGE_SHIFT, start, skip, tail;
	uint8_t *memory = map_empty(NULL, length + huge, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (memory == MAP_FAILED)
		return MAP_FAILED;
	start = round_up((uint64_t)(uintptr_t)memory, huge);
	skip = start - (uint64_t)(uintptr_t)memory;
	tail = huge - skip;
	if (skip)
		munmap(memory, skip);
	if (tail)
		munmap(memory + skip + length, tail);
	return memory + skip;
}

static bool open_to_huge(const struct au_region *region)
{
	return region->kind == AU_KIND_ANONYMOUS && region->length >= 1ULL << HUGE_SHIFT;
}

static int protection_of(const struct au_region *region)
{
	return open_to_huge(region) || (region->options & AU_REGION_WRITABLE) ?
		       PROT_READ | PROT_WRITE :
		       PROT_READ;
}

static int flags_of(const struct au_region *region)
{
	int flags = MAP_NORESERVE;

	switch (region->kind) {
	case AU_KIND_ANONYMOUS:
		return flags | MAP_PRIVATE | MAP_ANONYMOUS;
	case AU_KIND_HUGETLB:
		return flags | MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB |
		       (HUGE_SHIFT << MAP_HUGE_SHIFT);
	default:
		return flags | MAP_SHARED;
	}
}

/* 0 or -errno. */
static int advise(const struct au_region *region, void *memory, uint64_t length)
{
	/* Fails where the kernel has no huge pages; then there is nothing to move. */
	if (open_to_huge(region))
		madvise(memory, length, MADV_HUGEPAGE);
	if (!(region->options & (AU_REGION_FORK | AU_REGION_SERVE)) &&
	    madvise(memory, length, MADV_DONTFORK))
		return -errno;
	return 0;
}

static int map_memory(struct au_region *region)
{
	struct stat status;
	void *memory;

	if (flags_of(region) & MAP_SHARED) {
		region->memfd = (int)syscall(SYS_memfd_create, "aiouffd",
					     region->kind == AU_KIND_MEMFD ?
						     MFD_CLOEXEC :
						     MFD_CLOEXEC | MFD_HUGETLB | MFD_HUGE_2MB);
		if (region->memfd < 0 || ftruncate(region->memfd, (off_t)region->length) ||
		    fstat(region->memfd, &status))
			return -errno;
		region->inode = status.st_ino;
	}
	if (open_to_huge(region))
		memory = map_for_huge(region->length);
	else
		memory = map_empty(NULL, region->length, protection_of(region), flags_of(region),
				   region->memfd, 0);
	if (memory == MAP_FAILED)
		return -errno;
	region->start = (uint64_t)(uintptr_t)memory;
	region->mapped = true;
	return advise(region, memory, region->length);
}

int au_region_map_anew(const struct au_region *region, void *address, uint64_t offset,
			uint64_t length)
{
	bool shared = region->memfd >= 0;
	struct stat status;

	if (shared && (fstat(region->memfd, &status) || status.st_ino != region->inode))
		return -EBADF;
	if (map_empty(address, length, protection_of(region), flags_of(region) | MAP_FIXED,
		      region->memfd, shared ? offset : 0) == MAP_FAILED)
		return -errno;
	return advise(region, address, length);
}

/* Private memory that was never touched has no identity for the kernel (anon_vma): what an error page
 * parts would get different ones when it is filled, and never be one mapping again.  So it
 * gets one first, from a page that comes and goes before anybody knows the region. */
static void give_identity(struct au_region *region)
{
	int64_t done;

	if (au_abi_zeropage(region->engine->fd, region->start, region->page_size,
			    AU_ZEROPAGE_MODE_DONTWAKE, &done))
		return; /* an event is unread: more mappings, then */
	/* Unregistered, for dropping it could be an event that waits to be read. */
	au_abi_unregister(region->engine->fd, region->start, region->length);
	madvise((void *)(uintptr_t)region->start, region->page_size, MADV_DONTNEED);
}

static int register_memory(struct au_region *region)
{
	uint64_t ioctls, mode = AU_REGISTER_MODE_MISSING;
	int result;

	if (region->memfd >= 0)
		mode |= AU_REGISTER_MODE_MINOR;
	result = au_abi_register(region->engine->fd, region->start, region->length, mode, &ioctls);
	if (result || region->kind != AU_KIND_ANONYMOUS)
		return result;
	give_identity(region);
	return au_abi_register(region->engine->fd, region->start, region->length, mode, &ioctls);
}

struct au_region *au_region_create(struct au_engine *engine, uint64_t length, int kind, int options,
				   uint64_t block_size, int *error)
{
	struct au_region *region;
	bool huge = kind == AU_KIND_HUGETLB || kind == AU_KIND_HUGETLB_MEMFD;
	uint64_t page_size = huge ? 1ULL << HUGE_SHIFT : engine->page_size;
	int result;

	*error = EINVAL;
	if (!block_size)
		block_size = page_size;
	if (!length || block_size < page_size || (block_size & (block_size - 1)) ||
	    length > (1ULL << 46) || kind < AU_KIND_ANONYMOUS || kind > AU_KIND_HUGETLB_MEMFD)
		return NULL;
	*error = ENOMEM;
	region = calloc(1, sizeof *region);
	if (!region)
		return NULL;
	region->engine = engine;
	region->kind = (uint32_t)kind;
	region->options = (uint32_t)options;
	region->memfd = -1;
	region->object_length = length;
	region->page_size = page_size;
	region->block_size = block_size;
	region->page_shift = (uint32_t)__builtin_ctzll(page_size);
	region->block_shift = (uint32_t)__builtin_ctzll(block_size);
	region->length = round_up(length, page_size);
	region->pages = region->length >> region->page_shift;
	region->blocks = round_up(length, block_size) >> region->block_shift;
	pthread_mutex_init(&region->tail_lock, NULL);
	region->states = map_sparse(region->pages);
	region->flags = map_sparse(region->blocks);
	region->generations = map_sparse(region->blocks * sizeof *region->generations);
	region->tail = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			    -1, 0);
	if (region->tail == MAP_FAILED)
		region->tail = NULL;
	au_count(AU_COUNT_live_regions, 1);
	if (!region->states || !region->flags || !region->generations || !region->tail)
		goto fail;
	/* Should it not be had now, it is tried again when it is needed. */
	au_error_prepare();
	result = map_memory(region);
	if (!result)
		result = au_regions_add(region->start, region->length, region);
	if (!result)
		result = register_memory(region);
	if (!result)
		do
			result = au_engine_add_region(engine, region);
		while (result == -EAGAIN);
	if (!result && (options & AU_REGION_SERVE)) {
		result = au_children_add(region);
		if (result)
			au_engine_remove_region(engine, region);
	}
	if (result) {
		*error = -result;
		goto fail;
	}
	*error = 0;
	return region;
fail:
	au_region_free(region);
	return NULL;
}

int au_region_set_backing(struct au_region *region, const void *data, uint64_t length)
{
	if (length < region->object_length ||
	    au_regions_overlap((uint64_t)(uintptr_t)data, length))
		return -EINVAL;
	if (!region->backing)
		__atomic_fetch_add(&region->engine->urgent, 1, __ATOMIC_SEQ_CST);
	__atomic_store_n(&region->backing, data, __ATOMIC_RELEASE);
	return 0;
}

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
	end = round_up(offset + length, region->page_size) >> region->page_shift;
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
	end = round_up(offset + length, region->page_size) >> region->page_shift;
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

static int read_begin(struct au_region *region, uint64_t offset, uint64_t length)
{
	if (offset > region->length || length > region->length - offset)
		return -EINVAL;
	atomic_fetch_add(&region->readers, 1);
	if (!atomic_load(&region->closing))
		return 0;
	atomic_fetch_sub(&region->readers, 1);
	return -EBADF;
}

/* Poison that a close put there is the close's word, not the source's. */
static int read_end(struct au_region *region, uint64_t offset, int result, bool cut, uint64_t sound,
		    uint64_t *where)
{
	if (result) {
		*where -= region->start;
		if (*where < region->length && au_region_broken(region, *where))
			result = -EHWPOISON;
	} else if (cut) {
		*where = offset + sound;
		result = -EIO;
	}
	if (result == -EIO && atomic_load(&region->closing))
		result = -EBADF;
	atomic_fetch_sub(&region->readers, 1);
	return result;
}

/* How much of [offset, offset+length) lies before the first error that is known.  What is known to be
 * an error is not touched: the kernel may write to its log each time. */
static uint64_t before_error(const struct au_region *region, uint64_t offset, uint64_t length)
{
	uint64_t page = offset >> region->page_shift, start;

	/* A child knows what its parent knew once. */
	if (atomic_load(&region->inherited))
		return length;
	for (; (start = page << region->page_shift) < offset + length; page++)
		if ((atomic_load(&region->states[page]) & AU_PAGE_STATE) == AU_PAGE_POISONED)
			return start > offset ? start - offset : 0;
	return length;
}

int au_region_read(struct au_region *region, uint64_t offset, void *destination, uint64_t length,
		   uint64_t *where)
{
	int result = read_begin(region, offset, length);
	uint64_t sound;

	if (result)
		return result;
	sound = before_error(region, offset, length);
	result = au_guard_copy(destination, (const void *)(uintptr_t)(region->start + offset),
			       sound, where);
	return read_end(region, offset, result, sound < length, sound, where);
}

int au_region_touch(struct au_region *region, uint64_t offset, uint64_t length, uint64_t *where)
{
	int result = read_begin(region, offset, length);
	uint64_t sound;

	if (result)
		return result;
	sound = before_error(region, offset, length);
	result = au_guard_touch((const void *)(uintptr_t)(region->start + offset), sound,
				region->page_size, where);
	return read_end(region, offset, result, sound < length, sound, where);
}

int au_region_find(struct au_region *region, uint64_t offset, uint64_t length, const void *needle,
		   uint64_t needle_length, uint64_t *where, int64_t *found)
{
	int result = read_begin(region, offset, length);
	uint64_t sound;

	if (result)
		return result;
	sound = before_error(region, offset, length);
	*found = au_guard_find((const void *)(uintptr_t)(region->start + offset), sound, needle,
			       needle_length, where);
	result = *found == -EIO ? -EIO : 0;
	if (*found >= 0) {
		*found += (int64_t)offset;
		sound = length;
	}
	return read_end(region, offset, result, sound < length, sound, where);
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

/* ----------------------------------------------------------------- close */

/* The pages [from, to), which are ours, are errors: publish it and wake. */
static void publish_error(struct au_region *region, uint64_t from, uint64_t to, uint8_t state)
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

static bool take_page(struct au_region *region, uint64_t page)
{
	uint8_t state = AU_PAGE_MISSING;

	return page < region->pages &&
	       atomic_compare_exchange_strong(&region->states[page], &state, AU_PAGE_INSTALLING);
}

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
		publish_error(region, from, upto, state);
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
		if (!take_page(region, page)) {
			page++;
			continue;
		}
		start = page++;
		while ((!only_wanted || page >= region->pages ||
			(atomic_load(&region->flags[page >> shift]) & AU_BLOCK_WANTED)) &&
		       take_page(region, page))
			page++;
		seal_run(region, start, page);
	}
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
		if (!take_page(region, page))
			goto again;
		au_error_make(region, page, page + 1, true, &done, &made);
		if (done > 0)
			publish_error(region, page, page + 1, made);
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

void au_region_free(struct au_region *region)
{
	if (region->options & AU_REGION_SERVE)
		au_children_remove(region);
	if (region->mapped) {
		au_regions_remove(region->start);
		munmap((void *)(uintptr_t)region->start, region->length);
		au_error_forget(region);
	}
	if (region->memfd >= 0)
		close(region->memfd);
	if (region->states)
		munmap((void *)region->states, region->pages);
	if (region->flags)
		munmap((void *)region->flags, region->blocks);
	if (region->generations)
		munmap((void *)region->generations, region->blocks * sizeof *region->generations);
	if (region->tail)
		munmap(region->tail, region->page_size);
	pthread_mutex_destroy(&region->tail_lock);
	free(region);
	atomic_fetch_sub(&au_counters[AU_COUNT_live_regions], 1);
}

void au_region_forked(struct au_region *region)
{
	atomic_store(&region->closing, 1);
	atomic_store(&region->users, 0);
	atomic_store(&region->readers, 0);
	if (!(region->options & (AU_REGION_FORK | AU_REGION_SERVE)))
		region->mapped = false;
}
