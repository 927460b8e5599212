#include "regions.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* --------------------------------------------------------------- regions */

int au_engine_add_region(struct au_engine *engine, struct au_region *region)
{
	struct au_region **bigger = NULL, **old = NULL;
	uint32_t capacity, index;

	/* Allocate outside of the lock; see engine.h. */
	pthread_mutex_lock(&engine->lock);
	capacity = engine->region_capacity;
	index = engine->region_count;
	pthread_mutex_unlock(&engine->lock);
	if (index + 1 >= capacity) {
		capacity = capacity ? capacity * 2 : 16;
		bigger = calloc(capacity, sizeof *bigger);
		if (!bigger)
			return -ENOMEM;
	}
	pthread_mutex_lock(&engine->lock);
	if (bigger && capacity > engine->region_capacity) {
		if (engine->region_count)
			memcpy(bigger, engine->regions, engine->region_count * sizeof *bigger);
		old = engine->regions;
		engine->regions = bigger;
		engine->region_capacity = capacity;
	} else {
		old = bigger;
	}
	if (engine->region_count == engine->region_capacity) {
		pthread_mutex_unlock(&engine->lock);
		free(old);
		return -EAGAIN;
	}
	region->id = ++engine->next_region;
	for (index = engine->region_count; index > 0; index--) {
		if (engine->regions[index - 1]->start < region->start)
			break;
		engine->regions[index] = engine->regions[index - 1];
	}
	engine->regions[index] = region;
	engine->region_count++;
	pthread_mutex_unlock(&engine->lock);
	free(old);
	return 0;
}

void au_engine_remove_region(struct au_engine *engine, struct au_region *region)
{
	uint32_t index;

	pthread_mutex_lock(&engine->lock);
	for (index = 0; index < engine->region_count; index++) {
		if (engine->regions[index] != region)
			continue;
		memmove(&engine->regions[index], &engine->regions[index + 1],
			(engine->region_count - index - 1) * sizeof *engine->regions);
		engine->region_count--;
		break;
	}
	pthread_mutex_unlock(&engine->lock);
}

struct au_region *au_engine_region_at(struct au_engine *engine, uint64_t address)
{
	uint32_t low = 0, high = engine->region_count;

	while (low < high) {
		uint32_t middle = (low + high) / 2;
		struct au_region *region = engine->regions[middle];

		if (address < region->start)
			high = middle;
		else if (address >= region->start + region->length)
			low = middle + 1;
		else
			return region;
	}
	return NULL;
}

void au_engine_name(struct au_region *region, const char *name)
{
	pthread_mutex_lock(&region->engine->lock);
	strncpy(region->name, name, sizeof region->name - 1);
	pthread_mutex_unlock(&region->engine->lock);
}

bool au_engine_describe(struct au_engine *engine, uint64_t page, char *name, uint64_t *offset)
{
	struct au_region *region;
	bool named;

	pthread_mutex_lock(&engine->lock);
	region = au_engine_region_at(engine, page);
	named = region && region->name[0];
	if (named) {
		memcpy(name, region->name, sizeof region->name);
		*offset = page - region->start;
	}
	pthread_mutex_unlock(&engine->lock);
	return named;
}

void au_engine_forked(struct au_engine *engine)
{
	uint32_t index;

	/* The mappings stayed with the parent, so their addresses may be in use again, and
	 * whoever was inside a call is not here to leave it. */
	for (index = 0; index < engine->region_count; index++)
		au_region_forked(engine->regions[index]);
	/* The child's copies of the descriptors act on the parent's memory. */
	if (engine->fd >= 0)
		close(engine->fd);
	if (engine->notify_fd >= 0)
		close(engine->notify_fd);
	engine->fd = engine->notify_fd = -1;
	atomic_store(&engine->closing, 1);
	atomic_store(&engine->users, 0);
	pthread_mutex_init(&engine->lock, NULL);
}
