#include "reading.h"

#include "guard.h"

#include <stdbool.h>

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
