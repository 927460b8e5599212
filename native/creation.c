#include "creation.h"

#include "abi.h"
#include "children.h"
#include "counters.h"
#include "engine.h"
#include "error_page.h"
#include "mapping.h"
#include "regions.h"
#include "registry.h"
#include "sys.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

/* -------------------------------------------------------------- creation */

static void *map_sparse(uint64_t length)
{
	void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return memory == MAP_FAILED ? NULL : memory;
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
	uint64_t page_size = huge ? 1ULL << AU_HUGE_SHIFT : engine->page_size;
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
	region->length = au_round_up(length, page_size);
	region->pages = region->length >> region->page_shift;
	region->blocks = au_round_up(length, block_size) >> region->block_shift;
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
	result = au_region_map(region);
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
