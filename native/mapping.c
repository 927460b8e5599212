#include "mapping.h"

#include "sys.h"

#include <errno.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/stat.h>

#ifndef MFD_CLOEXEC
#define MFD_CLOEXEC 1U
#endif

#ifndef MFD_HUGETLB
#define MFD_HUGETLB 4U
#endif
#define MFD_HUGE_2MB (21U << 26)

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
	uint64_t huge = 1ULL << AU_HUGE_SHIFT, start, skip, tail;
	uint8_t *memory = map_empty(NULL, length + huge, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (memory == MAP_FAILED)
		return MAP_FAILED;
	start = au_round_up((uint64_t)(uintptr_t)memory, huge);
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
	return region->kind == AU_KIND_ANONYMOUS && region->length >= 1ULL << AU_HUGE_SHIFT;
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
		       (AU_HUGE_SHIFT << MAP_HUGE_SHIFT);
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

int au_region_map(struct au_region *region)
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
