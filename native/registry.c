#include "registry.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>

/* Where regions are, for the SIGBUS handler: read without a lock, never freed. */
#define REGISTRY_CHUNK 128U

#define REGISTRY_CHUNKS 1024U

struct range {
	_Atomic uint64_t start;
	_Atomic uint64_t length; /* 0: free */
	_Atomic(struct au_region *) region;
};

static struct range first_ranges[REGISTRY_CHUNK];
static _Atomic(struct range *) ranges[REGISTRY_CHUNKS] = { first_ranges };
static _Atomic uint32_t range_high;
static pthread_mutex_t registry_lock = PTHREAD_MUTEX_INITIALIZER;

static struct range *range_at(uint32_t index)
{
	return &atomic_load(&ranges[index / REGISTRY_CHUNK])[index % REGISTRY_CHUNK];
}

static void unlock_in_child(void)
{
	pthread_mutex_init(&registry_lock, NULL);
}

static void hook_fork(void)
{
	pthread_atfork(NULL, NULL, unlock_in_child);
}

int au_regions_add(uint64_t start, uint64_t length, struct au_region *region)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	uint32_t index, high;

	pthread_once(&once, hook_fork);
	pthread_mutex_lock(&registry_lock);
	high = atomic_load(&range_high);
	for (index = 0; index < high; index++)
		if (!atomic_load(&range_at(index)->length))
			break;
	if (index == REGISTRY_CHUNK * REGISTRY_CHUNKS) {
		pthread_mutex_unlock(&registry_lock);
		return -ENOSPC;
	}
	if (!atomic_load(&ranges[index / REGISTRY_CHUNK])) {
		struct range *chunk = mmap(NULL, sizeof *chunk * REGISTRY_CHUNK,
					   PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (chunk == MAP_FAILED) {
			pthread_mutex_unlock(&registry_lock);
			return -ENOMEM;
		}
		atomic_store(&ranges[index / REGISTRY_CHUNK], chunk);
	}
	atomic_store(&range_at(index)->region, region);
	atomic_store(&range_at(index)->start, start);
	atomic_store(&range_at(index)->length, length);
	if (index == high)
		atomic_store(&range_high, high + 1);
	pthread_mutex_unlock(&registry_lock);
	return 0;
}

void au_regions_remove(uint64_t start)
{
	uint32_t index;

	pthread_mutex_lock(&registry_lock);
	for (index = 0; index < atomic_load(&range_high); index++)
		if (atomic_load(&range_at(index)->length) &&
		    atomic_load(&range_at(index)->start) == start)
			atomic_store(&range_at(index)->length, 0);
	pthread_mutex_unlock(&registry_lock);
}

bool au_regions_overlap(uint64_t address, uint64_t length)
{
	uint32_t index, high = atomic_load(&range_high);

	for (index = 0; index < high; index++) {
		struct range *range = range_at(index);
		uint64_t size = atomic_load(&range->length), start = atomic_load(&range->start);

		if (size && address < start + size && start < address + length)
			return true;
	}
	return false;
}

bool au_regions_find(uint64_t address, uint64_t *offset, struct au_region **region)
{
	uint32_t index, high = atomic_load(&range_high);

	for (index = 0; index < high; index++) {
		struct range *range = range_at(index);
		uint64_t size = atomic_load(&range->length), start = atomic_load(&range->start);

		if (size && address >= start && address < start + size) {
			*offset = address - start;
			*region = atomic_load(&range->region);
			return true;
		}
	}
	return false;
}

void au_regions_forked(void)
{
	uint32_t index;

	pthread_mutex_init(&registry_lock, NULL);
	/* The mappings are gone (MADV_DONTFORK), but the addresses may be used again.  Those that
	 * are left to children come back once they are served. */
	for (index = 0; index < atomic_load(&range_high); index++)
		atomic_store(&range_at(index)->length, 0);
}
